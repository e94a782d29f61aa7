"""``sparq`` in models: against eager, against the paper, and over every kind of cache."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
)

import hf_attn_plugin
from hf_attn_plugin import SparQConfig
from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.methods.flash import flash_attention
from hf_attn_plugin.methods.sparq import sparq_attention
from hf_attn_plugin.patterns import Pattern, PatternMask
from tests.methods.sparq_models import (
    EVERYTHING,
    FEW,
    FEW_AND_MEAN,
    MODELS,
    SIZES,
    WINDOWED,
    build,
    generate,
    padded_prompt,
    prompt,
    same,
)

CACHES = {
    "made by generate": dict,
    "the user's": lambda: {"past_key_values": DynamicCache()},
    "static": lambda: {"cache_implementation": "static"},
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_keeping_every_key_equals_eager(name, cache):
    ids, mask = padded_prompt()
    expected = generate(build(name, "eager", dtype=torch.float32), ids, attention_mask=mask)
    model = build(name, "sparq", EVERYTHING, dtype=torch.float32)
    same(generate(model, ids, attention_mask=mask, **cache()), expected)


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("parameters", [FEW, FEW_AND_MEAN], ids=["top-k", "mean value"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_follows_the_paper(name, parameters, cache):
    if name == "gpt_oss" and parameters is FEW_AND_MEAN:
        pytest.skip("refused, see test_mean_value_with_sinks_is_refused")
    ids, mask = padded_prompt()
    expected = generate(build(name, "paper", parameters), ids, attention_mask=mask)
    model = build(name, "sparq", parameters)
    same(generate(model, ids, attention_mask=mask, **cache()), expected)
    dense = generate(build(name, "flash"), ids, attention_mask=mask)
    # Step 0 is the prefill, exact in any case; afterwards so few keys must show.
    torch.testing.assert_close(expected[1][:, 0], dense[1][:, 0])
    assert (expected[1][:, 1] - dense[1][:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("parameters", [FEW, FEW_AND_MEAN], ids=["top-k", "mean value"])
def test_left_padding_changes_nothing(parameters):
    model = build("llama", "sparq", parameters)
    ids, mask = padded_prompt()
    together = generate(model, ids, attention_mask=mask)
    for row, padding in enumerate((0, 3, 9)):
        tokens, logits = generate(model, ids[row : row + 1, padding:])
        same((together[0][row : row + 1, padding:], together[1][row : row + 1]), (tokens, logits))


def test_beams_keeping_every_key_equal_eager():
    ids, mask = padded_prompt()
    outputs = [
        model.generate(
            ids, attention_mask=mask, max_new_tokens=7, num_beams=3, num_return_sequences=2,
            do_sample=False,
        )
        for model in (
            build("llama", "eager", dtype=torch.float32),
            build("llama", "sparq", EVERYTHING, dtype=torch.float32),
        )
    ]  # fmt: skip
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("parameters", [FEW, FEW_AND_MEAN], ids=["top-k", "mean value"])
@pytest.mark.parametrize(
    ("strategy", "rows"),
    [({"num_beams": 3}, 3), ({"prompt_lookup_num_tokens": 3}, 1)],
    ids=["beams", "prompt lookup"],
)
def test_our_cache_and_a_plain_one_agree(strategy, rows, parameters):
    """Beams reorder the cache and prompt lookup crops it: the state must follow."""
    model = build("llama", "sparq", parameters)
    ids, mask = (t[:rows] for t in padded_prompt())
    arguments = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, **strategy)
    ours = model.generate(ids, **arguments)
    plain = model.generate(ids, past_key_values=DynamicCache(), **arguments)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_a_conversation_goes_on_from_its_cache():
    model = build("llama", "sparq", FEW_AND_MEAN)
    ids = prompt(1)
    outputs = []
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        more = torch.cat([first, prompt(1, 4, seed=2)], dim=1)
        outputs.append(generate(model, more, past_key_values=cache))
    same(*outputs)


def test_forward_without_generate():
    """A hand-written loop, with gradients enabled and without, equals generate's logits."""
    model = build("llama", "sparq", FEW)
    ids = prompt()
    tokens, logits = generate(model, ids)
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with context:
            output = model(ids)
            assert isinstance(output.past_key_values.layers[0], SparQLayer)
            for step in range(6):
                torch.testing.assert_close(output.logits[:, -1].float(), logits[:, step])
                output = model(
                    tokens[:, 17 + step : 18 + step], past_key_values=output.past_key_values
                )


@pytest.mark.parametrize("parameters", [FEW, FEW_AND_MEAN], ids=["top-k", "mean value"])
def test_layers_with_a_window_of_their_own_are_exact(parameters):
    ids, mask = padded_prompt()
    eager = build(WINDOWED, "eager", dtype=torch.float32)
    ours = build(WINDOWED, "sparq", parameters, dtype=torch.float32)
    same(
        generate(ours, ids, attention_mask=mask),
        generate(eager, ids, attention_mask=mask),
    )


def test_fewer_keys_than_dense_are_read_and_counted():
    """Llama, 2 layers, 2 KV heads of 8 float64: one component of one key is 8 bytes."""
    ids = prompt()
    per_layer = []
    for cached in range(18, 24):  # 7 tokens are 6 decoding steps
        components = 2 * 2 * 3 * cached * 8
        keys_and_values = 2 * 2 * 5 * (8 + 8) * 8
        per_layer.append((components + keys_and_values, 2 * 2 * cached * 16 * 8))
    model = build("llama", "sparq", FEW)
    with hf_attn_plugin.count_reads(model) as reads:
        generate(model, ids)
    assert reads.calls == {"sparq": 2 * 7}
    assert reads.decode_steps == 6
    assert reads.kv_bytes_read == 2 * sum(read for read, _ in per_layer)
    assert reads.kv_bytes_dense == 2 * sum(dense for _, dense in per_layer)
    # The mean value: float64 [2, 2, 8] kept, and one new value per step; prefill has the others.
    model = build("llama", "sparq", FEW_AND_MEAN)
    with hf_attn_plugin.count_reads(model) as with_mean:
        generate(model, ids)
    assert with_mean.kv_bytes_read - reads.kv_bytes_read == 2 * 6 * 2 * (2 * 2 * 8 * 8)
    # Without the component-major keys, all keys are read.
    with hf_attn_plugin.count_reads(model) as plain:
        generate(model, ids, past_key_values=DynamicCache())
    assert plain.kv_bytes_read > reads.kv_bytes_dense / 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_equals_eager(checkpointing):
    ids = prompt()
    results = []
    for model in (build("llama", "eager"), build("llama", "sparq", FEW_AND_MEAN)):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss  # with a cache, as is the default
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_decoding_over_a_static_cache():
    """Traces without a graph break, and gives the same tokens."""
    model = build("llama", "sparq", FEW)
    ids, mask = padded_prompt()
    expected = generate(model, ids, attention_mask=mask, cache_implementation="static")
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    same(
        generate(model, ids, attention_mask=mask, cache_implementation="static"),
        expected,
    )


def test_encoders_and_cross_attention_are_exact():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "initializer_range": 0.5}
    bert = BertConfig(
        **sizes, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    ids = prompt(2, 1)
    eager, ours = (build((BertModel, BertConfig, bert.to_dict()), n) for n in ("eager", "sparq"))
    for tokens in (ids, prompt()):
        torch.testing.assert_close(ours(tokens)[0], eager(tokens)[0])
    bart = dict(
        **sizes, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.5,
        dropout=0.0, attention_dropout=0.0, forced_eos_token_id=None, eos_token_id=60,
    )  # fmt: skip
    # Seven tokens decoded: with k = 8 only a cross-attention over 17 could be cut short.
    few = SparQConfig(rank=2, top_k=8)
    eager = build((BartForConditionalGeneration, BartConfig, bart), "eager")
    ours = build((BartForConditionalGeneration, BartConfig, bart), "sparq", few)
    same(generate(ours, prompt()), generate(eager, prompt()))


@pytest.mark.parametrize("why", ["chunks", "a mask per head"])
def test_calls_that_sparq_is_not_meant_for_are_exact(why):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    if why == "chunks":  # as in Llama 4, whose mask alone tells of them
        chunks = torch.arange(20)[None] // 8
        mask = PatternMask(
            Pattern(q_len=1, kv_len=20, q_documents=chunks[:, -1:], kv_documents=chunks), 2
        )
    else:
        mask = torch.rand(2, 4, 1, 20) < 0.8
    module = torch.nn.Module()
    module.config = hf_attn_plugin.configure(LlamaConfig(**SIZES), SparQConfig(rank=1, top_k=2))
    output, weights = sparq_attention(module, query, key, value, mask)
    assert weights is None
    torch.testing.assert_close(output, flash_attention(module, query, key, value, mask)[0])


def test_mean_value_with_sinks_is_refused():
    with pytest.raises(ValueError, match="not defined with attention sinks"):
        generate(build("gpt_oss", "sparq", FEW_AND_MEAN), prompt())


def test_a_rank_above_head_dim_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 8"):
        hf_attn_plugin.configure(build("llama", "sparq"), SparQConfig(rank=9))
    model = build("llama", "sparq")
    model.config.attn_params = {"sparq": {"rank": 9}}
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 8"):
        model(prompt())


def test_defaults():
    """r = head_dim / 4, k = 128, l = k / 4, no mean value."""
    ids = prompt(1, 150)
    outputs = [
        generate(build("llama", "sparq", parameters), ids)
        for parameters in (
            None,
            SparQConfig(rank=2, top_k=128, local_window=32, mean_value_reallocation=False),
            SparQConfig(rank=2, top_k=128, local_window=128),
        )
    ]
    same(outputs[0], outputs[1])
    assert (outputs[0][1] - outputs[2][1]).abs().max() > 1e-6
