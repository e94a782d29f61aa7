"""Patterns read out of transformers' mask functions equal transformers' own dense masks."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import LENGTH, WINDOW, pack_positions, padding_mask, random_ids, tiny_model, twin
from torch import Tensor
from transformers import masking_utils

from hf_attn_plugin.integrations.masks import pattern_mask
from hf_attn_plugin.patterns import PatternMask

Case = dict[str, Any]


def expected(case: Case) -> Tensor:
    """Transformers' own mask, as bool."""
    given = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, **case}
    return masking_utils.sdpa_mask(**given)


def check(case: Case, *, dense: bool) -> None:
    """The pattern of ``case`` is transformers' mask; ``dense`` tells how it must be held."""
    made = pattern_mask(**case)
    assert isinstance(made, PatternMask)
    wanted = expected(case)
    assert made.shape == wanted.shape
    assert made.ndim == 4
    assert (made.pattern.dense is not None) == dense
    found = made.pattern.visible("cpu").expand_as(wanted)
    valid = torch.ones_like(wanted)
    assert torch.equal(found & valid, wanted), "the pattern is another one"


def random_padding(rng: random.Random, batch: int, length: int) -> Tensor | None:
    kind = rng.choice(["none", "ones", "left", "right", "holes"])
    if kind == "none":
        return None
    if kind == "ones":
        return torch.ones(batch, length, dtype=torch.bool)
    if kind == "holes":
        return torch.tensor([[rng.random() < 0.7 for _ in range(length)] for _ in range(batch)])
    return padding_mask(length, [rng.randrange(length) for _ in range(batch)], kind).bool()


def left_padding(mask: Tensor | None, batch: int) -> Tensor:
    """As ``create_chunked_causal_mask`` counts it."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    return (mask.long().cumsum(-1) == 0).sum(-1)


def base_function(kind: str, rng: random.Random, mask: Tensor | None, batch: int) -> Callable:
    width = rng.randrange(1, 9)
    return {
        "causal": lambda: masking_utils.causal_mask_function,
        "bidirectional": lambda: masking_utils.bidirectional_mask_function,
        "window": lambda: masking_utils.sliding_window_causal_mask_function(width),
        "bidirectional window": lambda: masking_utils.sliding_window_bidirectional_mask_function(
            width
        ),
        "chunks": lambda: masking_utils.chunked_causal_mask_function(
            width, left_padding(mask, batch)
        ),
    }[kind]()


KINDS = ["causal", "bidirectional", "window", "bidirectional window", "chunks"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_sizes_offsets_and_padding(kind: str) -> None:
    for seed in range(120):
        rng = random.Random(f"{kind}{seed}")
        batch, q_length = rng.randrange(1, 4), rng.randrange(1, 12)
        layout = rng.choice(["whole", "decoding", "static", "rolling"])
        q_offset, kv_offset, kv_length = 0, 0, q_length
        if layout == "decoding":
            q_offset = rng.randrange(1, 12)
            kv_length = q_offset + q_length
        elif layout == "static":  # room for more keys than there are
            q_offset = rng.randrange(0, 12)
            kv_length = q_offset + q_length + rng.randrange(0, 9)
        elif layout == "rolling":  # the layer has dropped its first keys
            q_offset, kept = rng.randrange(4, 12), rng.randrange(1, 4)
            kv_offset = q_offset - kept
            kv_length = kept + q_length
        mask = random_padding(rng, batch, q_offset + q_length)
        case: Case = {
            "batch_size": batch,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": torch.tensor(q_offset) if seed % 3 == 0 else q_offset,
            "kv_offset": kv_offset,
            "mask_function": base_function(kind, rng, mask, batch),
            "attention_mask": mask,
        }
        check(case, dense=False)


def packed(function: Callable, positions: Tensor, documents: Tensor) -> Callable:
    """As this version of transformers packs documents."""
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(function, positions, documents)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(documents))


@pytest.mark.parametrize("kind", ["causal", "window", "chunks"])
def test_random_packed_documents(kind: str) -> None:
    if kind == "chunks" and not hasattr(masking_utils, "packed_sequence_compatibility_function"):
        pytest.skip("chunks run on over documents before 5.23; ours start anew (test_chunks.py)")
    for seed in range(80):
        rng = random.Random(f"{kind}{seed}")
        batch, length = rng.randrange(1, 4), rng.randrange(2, 24)
        starts = torch.tensor([[rng.random() < 0.2 for _ in range(length)] for _ in range(batch)])
        starts[:, 0] = False
        documents = starts.long().cumsum(1)
        index = torch.arange(length).expand(batch, -1)
        first = torch.where(starts, index, 0).cummax(1).values
        positions = index - first
        function = packed(base_function(kind, rng, None, batch), positions, documents)
        case = {"batch_size": batch, "q_length": length, "kv_length": length,
                "mask_function": function}  # fmt: skip
        check(case, dense=False)


@pytest.mark.parametrize("tokens", [7, 5])
def test_a_mask_of_ones_hides_nothing_of_a_static_cache(tokens: int) -> None:
    """It covers the tokens there are; one that is shorter hides those that it does not cover."""
    case: Case = dict(
        batch_size=2,
        q_length=1,
        kv_length=20,
        q_offset=torch.tensor(6),
        kv_offset=0,
        mask_function=masking_utils.causal_mask_function,
        attention_mask=torch.ones(2, tokens, dtype=torch.long),
    )
    check(case, dense=False)
    assert (pattern_mask(**case).pattern.key_valid is None) == (tokens == 7)


def test_static_caches_hand_the_finished_mask_back() -> None:
    case = {"batch_size": 2, "q_length": 3, "kv_length": 8, "q_offset": 2}
    made = pattern_mask(**case)
    assert pattern_mask(**case, attention_mask=made) is made
    assert made.contiguous() is made
    assert made.to("cpu") is made
    assert made.to(torch.bfloat16) is made


# -- what is not known falls back to a dense mask, and is right ------------------------------------


def sliding_window_overlay(width: int) -> Callable:
    """A user's function that is named like upstream's and means something else."""

    def inner_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % width == 0

    return inner_mask


def wrapped_upstream() -> Callable:
    """Looks like upstream's from outside: `functools.wraps` copies module and qualified name."""
    inner = masking_utils.sliding_window_overlay(3)

    @functools.wraps(inner)
    def inverted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~inner(b, h, q, k)

    return inverted


def renamed() -> Callable:
    def inner_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + k) % 2 == 0

    inner_mask.__module__ = masking_utils.__name__
    inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
    return inner_mask


CAUSAL = masking_utils.causal_mask_function
UNKNOWN: dict[str, Callable[[], Callable]] = {
    "or": lambda: masking_utils.or_masks(CAUSAL, lambda b, h, q, k: (q < 3) & (k < 3)),
    "or of known ones": lambda: masking_utils.or_masks(
        masking_utils.sliding_window_causal_mask_function(2), CAUSAL
    ),
    "custom and": lambda: masking_utils.and_masks(CAUSAL, lambda b, h, q, k: (q - k) % 3 != 1),
    "blocks": lambda: masking_utils.or_masks(
        CAUSAL, masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1]] * 2))
    ),
    "window without causality": lambda: masking_utils.sliding_window_overlay(3),
    "partial": lambda: functools.partial(CAUSAL),
    "lambda": lambda: lambda b, h, q, k: k <= q,
    "named like upstream": lambda: masking_utils.and_masks(sliding_window_overlay(3), CAUSAL),
    "wraps upstream": lambda: masking_utils.and_masks(wrapped_upstream(), CAUSAL),
    "renamed": lambda: masking_utils.and_masks(renamed(), CAUSAL),
    "with upstream's padding inside": lambda: masking_utils.and_masks(
        CAUSAL, masking_utils.padding_mask_function(torch.tensor([[True] * 6 + [False] * 2] * 2))
    ),
    "offset": lambda: masking_utils.add_offsets_to_mask_function(CAUSAL, 1, 0),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_functions_become_dense_masks(kind: str, padded: bool) -> None:
    case: Case = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": UNKNOWN[kind]()}
    if padded:
        case["attention_mask"] = padding_mask(8, [0, 3], "left").bool()
    check(case, dense=True)


def test_a_custom_mask_function_of_the_user_reaches_the_layers() -> None:
    """Through a model's own mask maker, with an or-mask as multimodal models use."""
    eager = tiny_model("gemma3_text")

    def image(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q < 5) & (k < 5)

    ids = random_ids(2, LENGTH)
    valid = padding_mask(LENGTH, [0, 4], "right")
    logits = {}
    for name in ("eager", "flash"):
        model = twin(eager, name)
        makers = {
            "full_attention": masking_utils.create_causal_mask,
            "sliding_attention": masking_utils.create_sliding_window_causal_mask,
        }
        embeds = model.get_input_embeddings()(ids)
        masks = {
            kind: make(model.config, embeds, valid, None, or_mask_function=image)
            for kind, make in makers.items()
        }
        with torch.no_grad():
            logits[name] = model(ids, attention_mask=masks).logits
            plain = model(ids, attention_mask=valid).logits
    torch.testing.assert_close(
        logits["flash"][valid.bool()], logits["eager"][valid.bool()], atol=3e-4, rtol=1e-3
    )
    assert (logits["flash"] - plain).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flash", "whole"),
        ("flash", "packed"),
        ("sliding_window", "padded"),
        ("sliding_window", "packed"),
        ("longformer", "padded"),
        ("strided", "whole"),
    ],
)
def test_compiled_models_compute_the_same(name: str, layout: str) -> None:
    """Closures cannot be read while compiling; the mask is then made dense."""
    import hf_attn_plugin

    model = tiny_model("gemma3_text", name)
    given = {
        "sliding_window": hf_attn_plugin.SlidingWindowConfig(window=4, num_sink_tokens=2),
        "longformer": hf_attn_plugin.LongformerConfig(window=3, dilation=2),
        "strided": hf_attn_plugin.StridedConfig(window=2, stride=5),
        "flash": hf_attn_plugin.FlashConfig(),
    }[name]
    hf_attn_plugin.configure(model, given)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH), "use_cache": False}
    if layout == "padded":
        inputs["attention_mask"] = padding_mask(LENGTH, [0, 5], "left")
    elif layout == "packed":
        inputs["position_ids"] = pack_positions([[8, 12], [13, 7]])
    valid = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, wanted = compiled(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found[valid], wanted[valid], atol=3e-4, rtol=1e-3)


def test_windows_are_read_and_not_assumed() -> None:
    """The control for all of the above: another window is another mask."""
    case = {"batch_size": 1, "q_length": 12, "kv_length": 12}
    near = masking_utils.sliding_window_causal_mask_function(WINDOW)
    far = masking_utils.sliding_window_causal_mask_function(WINDOW + 1)
    made = pattern_mask(**case, mask_function=near).pattern.visible("cpu")
    assert not torch.equal(made, expected({**case, "mask_function": far}))
    assert torch.equal(made, expected({**case, "mask_function": near}))
