"""``sparq``'s options in models: token for token what the numpy reference generates.

The reference attention has no state: it recomputes every step from the plain keys, so whatever the
caches keep must have followed every reordering, cropping and chunk.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    StaticCache,
)

import hf_attn_plugin
from hf_attn_plugin import SparQConfig, count_reads
from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer
from tests.methods.sparq_models import (
    FEW,
    MIXED,
    SIZES,
    build,
    generate,
    padded_prompt,
    paper_attention,
    prompt,
    same,
)

FEW_PARTS = {"rank": 4, "top_k": 7, "local_window": 2}
OPTIONS = {
    "coverage": SparQConfig(**FEW_PARTS, coverage=0.5),
    "rank coverage": SparQConfig(**FEW_PARTS, rank_coverage=0.5),
    "int8": SparQConfig(**FEW_PARTS, key_copy="int8"),
    "int4": SparQConfig(**FEW_PARTS, key_copy="int4"),
    "no copy": SparQConfig(**FEW_PARTS, key_copy="none"),
    "block means": SparQConfig(**FEW_PARTS, mean_value_reallocation=True, mean_block=4),
    "everything": SparQConfig(
        **FEW_PARTS, coverage=0.6, rank_coverage=0.6, key_copy="int8",
        mean_value_reallocation=True, mean_block=4,
    ),
    "no copy, everything else": SparQConfig(
        **FEW_PARTS, coverage=0.6, rank_coverage=0.6, key_copy="none",
        mean_value_reallocation=True, mean_block=4,
    ),
}  # fmt: skip
SOME = ["int4", "everything", "no copy, everything else"]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """So that the few tokens here fill several groups of a quantised copy."""
    monkeypatch.setattr("hf_attn_plugin.ops.sparq.key_copy.GROUP", 8)


# A small theta turns all components: else the keys of a token that comes twice differ by so little
# that a quantised copy has them equal, and which of them is chosen is anybody's guess.
LLAMA = (
    LlamaForCausalLM, LlamaConfig,
    SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}},
)  # fmt: skip


def pair(parameters, model=LLAMA):
    return build(model, "sparq", parameters), build(model, "paper", parameters)


CACHES = {
    "dynamic": ({}, SparQLayer),
    "static": ({"cache_implementation": "static"}, SparQStaticLayer),
}


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", OPTIONS)
def test_left_padded_batches(name, cache):
    ids, mask = padded_prompt()
    ours, paper = pair(OPTIONS[name])
    arguments, layer = CACHES[cache]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "no second copy of the keys"
        found = generate(ours, ids, attention_mask=mask, **arguments)
    same(found, generate(paper, ids, attention_mask=mask, **arguments))
    other = generate(build(LLAMA, "sparq", FEW), ids, attention_mask=mask, **arguments)
    assert (found[1][:, 1] - other[1][:, 1]).abs().max() > 1e-3, "the option changes nothing"
    output = ours.generate(
        ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **arguments
    )
    assert {type(layer) for layer in output.past_key_values.layers} == {layer}


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["everything"])
def test_right_padded_batches(name, cache):
    ids, mask = (t.flip(1) for t in padded_prompt())
    ours, paper = pair(OPTIONS[name])
    arguments, _ = CACHES[cache]
    same(
        generate(ours, ids, attention_mask=mask, **arguments),
        generate(paper, ids, attention_mask=mask, **arguments),
    )


MINISTRAL = (MinistralForCausalLM, MinistralConfig, SIZES | MIXED)


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["rank coverage", "everything"])
@pytest.mark.parametrize(
    "model", ["gemma3", "gemma2", "gpt_oss", MINISTRAL, "gpt2"],
    ids=["gemma3", "gemma2", "gpt_oss", "ministral", "gpt2"],
)  # fmt: skip
def test_families_with_windows_sinks_and_softcap(model, name, cache):
    if model == "gpt_oss" and name == "everything":
        pytest.skip("a mean value is refused with sinks")
    ids, mask = padded_prompt()
    ours, paper = pair(OPTIONS[name], model)
    arguments, _ = CACHES[cache]
    same(
        generate(ours, ids, attention_mask=mask, **arguments),
        generate(paper, ids, attention_mask=mask, **arguments),
    )


STRATEGIES = {
    "beams": dict(num_beams=3, num_return_sequences=2),
    "beams, static": dict(num_beams=3, cache_implementation="static"),
    "sampling": dict(do_sample=True, num_return_sequences=2, top_k=0),
    "sampling, static": dict(
        do_sample=True, num_return_sequences=2, top_k=0, cache_implementation="static"
    ),
    "chunked prefill": dict(prefill_chunk_size=5),
    "chunks that leave one token": dict(prefill_chunk_size=4),
    "chunked prefill, static": dict(prefill_chunk_size=5, cache_implementation="static"),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "assisted": dict(assistant=True),
}


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["int4", "everything"])
def test_strategies_of_generation(name, strategy):
    ours, paper = pair(OPTIONS[name])
    arguments = dict(STRATEGIES[strategy])
    ids, mask = padded_prompt()
    if strategy in ("prompt lookup", "assisted", "chunked prefill, static"):
        ids, mask = ids[:1], mask[:1]
    found = []
    for model in (ours, paper):
        if arguments.get("assistant") is not None:
            arguments["assistant_model"] = assistant = build(LLAMA, "eager", dtype=torch.float64)
            torch.manual_seed(5)  # near enough for some of its guesses to be taken, and not all
            for parameter in assistant.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        arguments.pop("assistant", None)
        torch.manual_seed(3)
        found.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=9, suppress_tokens=[0], **arguments
            )
        )
        if strategy == "assisted":
            arguments["assistant"] = True
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", SOME)
def test_a_conversation_goes_on_in_its_cache(name, kind):
    ids, found = prompt(2), []
    for model in pair(OPTIONS[name]):
        cache = (
            DynamicCache(config=model.config)
            if kind == "dynamic"
            else StaticCache(config=model.config, max_cache_len=40)
        )
        first = model.generate(ids, past_key_values=cache, max_new_tokens=5, suppress_tokens=[0])
        more = torch.cat([first, prompt(2, 4, seed=2)], dim=1)
        found.append(generate(model, more, past_key_values=cache))
        if model.config._attn_implementation == "sparq":
            cache.reset()
            again = model.generate(
                ids, past_key_values=cache, max_new_tokens=5, suppress_tokens=[0]
            )
            torch.testing.assert_close(again, first, rtol=0, atol=0)
    same(*found)


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("name", SOME)
def test_chunks_and_crops_by_hand(name):
    """A prompt in three pieces, a guess of four tokens of which two are taken back, then one."""
    ids, logits = prompt(2, 24), []
    pieces = [(0, 9), (9, 10), (10, 18)]
    for model in pair(OPTIONS[name]):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for first, last in pieces:
                model(ids[:, first:last], past_key_values=cache)
            model(ids[:, 18:19], past_key_values=cache)
            model(ids[:, 19:23], past_key_values=cache)
            cache.crop(-2)
            for at in (21, 22, 23):
                output = model(ids[:, at : at + 1], past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            output = model(ids[:1, :1], past_key_values=cache)
            cache.batch_repeat_interleave(2)
            output = model(ids[:, :1], past_key_values=cache)
        logits.append(output.logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["coverage", "rank coverage"])
def test_counted_are_the_rows_and_keys_that_the_reference_uses(name):
    """Llama, Hkv = 2, D = 8, float64; 2 layers and a batch of 3, so 12 rows a step."""
    ids, mask = padded_prompt()
    used = []
    with paper_attention(used):
        ours, paper = pair(OPTIONS[name])
        generate(paper, ids, attention_mask=mask)
    with count_reads(ours) as reads:
        generate(ours, ids, attention_mask=mask)
    assert len(used) == 12 * 6
    assert len({u[: 2 if name == "coverage" else 1] for u in used}) > 1
    keys_and_values = sum(k for _, k, _ in used) * (8 + 8) * 8
    components = sum(r * cached for r, _, cached in used) * 8
    if name == "rank coverage":  # k is fixed then, and the padded rows' fillers are read too
        keys_and_values = len(used) * 7 * (8 + 8) * 8
    assert reads.kv_bytes_read == keys_and_values + components


def test_a_static_cache_reads_what_it_needs():
    ids = prompt()
    with count_reads(model := build("llama", "sparq", FEW)) as reads:
        cache = StaticCache(config=model.config, max_cache_len=100)
        generate(model, ids, past_key_values=cache)
    # r = 3 components of all 100 slots, and 5 keys and values; 2 rows, 2 KV heads, 2 layers.
    assert reads.kv_bytes_read == 6 * 2 * 2 * 2 * (3 * 100 + 5 * 16) * 8
    assert reads.kv_bytes_dense == 6 * 2 * 2 * 2 * 100 * 16 * 8


@pytest.mark.parametrize("name", ["everything"])
def test_compiled_decoding_over_a_static_cache(name):
    model = build(LLAMA, "sparq", OPTIONS[name])
    ids, mask = padded_prompt()
    expected = generate(model, ids, attention_mask=mask, cache_implementation="static")
    eager = model.forward
    compiled = torch.compile(eager, backend="eager", fullgraph=True)

    @functools.wraps(eager)  # generate looks at its parameters
    def forward(**kwargs):
        """As generate does by itself on a GPU: prefill runs uncompiled."""
        return (compiled if kwargs["input_ids"].shape[1] == 1 else eager)(**kwargs)

    model.forward = forward
    same(generate(model, ids, attention_mask=mask, cache_implementation="static"), expected)


def test_without_a_state_all_keys_are_read_and_a_warning_says_so():
    model, ids = build("llama", "sparq", FEW), prompt()
    with pytest.warns(UserWarning, match="keeps no second copy"), count_reads(model) as reads:
        found = generate(model, ids, past_key_values=DynamicCache())
    same(found, generate(model, ids))
    chosen = sum(5 * 16 + cached * 8 for cached in range(18, 24)) * 2 * 2 * 2 * 8
    assert reads.kv_bytes_read == chosen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(build("llama", "sparq", OPTIONS["no copy"]), ids, past_key_values=DynamicCache())


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("name", ["coverage", "int8"])
def test_latent_attention_works_by_reading_all_keys(name):
    """DeepSeek-V3 caches latents, and makes its keys after the cache."""
    sizes = SIZES | {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2,
    }  # fmt: skip
    sizes.pop("head_dim")
    deepseek = (DeepseekV3ForCausalLM, DeepseekV3Config, sizes)
    parameters = SparQConfig(**FEW_PARTS, coverage=0.5 if name == "coverage" else None)
    ids, mask = padded_prompt()
    ours, paper = pair(parameters, deepseek)
    if name == "int8":
        hf_attn_plugin.configure(ours, SparQConfig(**FEW_PARTS, key_copy="int8"))
    with pytest.warns(UserWarning, match="multi-head latent"), count_reads(ours) as reads:
        found = generate(ours, ids, attention_mask=mask)
    same(found, generate(paper, ids, attention_mask=mask))
    assert reads.kv_bytes_read > reads.kv_bytes_dense * 12 / 18  # all keys (12 of 12 + 6)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("change", ["4D, then none", "shown later", "hidden later"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_mean_values_follow_a_mask_that_changes(block, change, static):
    """A cache filled under another mask decodes as one that adds up its values only then."""
    parameters = SparQConfig(rank=6, top_k=3, mean_value_reallocation=True, mean_block=block)
    model, length = build("llama", "sparq", parameters), 14
    ids = torch.cat([prompt()] * 4, dim=1)[:1, : length + 3]
    hidden = torch.ones(1, length + 3, dtype=torch.long)
    hidden[:, 3:9] = 0
    shown = torch.ones_like(hidden)
    first, later = {"shown later": (hidden, shown), "hidden later": (shown, hidden)}.get(
        change, (None, shown)
    )
    tree = torch.ones(length, length, dtype=torch.bool).tril()
    tree[-1, :-5] = False

    def logits(forget):
        if static:
            cache = StaticCache(config=model.config, max_cache_len=length + 3)
        else:
            cache = DynamicCache(config=model.config)
        positions = torch.arange(length + 3)[None]
        with torch.no_grad():
            mask = tree[None, None] if first is None else first[:, :length]
            if static and first is None:
                mask = torch.nn.functional.pad(mask, (0, 3))
            model(ids[:, :length], attention_mask=mask, past_key_values=cache,
                  position_ids=positions[:, :length])  # fmt: skip
            if forget:
                for layer in cache.layers:
                    if static:
                        layer._sums.reset()
                    else:
                        layer._sums.crop(0)
            return torch.cat([
                model(ids[:, at : at + 1], attention_mask=later[:, : at + 1], past_key_values=cache,
                      position_ids=positions[:, at : at + 1]).logits
                for at in range(length, length + 3)
            ])  # fmt: skip

    torch.testing.assert_close(logits(False), logits(True), rtol=1e-4, atol=1e-4)


def test_a_cache_of_other_parameters_is_refused():
    model, ids = build("llama", "sparq", FEW), prompt()
    cache = DynamicCache(config=model.config)
    generate(model, ids, past_key_values=cache)
    hf_attn_plugin.configure(model, OPTIONS["int8"])
    with pytest.raises(ValueError, match=r"made with key_copy='full'.*new cache"):
        generate(model, torch.cat([ids, ids], dim=1), past_key_values=cache)


def test_a_quantized_cache_is_refused_with_what_to_use_instead():
    model = build("llama", "sparq", FEW)
    with pytest.raises(ValueError, match=r"SparQConfig\(key_copy='int8'\)"):
        model.generate(prompt(), generation_config=GenerationConfig(
            cache_implementation="quantized", max_new_tokens=3))  # fmt: skip


def test_block_means_with_sinks_are_refused():
    with pytest.raises(ValueError, match="not defined with attention sinks"):
        generate(build("gpt_oss", "sparq", OPTIONS["block means"]), prompt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 0}, "coverage must be a number above 0 and at most 1, got 0"),
        ({"coverage": 1.01}, "coverage must be a number above 0"),
        ({"coverage": True}, "coverage must be a number"),
        ({"coverage": "0.9"}, "coverage must be a number"),
        ({"coverage": float("nan")}, "coverage must be a number"),
        ({"rank_coverage": -0.1}, "rank_coverage must be a number"),
        ({"key_copy": "int2"}, "key_copy must be one of 'full', 'int8', 'int4', 'none'"),
        ({"key_copy": None}, "key_copy must be one of"),
        ({"mean_block": 64}, "none without mean_value_reallocation=True"),
        ({"mean_block": 0, "mean_value_reallocation": True}, "mean_block must be an integer >= 1"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=f"SparQConfig: .*{message}"):
        SparQConfig(**options)


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_travel_with_the_model(name, tmp_path):
    build(LLAMA, "sparq", OPTIONS[name]).save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    assert SparQConfig(**config.attn_params["sparq"]) == OPTIONS[name]


def test_the_size_below_which_steps_are_dense():
    """Kept where it is set; settings without it are written as before there was one."""
    assert "dense_below" not in SparQConfig().to_dict()
    assert SparQConfig(dense_below=0).to_dict()["dense_below"] == 0
    with pytest.raises(ValueError, match="dense_below must be an integer >= 0, got -1"):
        SparQConfig(dense_below=-1)
    ids = prompt(1, 20)
    dense = generate(build("llama", "flash"), ids)
    # 24 positions, 2 KV heads, keys and values of 8 float64.
    everything = SparQConfig(rank=3, top_k=5, local_window=2, dense_below=27 * 2 * 2 * 8 * 8)
    same(generate(build("llama", "sparq", everything), ids), dense)
    later = SparQConfig(rank=3, top_k=5, local_window=2, dense_below=24 * 2 * 2 * 8 * 8)
    found = generate(build("llama", "sparq", later), ids)[1]
    torch.testing.assert_close(found[:, :4], dense[1][:, :4], rtol=1e-4, atol=1e-4)
    assert (found[:, 4] - dense[1][:, 4]).abs().max() > 1e-3
