"""The sparse methods equal eager under a mask of the same pattern, drawn pair by pair here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    LENGTH,
    WINDOW,
    additive,
    assert_differs,
    assert_within_budget,
    counted_positions,
    document_numbers,
    drawn_masks,
    pack_positions,
    padding_mask,
    pairs,
    random_ids,
    results,
    tiny_model,
    twin,
)
from torch import Tensor

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig, StridedConfig, configure

Rule = Callable[[int, int], bool]

CASES: dict[str, tuple[Any, Rule]] = {
    "window": (SlidingWindowConfig(window=4), lambda q, k: q - k < 4),
    "window of one": (SlidingWindowConfig(window=1), lambda q, k: q == k),
    "window and sinks": (
        SlidingWindowConfig(window=3, num_sink_tokens=2),
        lambda q, k: q - k < 3 or k < 2,
    ),
    "window wider than the model's": (
        SlidingWindowConfig(window=11, num_sink_tokens=1),
        lambda q, k: q - k < 11 or k < 1,
    ),
    "longformer": (
        LongformerConfig(window=3, num_global_tokens=2),
        lambda q, k: q - k < 3 or k < 2 or q < 2,
    ),
    "dilated": (
        LongformerConfig(window=3, num_global_tokens=1, dilation=3),
        lambda q, k: q - k in (0, 3, 6) or k < 1 or q < 1,
    ),
    "no global tokens": (
        LongformerConfig(window=2, num_global_tokens=0),
        lambda q, k: q - k < 2,
    ),
    "strided": (StridedConfig(window=2, stride=5), lambda q, k: q - k < 2 or (q - k) % 5 == 0),
}
PACKED = [[7, 5, 8], [13, 7]]


def sparse_twin(eager: Any, parameters: Any) -> Any:
    return hf_attn_plugin.configure(twin(eager, parameters.name), parameters)


def check(ours: Any, eager: Any, inputs: Any, masks: Any, valid: Tensor | None = None) -> Any:
    """``ours`` is within budget of eager under ``masks``, and our function did it."""
    method = ours.config._attn_implementation
    with hf_attn_plugin.count_reads(ours) as reads:
        reference = {**inputs, "attention_mask": masks}
        tried = assert_within_budget(ours, eager, inputs, reference=reference, valid=valid)
    assert reads.calls == {method: eager.config.num_hidden_layers}
    return tried


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_whole_sequences(family: str, case: str) -> None:
    parameters, rule = CASES[case]
    eager = tiny_model(family)
    inputs = {"input_ids": random_ids(2, LENGTH)}
    ours = sparse_twin(eager, parameters)
    tried = check(ours, eager, inputs, drawn_masks(eager, 2, LENGTH, rule))
    if not (family == "mistral" and "wider" in case):  # there the model's own window decides
        assert_differs(tried, results(eager, inputs))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["window and sinks", "longformer", "dilated", "strided"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_padding(family: str, case: str, side: str) -> None:
    """Sinks and global tokens are the first tokens after the padding."""
    parameters, rule = CASES[case]
    eager = tiny_model(family)
    valid = padding_mask(LENGTH, [2, 7], side)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH), "attention_mask": valid}
    inputs["position_ids"] = counted_positions(valid)
    ours = sparse_twin(eager, parameters)
    tried = check(ours, eager, inputs, drawn_masks(eager, 2, LENGTH, rule, valid), valid)
    if side == "left" and case != "strided":  # the control: sinks among the padding
        wrong = drawn_masks(eager, 2, LENGTH, lambda q, k: q - k < 3, valid)
        other = results(eager, {**inputs, "attention_mask": wrong}, valid)
        assert_differs(tried, other)


@pytest.mark.parametrize("extra", ["no cache", "cache", "mask of ones"])
@pytest.mark.parametrize("case", ["window and sinks", "longformer", "dilated", "strided"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_packed_documents(family: str, case: str, extra: str) -> None:
    """Sinks and global tokens are the first tokens of each document."""
    parameters, rule = CASES[case]
    eager = tiny_model(family)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH), "use_cache": extra == "cache"}
    inputs["position_ids"] = pack_positions(PACKED)
    if extra == "mask of ones":
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
    masks = drawn_masks(eager, 2, LENGTH, rule, None, document_numbers(PACKED))
    tried = check(sparse_twin(eager, parameters), eager, inputs, masks)
    joined = drawn_masks(eager, 2, LENGTH, rule)
    assert_differs(tried, results(eager, {**inputs, "attention_mask": joined}))


@pytest.mark.parametrize("window", [3, WINDOW, 9])
def test_the_narrower_of_two_windows(window: int) -> None:
    eager = tiny_model("mistral")
    ours = sparse_twin(eager, SlidingWindowConfig(window=window, num_sink_tokens=1))
    narrow = min(window, WINDOW)

    def rule(q: int, k: int) -> bool:  # the model's window hides the sink too
        return q - k < narrow or (k < 1 and q - k < WINDOW)

    inputs = {"input_ids": random_ids(2, LENGTH)}
    masks = additive(pairs(2, LENGTH, lambda q, k: k <= q and rule(q, k)))
    check(ours, eager, inputs, masks)


def test_sliding_window_takes_the_models_own_window() -> None:
    eager = tiny_model("mistral")
    ours = twin(eager, "sliding_window")
    inputs = {"input_ids": random_ids(2, LENGTH)}
    tried = assert_within_budget(ours, eager, inputs)
    assert_differs(tried, results(tiny_model("mistral", sliding_window=WINDOW + 1), inputs))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_defaults_are_dense_on_short_sequences(family: str) -> None:
    """Every default window is longer than these inputs, so nothing is left out."""
    eager = tiny_model(family)
    inputs = {"input_ids": random_ids(2, LENGTH)}
    for method in ("sliding_window", "longformer", "strided", "sparq"):
        assert_within_budget(twin(eager, method), eager, inputs)


def global_rule(flags: Tensor, row: int, near: Rule) -> Rule:
    return lambda q, k: near(q, k) or bool(flags[row, q]) or bool(flags[row, k])


def draw_rows(flags: Tensor, near: Rule, causal: bool, valid: Tensor | None = None) -> Tensor:
    rows = []
    for row in range(len(flags)):
        seen = global_rule(flags, row, near)
        tokens = range(flags.shape[1])
        cells = [[(k <= q or not causal) and seen(q, k) for k in tokens] for q in tokens]
        mask = torch.tensor([[cells]])
        if valid is not None:
            mask = mask & valid[row].bool() & valid[row].bool()[:, None]
        rows.append(mask)
    return additive(torch.cat(rows))


def marked_tokens() -> Tensor:
    flags = torch.zeros(2, LENGTH, dtype=torch.long)
    flags[0, 3] = flags[1, 11] = flags[1, 12] = 1
    return flags


def test_global_attention_mask_in_a_decoder() -> None:
    eager = tiny_model("llama")
    ours = sparse_twin(eager, LongformerConfig(window=3, num_global_tokens=1))
    flags = marked_tokens()
    inputs = {"input_ids": random_ids(2, LENGTH), "global_attention_mask": flags}
    everything = flags.clone()
    everything[:, 0] = 1
    masks = draw_rows(everything, lambda q, k: 0 <= q - k < 3, causal=True)
    tried = check(ours, eager, inputs, masks)
    assert_differs(tried, results(ours, {"input_ids": inputs["input_ids"]}))


@pytest.mark.parametrize("pads", [[0, 0], [0, 6]])
@pytest.mark.parametrize("dilation", [1, 2])
def test_longformer_in_an_encoder(dilation: int, pads: list[int]) -> None:
    eager = tiny_model("bert")
    parameters = LongformerConfig(window=3, num_global_tokens=1, dilation=dilation)
    ours = sparse_twin(eager, parameters)
    flags, valid = marked_tokens(), padding_mask(LENGTH, pads, "right")
    inputs = {
        "input_ids": random_ids(2, LENGTH),
        "attention_mask": valid,
        "global_attention_mask": flags,
    }
    everything = flags.clone()
    everything[:, 0] = 1

    def near(q: int, k: int) -> bool:
        return abs(q - k) % dilation == 0 and abs(q - k) < 3 * dilation

    masks = draw_rows(everything, near, causal=False, valid=valid)
    tried = check(ours, eager, inputs, masks, valid)
    wrong = draw_rows(everything, lambda q, k: abs(q - k) <= 3 * dilation, False, valid)
    assert_differs(tried, results(eager, {**inputs, "attention_mask": wrong}, valid))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_windows_in_encoders_look_both_ways(family: str) -> None:
    eager = tiny_model(family)
    ours = sparse_twin(eager, SlidingWindowConfig(window=3, num_sink_tokens=1))
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH)}
    mask = additive(pairs(2, LENGTH, lambda q, k: abs(q - k) < 3 or k < 1))
    if family == "modernbert":  # its own windows of 8 tokens reach 4 to each side
        local = pairs(2, LENGTH, lambda q, k: abs(q - k) < 3 or (k < 1 and q <= 4))
        mask = {"full_attention": mask, "sliding_attention": additive(local)}
    tried = check(ours, eager, inputs, mask)
    assert_differs(tried, results(eager, inputs))


def test_modernberts_own_window_is_the_default() -> None:
    """Its local layers keep all that they see; the others get the same window."""
    eager = tiny_model("modernbert")
    inputs = {"input_ids": random_ids(2, LENGTH)}
    local = additive(pairs(2, LENGTH, lambda q, k: abs(q - k) <= 4))
    masks = {"full_attention": local, "sliding_attention": local}
    check(twin(eager, "sliding_window"), eager, inputs, masks)


def test_strided_in_an_encoder() -> None:
    eager = tiny_model("bert")
    ours = sparse_twin(eager, StridedConfig(window=2, stride=5))
    inputs = {"input_ids": random_ids(2, LENGTH)}
    mask = pairs(2, LENGTH, lambda q, k: abs(q - k) < 2 or (q - k) % 5 == 0)
    check(ours, eager, inputs, additive(mask))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["window and sinks", "longformer", "strided"])
def test_gradient_checkpointing(case: str, reentrant: bool) -> None:
    parameters, rule = CASES[case]
    eager = tiny_model("gemma3_text")
    ours = sparse_twin(eager, parameters).train()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    inputs = {"input_ids": random_ids(2, LENGTH)}
    masks = drawn_masks(eager, 2, LENGTH, rule)
    reference = {**inputs, "attention_mask": masks}
    assert_within_budget(ours, eager, inputs, reference=reference)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_long_sequences_visit_blocks(family: str) -> None:
    """Long enough for several blocks of the schedule, with padding and documents."""
    length = 200
    eager = tiny_model(family, max_position_embeddings=512)
    parameters = SlidingWindowConfig(window=70, num_sink_tokens=3)
    ours = sparse_twin(eager, parameters)
    rows = [[80, 120], [200]]
    inputs = {"input_ids": random_ids(2, length), "position_ids": pack_positions(rows)}
    masks = drawn_masks(
        eager, 2, length, lambda q, k: q - k < 70 or k < 3, None, document_numbers(rows)
    )
    with torch.no_grad():
        expected = eager(**inputs, attention_mask=masks).logits
        found = ours(**inputs).logits
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)


def test_the_own_window_under_a_mask_of_the_callers() -> None:
    """A 4D mask does not make a decoder an encoder, whose configs count windows differently."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    ids = random_ids(1, LENGTH)
    default = tiny_model("mistral", "sliding_window")
    explicit = configure(twin(default, "sliding_window"), SlidingWindowConfig(window=WINDOW))
    with torch.no_grad():
        found = default(ids, attention_mask=mask).logits
        want = explicit(ids, attention_mask=mask).logits
        wider = configure(explicit, SlidingWindowConfig(window=WINDOW + 1))
        assert not torch.allclose(wider(ids, attention_mask=mask).logits, want, atol=1e-2)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", ["flash", "sliding_window", "strided", "sparq"])
def test_global_tokens_are_for_longformer_alone(name: str) -> None:
    ids = random_ids(1, LENGTH)
    with pytest.raises(ValueError, match="longformer"):
        tiny_model("llama", name)(ids, global_attention_mask=torch.ones_like(ids))
