"""Generation under every method equals eager under a mask drawn by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    DECODERS,
    counted_positions,
    drawn_masks,
    padding_mask,
    random_ids,
    tiny_model,
    twin,
)
from torch import Tensor

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig, StridedConfig

PROMPT, NEW = 9, 9  # together well beyond every window
PADS = [0, 4]

METHODS: dict[str, tuple[Any, Callable[[int, int], bool]]] = {
    "flash": (None, lambda q, k: True),
    "sliding_window": (
        SlidingWindowConfig(window=4, num_sink_tokens=2),
        lambda q, k: q - k < 4 or k < 2,
    ),
    "longformer": (
        LongformerConfig(window=3, num_global_tokens=2, dilation=2),
        lambda q, k: (q - k <= 4 and (q - k) % 2 == 0) or k < 2 or q < 2,
    ),
    "strided": (StridedConfig(window=2, stride=3), lambda q, k: q - k < 2 or (q - k) % 3 == 0),
}


def prompts(padded: bool) -> dict[str, Tensor]:
    inputs = {"input_ids": random_ids(2, PROMPT, seed=5)}
    if padded:
        inputs["attention_mask"] = padding_mask(PROMPT, PADS, "left")
        inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]
    return inputs


def generate(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(
        **inputs, **settings, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def greedy_without_cache(
    eager: Any, inputs: dict[str, Tensor], rule: Callable[[int, int], bool]
) -> tuple[Tensor, Tensor]:
    """Tokens and logits of greedy decoding: eager, whole sequences, a mask drawn by hand."""
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids))
    logits = []
    for _ in range(NEW):
        masks = drawn_masks(eager, len(ids), ids.shape[1], rule, valid)
        positions = counted_positions(valid)
        with torch.no_grad():
            step = eager(ids, attention_mask=masks, position_ids=positions, use_cache=False)
        logits.append(step.logits[:, -1].clone())
        scores = logits[-1].index_fill(1, torch.tensor([eager.config.eos_token_id]), -torch.inf)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
    return ids, torch.stack(logits)


def make(family: str, method: str) -> tuple[Any, Any, Callable[[int, int], bool]]:
    eager = tiny_model(family)
    ours = twin(eager, method)
    parameters, rule = METHODS[method]
    if parameters is not None:
        hf_attn_plugin.configure(ours, parameters)
    return eager, ours, rule


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DECODERS)
def test_greedy(family: str, method: str, cache: str, padded: bool) -> None:
    eager, ours, rule = make(family, method)
    inputs = prompts(padded)
    tokens, logits = greedy_without_cache(eager, inputs, rule)
    with hf_attn_plugin.count_reads(ours) as reads:
        answer = generate(ours, inputs, cache_implementation=cache)
    assert reads.calls == {method: NEW * eager.config.num_hidden_layers}
    assert reads.decode_steps == NEW - 1
    assert answer.sequences.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.stack(answer.logits), logits, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_control_would_be_noticed(method: str) -> None:
    """A pattern one pair wider gives other logits."""
    eager, _, rule = make("llama", method)
    wider = {
        "flash": lambda q, k: q - k < 16,
        "sliding_window": lambda q, k: q - k < 5 or k < 2,
        "longformer": lambda q, k: rule(q, k) or k < 3,
        "strided": lambda q, k: rule(q, k) or q - k < 3,
    }[method]
    _, logits = greedy_without_cache(eager, prompts(False), rule)
    _, other = greedy_without_cache(eager, prompts(False), wider)
    assert (logits - other).abs().max() > 0.05


@pytest.mark.parametrize("family", DECODERS)
def test_flash_with_beams_equals_eager(family: str) -> None:
    eager, ours, _ = make(family, "flash")
    inputs = prompts(True)
    settings = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(eager, inputs, **settings).sequences
    assert generate(ours, inputs, **settings).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_prompt_lookup_equals_greedy(method: str) -> None:
    """Several tokens are checked in one step, and the cache is cut back."""
    _, ours, _ = make("llama", method)
    inputs = {"input_ids": random_ids(1, 4).repeat(1, 4)}
    plain = generate(ours, inputs).sequences
    guessed = generate(ours, inputs, prompt_lookup_num_tokens=3).sequences
    assert guessed.tolist() == plain.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_prefill_in_chunks(family: str, method: str, cache: str) -> None:
    _, ours, _ = make(family, method)
    inputs = prompts(True)
    whole = generate(ours, inputs, cache_implementation=cache)
    chunks = generate(ours, inputs, cache_implementation=cache, prefill_chunk_size=4)
    assert chunks.sequences.tolist() == whole.sequences.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DECODERS)
def test_continuing_a_conversation(family: str, method: str) -> None:
    """A second turn of several tokens over the first turn's cache."""
    eager, ours, rule = make(family, method)
    ids = random_ids(2, 16)
    with torch.no_grad():
        first = ours(ids[:, :11])
        second = ours(ids[:, 11:], past_key_values=first.past_key_values).logits
        masks = drawn_masks(eager, 2, 16, rule)
        expected = eager(ids, attention_mask=masks).logits[:, 11:]
    torch.testing.assert_close(second, expected, atol=3e-4, rtol=1e-3)


def test_bart_under_flash_equals_eager() -> None:
    overrides = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "init_std": 0.3, "dropout": 0.0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(vocab_size=64, max_position_embeddings=64, **overrides)
    eager = BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ours = twin(eager, "flash")
    inputs = prompts(True)
    decoder_ids = random_ids(2, 7, seed=8)
    with torch.no_grad():
        expected = eager(**inputs, decoder_input_ids=decoder_ids).logits
        with hf_attn_plugin.count_reads(ours) as reads:
            found = ours(**inputs, decoder_input_ids=decoder_ids).logits
        unmasked = eager(inputs["input_ids"], decoder_input_ids=decoder_ids).logits
    assert reads.calls["flash"] >= 4
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)
    assert (unmasked - expected).abs().max() > 0.01
    expected = generate(eager, inputs).sequences
    for cache in ("dynamic", "static"):
        found = generate(ours, inputs, cache_implementation=cache).sequences
        assert found.tolist() == expected.tolist()
