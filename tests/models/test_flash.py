"""``flash`` computes what ``eager`` computes: logits and gradients, for every family and layout."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tiny import (
    DECODERS,
    FAMILIES,
    LENGTH,
    WINDOW,
    additive,
    assert_differs,
    assert_within_budget,
    document_numbers,
    pack_positions,
    padding_mask,
    pairs,
    random_ids,
    results,
    tiny_model,
    twin,
)
from transformers import DataCollatorWithFlattening, StaticCache

import hf_attn_plugin
from hf_attn_plugin import Pattern

PACKED = [[7, 5, 8], [11, 9]]


def packed_inputs(rows: list[list[int]]) -> dict[str, Any]:
    return {
        "input_ids": random_ids(len(rows), sum(rows[0])),
        "position_ids": pack_positions(rows),
    }


def documents_alone(eager: Any, inputs: dict[str, Any], rows: list[list[int]]) -> torch.Tensor:
    """Logits of every document in a call of its own."""
    logits = []
    for row, ids in zip(rows, inputs["input_ids"], strict=True):
        parts = ids.split(row)
        logits.append(torch.cat([eager(input_ids=part[None]).logits[0] for part in parts]))
    return torch.stack(logits)


@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family: str, side: str) -> None:
    eager = tiny_model(family)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH)}
    if side == "both":  # one row padded on the left, the other on the right
        left, right = (padding_mask(LENGTH, [4, 7], s) for s in ("left", "right"))
        inputs["attention_mask"] = torch.stack([left[0], right[1]])
    elif side != "none":
        inputs["attention_mask"] = padding_mask(LENGTH, [0, 7], side)
    valid = inputs.get("attention_mask")
    ours = twin(eager, "flash")
    with hf_attn_plugin.count_reads(ours) as reads:
        tried = assert_within_budget(ours, eager, inputs, valid=valid)
    assert reads.calls == {"flash": eager.config.num_hidden_layers}
    decoder_right = side == "right" and family in DECODERS  # causality hides padding there
    if valid is not None and not decoder_right:
        assert_differs(tried, results(eager, {**inputs, "attention_mask": None}, valid))


@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_without_a_cache(family: str) -> None:
    eager = tiny_model(family)
    inputs = {**packed_inputs(PACKED), "use_cache": False}
    reference = dict(inputs)
    if family == "gpt_oss":  # stock gpt-oss gives its masks no position_ids, so it needs ours
        numbers = document_numbers(PACKED)
        reference["attention_mask"] = {
            "full_attention": additive(pairs(2, LENGTH, lambda q, k: k <= q, None, numbers)),
            "sliding_attention": additive(
                pairs(2, LENGTH, lambda q, k: q - WINDOW < k <= q, None, numbers)
            ),
        }
    ours = twin(eager, "flash")
    tried = assert_within_budget(ours, eager, inputs, reference=reference)
    joined = {**inputs, "position_ids": torch.arange(LENGTH)[None]}
    assert_differs(tried, results(eager, joined))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("extra", ["cache", "cache and mask of ones", "mask of ones"])
def test_packed_documents_where_stock_masks_miss_them(family: str, extra: str) -> None:
    eager = tiny_model(family)
    inputs = packed_inputs(PACKED)
    inputs["use_cache"] = "cache" in extra
    if "mask" in extra:
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
    with torch.no_grad():
        ours = twin(eager, "flash")(**inputs).logits
        alone = documents_alone(eager, inputs, PACKED)
        stock = eager(**inputs).logits
    torch.testing.assert_close(ours, alone, atol=2e-4, rtol=1e-4)
    assert (stock - alone).abs().max() > 0.05, "stock separates them: the workaround can go"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_packed_documents_with_padding_at_the_end(family: str) -> None:
    eager = tiny_model(family)
    inputs = packed_inputs([[7, 5, 8], [12, 8]])
    inputs["attention_mask"] = padding_mask(LENGTH, [4, 2], "right")
    with torch.no_grad():
        ours = twin(eager, "flash")(**inputs).logits
        alone = documents_alone(eager, inputs, [[7, 5, 8], [12, 8]])
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[valid], alone[valid], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_flattened_batches_of_the_collator(family: str, use_cache: bool) -> None:
    eager = tiny_model(family)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    lengths = [7, 5, 8]
    documents = [{"input_ids": part.tolist()} for part in random_ids(1, LENGTH)[0].split(lengths)]
    inputs = dict(collator(documents))
    inputs.pop("labels")
    assert "cu_seq_lens_q" in inputs
    with torch.no_grad():
        ours = twin(eager, "flash")(**inputs, use_cache=use_cache).logits
        alone = documents_alone(eager, inputs, [lengths])
        inputs.pop("position_ids")  # cu_seq_lens alone must do
        rotated = twin(eager, "flash")(**inputs, use_cache=use_cache).logits
    torch.testing.assert_close(ours, alone, atol=2e-4, rtol=1e-4)
    # RoPE is relative, so documents come out the same wherever they start.
    torch.testing.assert_close(rotated, alone, atol=5e-4, rtol=1e-3)


def test_cumulative_lengths_of_a_whole_batch_are_refused() -> None:
    """The varlen convention flattens a batch into one row; two rows have no such meaning."""
    model = tiny_model("llama", "flash")
    lengths = torch.tensor([0, 5, 10, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens"):
        model(random_ids(2, 10), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_masks_made_by_the_user(family: str, kind: str) -> None:
    eager = tiny_model(family)
    keep = pairs(2, LENGTH, lambda q, k: (k <= q and (q * k) % 3 != 1) or q == k)
    if kind == "per head":
        other = pairs(2, LENGTH, lambda q, k: (k <= q and (q + k) % 4 != 1) or q == k)
        keep = torch.cat([keep, keep, other, other], 1)
    given = additive(keep) if kind == "float" else keep
    ids = random_ids(2, LENGTH)
    reference = {"input_ids": ids, "attention_mask": additive(keep)}
    inputs = {"input_ids": ids, "attention_mask": given}
    tried = assert_within_budget(twin(eager, "flash"), eager, inputs, reference=reference)
    assert_differs(tried, results(eager, {"input_ids": ids}))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "modernbert"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    eager = tiny_model(family)
    ours = twin(eager, "flash")
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    ours.train()
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH)}
    inputs["attention_mask"] = valid = padding_mask(LENGTH, [0, 7], "left")
    with hf_attn_plugin.count_reads(ours) as reads:
        assert_within_budget(ours, eager, inputs, valid=valid)
    assert reads.calls["flash"] == 2 * eager.config.num_hidden_layers, "nothing was recomputed"


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    eager = tiny_model(family)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH)}
    inputs["attention_mask"] = padding_mask(LENGTH, [0, 7], "right")
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = eager(**inputs).logits[valid]
        with torch.autocast("cpu", torch.bfloat16):
            plain = eager(**inputs).logits[valid]
            ours = twin(eager, "flash")(**inputs).logits[valid]
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()
    assert (plain - exact).norm() > 0, "autocast did nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    eager = tiny_model("gpt_oss")
    half = twin(eager, "eager").to(dtype)
    inputs = {"input_ids": random_ids(2, LENGTH)}
    with torch.no_grad():
        exact, plain = eager(**inputs).logits, half(**inputs).logits
        ours = twin(half, "flash")(**inputs).logits
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3"])
def test_decoders_made_bidirectional(family: str) -> None:
    eager = tiny_model(family, is_causal=False)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, LENGTH), "use_cache": False}
    inputs["attention_mask"] = valid = padding_mask(LENGTH, [0, 7], "left")
    tried = assert_within_budget(twin(eager, "flash"), eager, inputs, valid=valid)
    assert_differs(tried, results(tiny_model(family), inputs, valid))


def test_training_steps_follow_the_same_path() -> None:
    eager = tiny_model("gemma3_text").train()
    losses = []
    for model in (eager, twin(eager, "flash")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        path = []
        for step in range(5):
            ids = random_ids(2, LENGTH, seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            path.append(loss.item())
        losses.append(path)
    assert losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_packed_documents_with_padding_between_them() -> None:
    eager = tiny_model("llama")
    ids, mask = random_ids(1, 14), torch.ones(1, 14, dtype=torch.long)
    mask[0, 6:9] = 0
    positions = torch.tensor([[*range(6), 0, 0, 0, *range(5)]])
    with torch.no_grad():
        found = twin(eager, "flash")(ids, attention_mask=mask, position_ids=positions).logits
        alone = [eager(part).logits for part in (ids[:, :6], ids[:, 9:])]
    torch.testing.assert_close(found[:, :6], alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, 9:], alone[1], atol=1e-5, rtol=1e-4)


def test_padding_inside_one_document_does_not_split_it() -> None:
    eager = tiny_model("llama")
    ids, mask = random_ids(1, 14), torch.ones(1, 14, dtype=torch.long)
    mask[0, 6:9] = 0
    for positions in (torch.arange(14)[None], (mask.cumsum(1) - 1)):
        with torch.no_grad():
            found = twin(eager, "flash")(ids, attention_mask=mask, position_ids=positions).logits
            want = eager(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(found[mask == 1], want[mask == 1], atol=1e-5, rtol=1e-4)


def test_positions_that_jump_forward_are_one_document() -> None:
    """Skip-wise training: only positions that start again tell of packed documents."""
    eager = tiny_model("llama")
    ids, mask = random_ids(1, 16), torch.ones(1, 16, dtype=torch.long)
    positions = torch.tensor([[*range(8), *range(60, 68)]])
    with torch.no_grad():
        found = twin(eager, "flash")(ids, attention_mask=mask, position_ids=positions).logits
        want = eager(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flash", "sliding_window", "longformer", "strided", "sparq"])
def test_a_forward_leaves_nothing_for_the_garbage_collector(name: str) -> None:
    model = tiny_model("mistral", name)
    mask = padding_mask(LENGTH, [0, 5], "left")
    gc.collect()
    before = patterns_alive()  # those in other tests' parameters
    gc.disable()
    try:
        for _ in range(3):
            model(random_ids(2, LENGTH), attention_mask=mask)
        left = patterns_alive() - before
    finally:
        gc.enable()
    assert left == 0


def patterns_alive() -> int:
    return sum(type(thing) is Pattern for thing in gc.get_objects())


@pytest.mark.parametrize("with_mask", [False, True])
def test_packed_documents_into_an_empty_static_cache(with_mask: bool) -> None:
    """The cache has more slots than there are tokens, and no document is theirs."""
    eager = tiny_model("llama")
    ids = random_ids(1, 12)
    cache = StaticCache(config=eager.config, max_cache_len=20)
    extra = {"attention_mask": torch.ones(1, 12, dtype=torch.long)} if with_mask else {}
    with torch.no_grad():
        found = twin(eager, "flash")(
            ids, position_ids=pack_positions([[5, 7]]), past_key_values=cache, **extra
        ).logits
        alone = [eager(part).logits for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(found, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


def test_packed_documents_after_cached_tokens_are_refused() -> None:
    model = tiny_model("llama", "flash")
    first = model(random_ids(1, 4), use_cache=True)
    with pytest.raises(ValueError, match="cannot be continued from a cache"):
        model(
            random_ids(1, 12),
            position_ids=pack_positions([[5, 7]]) + 4,
            past_key_values=first.past_key_values,
        )


def test_compiled_packed_training_compiles_once() -> None:
    """Tensors that are new in every step must not be told apart by the compiled code."""
    graphs = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    model = torch.compile(tiny_model("llama", "flash"), backend=backend, dynamic=False)
    for seed in range(4):
        positions = pack_positions([[7, 5, 8]]).clone()
        model(random_ids(1, LENGTH, seed=seed), position_ids=positions, use_cache=False)
        if seed == 0:
            first = len(graphs)
    assert first > 0
    assert len(graphs) == first


def test_a_mask_of_one_row_for_all_queries() -> None:
    eager = tiny_model("llama")
    ids = random_ids(2, LENGTH)
    row = padding_mask(LENGTH, [0, 6], "right").bool()[:, None, None]
    with torch.no_grad():
        found = twin(eager, "flash")(ids, attention_mask=row).logits
        want = eager(ids, attention_mask=torch.where(row, 0.0, -1e9)).logits
    torch.testing.assert_close(found[0], want[0], atol=1e-5, rtol=1e-4)
