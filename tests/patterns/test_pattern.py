"""Every term of a pattern against masks drawn by hand."""

import copy

import pytest
import torch

from hf_attn_plugin import show_pattern
from hf_attn_plugin.patterns import Pattern, PatternMask
from hf_attn_plugin.patterns.documents import restarts

DRAWN = {
    "causal": (
        dict(q_len=4, kv_len=4),
        """
        x...
        xx..
        xxx.
        xxxx
        """,
    ),
    "bidirectional": (
        dict(q_len=2, kv_len=3, causal=False),
        """
        xxx
        xxx
        """,
    ),
    "fewer queries than keys sit at the end": (
        dict(q_len=2, kv_len=4),
        """
        xxx.
        xxxx
        """,
    ),
    "queries in the middle of a static cache": (
        dict(q_len=2, kv_len=5, q_offset=1),
        """
        xx...
        xxx..
        """,
    ),
    "window of 2 counts the query": (
        dict(q_len=4, kv_len=4, window=2),
        """
        x...
        xx..
        .xx.
        ..xx
        """,
    ),
    "window in both directions": (
        dict(q_len=4, kv_len=4, causal=False, window=2),
        """
        xx..
        xxx.
        .xxx
        ..xx
        """,
    ),
    "the model's own window limits the method's": (
        dict(q_len=4, kv_len=4, window=3, band=2),
        """
        x...
        xx..
        .xx.
        ..xx
        """,
    ),
    "window with a sink": (
        dict(q_len=5, kv_len=5, window=2, num_sink_tokens=1),
        """
        x....
        xx...
        xxx..
        x.xx.
        x..xx
        """,
    ),
    "a sink is no global query": (
        dict(q_len=4, kv_len=4, causal=False, window=1, num_sink_tokens=1),
        """
        x...
        xx..
        x.x.
        x..x
        """,
    ),
    "a global token sees all and is seen by all": (
        dict(q_len=4, kv_len=4, causal=False, window=1, num_global_tokens=1),
        """
        xxxx
        xx..
        x.x.
        x..x
        """,
    ),
    "global tokens by mask, causal": (
        dict(q_len=4, kv_len=4, window=1, global_tokens=torch.tensor([[0, 0, 1, 0]]).bool()),
        """
        x...
        .x..
        xxx.
        ..xx
        """,
    ),
    "dilated window": (
        dict(q_len=6, kv_len=6, window=2, dilation=2),
        """
        x.....
        .x....
        x.x...
        .x.x..
        ..x.x.
        ...x.x
        """,
    ),
    "strided": (
        dict(q_len=6, kv_len=6, window=1, stride=3),
        """
        x.....
        .x....
        ..x...
        x..x..
        .x..x.
        ..x..x
        """,
    ),
    "packed documents": (
        dict(
            q_len=5,
            kv_len=5,
            q_documents=torch.tensor([[0, 0, 0, 1, 1]]),
            kv_documents=torch.tensor([[0, 0, 0, 1, 1]]),
        ),
        """
        x....
        xx...
        xxx..
        ...x.
        ...xx
        """,
    ),
    "each document has its own sink": (
        dict(
            q_len=6,
            kv_len=6,
            window=1,
            num_sink_tokens=1,
            q_documents=torch.tensor([[0, 0, 0, 1, 1, 1]]),
            kv_documents=torch.tensor([[0, 0, 0, 1, 1, 1]]),
        ),
        """
        x.....
        xx....
        x.x...
        ...x..
        ...xx.
        ...x.x
        """,
    ),
    "left padding: the sink is the first valid token": (
        dict(
            q_len=5,
            kv_len=5,
            window=1,
            num_sink_tokens=1,
            key_valid=torch.tensor([[0, 0, 1, 1, 1]]).bool(),
        ),
        """
        .....
        .....
        ..x..
        ..xx.
        ..x.x
        """,
    ),
    "right padding": (
        dict(q_len=3, kv_len=3, key_valid=torch.tensor([[1, 1, 0]]).bool()),
        """
        x..
        xx.
        xx.
        """,
    ),
    "paged: queries and keys numbered in their own sequences": (
        dict(
            q_len=2,
            kv_len=5,
            q_documents=torch.tensor([[0, 1]]),
            kv_documents=torch.tensor([[0, 0, 0, 1, 1]]),
            q_positions=torch.tensor([[2, 1]]),
            kv_positions=torch.tensor([[0, 1, 2, 0, 1]]),
            window=2,
        ),
        """
        .xx..
        ...xx
        """,
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn(name: str) -> None:
    fields, drawing = DRAWN[name]
    rows = drawing.split()
    mask = Pattern(**fields).visible("cpu")[0, 0]
    assert ["".join("x" if cell else "." for cell in row) for row in mask.tolist()] == rows


@pytest.mark.parametrize("name", DRAWN)
def test_block_is_a_cut_of_the_whole(name: str) -> None:
    pattern = Pattern(**DRAWN[name][0])
    whole = pattern.visible("cpu")
    rows, cols = slice(1, pattern.q_len), slice(1, pattern.kv_len - 1)
    block = pattern.visible("cpu", rows.start, rows.stop, cols.start, cols.stop)
    assert torch.equal(block, whole[:, :, rows, cols])


def test_text_picture() -> None:
    text = show_pattern(Pattern(q_len=2, kv_len=3, window=1))
    assert text == "0 . x .\n1 . . x"


def test_png_picture(tmp_path) -> None:
    path = tmp_path / "pattern.png"
    show_pattern(Pattern(q_len=8, kv_len=8, window=2), path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_too_large_to_draw() -> None:
    with pytest.raises(ValueError, match="up to 512"):
        show_pattern(Pattern(q_len=513, kv_len=513))


@pytest.mark.parametrize(
    "fields",
    [
        dict(window=0),
        dict(stride=0),
        dict(dilation=0),
        dict(band=-1),
        dict(num_sink_tokens=-1),
        dict(key_valid=torch.ones(1, 3, dtype=torch.bool)),
        dict(q_documents=torch.zeros(1, 4, dtype=torch.int64)),
        dict(dense=torch.ones(1, 1, 4, 4)),
    ],
)
def test_wrong_fields_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="Pattern"):
        Pattern(q_len=4, kv_len=4, **fields)


def test_derived_things_do_not_outlive_a_change() -> None:
    pattern = Pattern(q_len=4, kv_len=4, num_sink_tokens=1, window=1)
    pattern.visible("cpu")
    changed = pattern.replace(num_sink_tokens=2)
    assert changed.visible("cpu")[0, 0, 3].tolist() == [True, True, False, True]


def test_mask_travels_like_a_tensor() -> None:
    valid = torch.ones(2, 4, dtype=torch.bool)
    mask = PatternMask(Pattern(q_len=3, kv_len=4, key_valid=valid), batch_size=2)
    assert mask.ndim == 4
    assert mask.shape == (2, 1, 3, 4)
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask
    assert mask.to("meta", non_blocking=True).pattern.key_valid.device.type == "meta"


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask[:, :, :2],
        lambda mask: mask + 1,
        lambda mask: 1.0 - mask,
        lambda mask: torch.ones(1) * mask,
        lambda mask: ~mask,
        lambda mask: mask == 0,
        lambda mask: mask > 0,
        lambda mask: bool(mask),
    ],
)
def test_computing_with_the_mask_is_refused(use) -> None:
    mask = PatternMask(Pattern(q_len=3, kv_len=4), batch_size=1)
    with pytest.raises(ValueError, match="holds no values"):
        use(mask)


def test_asking_the_mask_for_values_says_what_to_use() -> None:
    mask = PatternMask(Pattern(q_len=3, kv_len=4), batch_size=1)
    with pytest.raises(AttributeError, match="Use attn_implementation='sdpa'"):
        mask.dtype  # noqa: B018
    assert mask is not None
    assert mask == mask
    assert copy.deepcopy(mask).shape == mask.shape


def test_documents_told_by_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0], [3, 5, 9, 10, 2, 3]])
    assert restarts(positions).int().tolist() == [
        [0, 0, 0, 1, 0, 1],
        [0, 1, 1, 1, 1, 1],  # documents of one token each
        [0, 0, 0, 0, 1, 0],
    ]
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    numbered = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1]])
    expected = [[0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]
    assert restarts(numbered, valid).int().tolist() == expected
    assert restarts(torch.stack([numbered] * 3), valid).int().tolist() == expected


def test_a_pattern_cannot_be_computed_with() -> None:
    mask = PatternMask(Pattern(q_len=3, kv_len=3), 1)
    with pytest.raises(ValueError, match="computes with its attention mask"):
        torch.cat([mask, torch.ones(1, 1, 3, 1)], dim=-1)
    with pytest.raises(ValueError, match="computes with its attention mask"):
        torch.ones(1, 1, 3, 3) + mask
