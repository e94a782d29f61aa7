"""``sparq`` on a GPU: its kernels in models, over growing and fixed caches, compiled, captured."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_attn_plugin
import hf_attn_plugin.methods.sparq as method
from hf_attn_plugin import SparQConfig
from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.ops.sparq_backend import SparQBackend, SparQChoice, choose_sparq_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTH, NEW = 400, 12
VARIANTS = {
    "two copies": {},
    "8 bits": {"key_copy": "int8"},
    "4 bits": {"key_copy": "int4"},
    "one copy": {"key_copy": "none"},
    "mean value": {"mean_value_reallocation": True},
    "coverage": {"coverage": 0.7, "rank_coverage": 0.8},
}
SOME = ["two copies", "8 bits", "mean value"]
STATIC = {"cache_implementation": "static"}


def few(**options) -> SparQConfig:
    return SparQConfig(rank=16, top_k=32, **{"dense_below": 0, **options})


def build(parameters=None, *, layers=2, kv_heads=2, dtype=torch.float32, attn="sparq"):
    """Weights large enough for attention to be far from uniform."""
    config = LlamaConfig(
        vocab_size=301, hidden_size=256, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=64, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attn, dtype=dtype)
    if parameters is not None:
        hf_attn_plugin.configure(model, parameters)
    return model.eval().cuda()


def prompts(batch=2, length=LENGTH, padding=()):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 301, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(padding):
        mask[row, :pads] = 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def make_cache(model, kind, room=NEW):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=LENGTH + room)


def decode(model, inputs, cache, steps=NEW):
    """Logits of a prompt's last token, and of tokens that follow it whatever the model says."""
    tokens = prompts(len(inputs["input_ids"]), steps)["input_ids"]
    mask, logits = inputs["attention_mask"], []
    ids = inputs["input_ids"]
    with torch.no_grad():
        for step in range(steps):
            output = model(
                ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1]
            logits.append(output.clone())
            ids = tokens[:, step : step + 1]
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
    return torch.stack(logits, dim=1)


def generate(model, inputs, **options):
    output = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[0],
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return torch.stack(output.logits, dim=1)


def in_torch(monkeypatch, run, *args, **options):
    """The same, by PyTorch's gathers."""
    choice = SparQChoice(SparQBackend.TORCH, "told to")
    with monkeypatch.context() as patch:
        patch.setattr(method, "choose_sparq_backend", lambda call: choice)
        return run(*args, **options)


def apart(got, expected):
    """Relative distance of logits, per row and step."""
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


def same(got, expected):
    """Equal up to rounding, which may exchange two keys of nearly equal mass now and then.

    That shows a little in all steps after it.
    """
    distance = apart(got, expected)
    assert distance.median() < 1e-3, distance
    assert distance.max() < 0.05, distance


@pytest.fixture
def chosen(monkeypatch):
    """The backends that decoding steps were given."""
    found = []

    def choose(call):
        found.append(choose_sparq_backend(call))
        return found[-1]

    monkeypatch.setattr(method, "choose_sparq_backend", choose)
    return found


@pytest.mark.parametrize(
    ("name", "cache", "kv_heads"),
    [
        *((name, "dynamic", 2) for name in VARIANTS),
        *((name, "static", 2) for name in SOME),
        ("two copies", "dynamic", 4),
    ],
)
def test_the_same_as_gathers_in_pytorch(monkeypatch, chosen, name, cache, kv_heads):
    model = build(few(**VARIANTS[name]), kv_heads=kv_heads)
    inputs = prompts(padding=(0, 130))
    expected = in_torch(monkeypatch, decode, model, inputs, make_cache(model, cache))
    got = decode(model, inputs, make_cache(model, cache))
    assert {choice.backend for choice in chosen} == {SparQBackend.TRITON}
    same(got, expected)
    model.set_attn_implementation("flash")
    dense = decode(model, inputs, make_cache(model, cache))
    assert apart(dense, got)[:, 1:].max() > 0.1, "so few keys must show"


def test_right_padding_leaves_a_hole_that_is_not_seen(monkeypatch, chosen):
    model, inputs = build(few(mean_value_reallocation=True)), prompts()
    whole = decode(model, inputs, make_cache(model, "dynamic"))
    inputs["attention_mask"][1, 300:] = 0
    expected = in_torch(monkeypatch, decode, model, inputs, make_cache(model, "dynamic"))
    same(decode(model, inputs, make_cache(model, "dynamic")), expected)
    assert {choice.backend for choice in chosen} == {SparQBackend.TRITON}
    assert apart(whole, expected)[1].max() > 0.1


@pytest.mark.parametrize(
    "strategy", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"]
)
def test_reordered_and_cropped_caches(monkeypatch, strategy):
    model, inputs = build(few(mean_value_reallocation=True)), prompts(batch=1)
    options = {**inputs, "max_new_tokens": NEW, "do_sample": False, **strategy}
    expected = in_torch(monkeypatch, model.generate, **options)
    torch.testing.assert_close(model.generate(**options), expected, rtol=0, atol=0)


def test_offloaded_cache():
    model, inputs = build(few(), layers=3), prompts()
    expected = decode(model, inputs, make_cache(model, "dynamic"))
    same(decode(model, inputs, DynamicCache(config=model.config, offloading=True)), expected)


@pytest.mark.parametrize(
    ("name", "padding"), [("two copies", ()), ("8 bits", ()), ("mean value", (0, 130))]
)
def test_compiled_by_generate(name, padding):
    """As transformers does it by itself, with CUDA graphs; a graph break would be an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = build(few(**VARIANTS[name])), prompts(padding=padding)
    expected = generate(model, inputs, disable_compile=True, **STATIC)
    got = generate(model, inputs, compile_config=CompileConfig(fullgraph=True), **STATIC)
    same(got, expected)
    counters = torch._dynamo.utils.counters
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", [*SOME, "4 bits"])
def test_a_captured_step_goes_on_as_the_cache_fills(name):
    """One CUDA graph of a decoding step, captured once and replayed for every further token."""
    steps = 2 * 128  # over the end of a quantised group, and another
    model, inputs = build(few(**VARIANTS[name])), prompts()
    expected = decode(model, inputs, make_cache(model, "dynamic"), steps)
    cache = make_cache(model, "static", room=steps)
    tokens = prompts(2, steps)["input_ids"]
    logits = []
    with torch.no_grad():
        logits.append(
            model(inputs["input_ids"], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        )
        held = tokens[:, :1].clone()
        model(held, past_key_values=cache)  # compiles the kernels, and takes a place
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            following = model(held, past_key_values=cache).logits[:, -1]
        for step in range(steps - 1):
            held.copy_(tokens[:, step : step + 1])
            graph.replay()
            logits.append(following.clone())
    same(torch.stack(logits, dim=1), expected)
    assert int(cache.layers[0].cumulative_length) == LENGTH + steps - 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*SOME, "coverage"])
def test_a_decoding_step_waits_for_nothing(name, cache):
    model, inputs = build(few(**VARIANTS[name])), prompts()
    held, token = make_cache(model, cache), inputs["input_ids"][:, :1]
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=held)
        for _ in range(2):
            model(token, past_key_values=held)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                token = model(token, past_key_values=held).logits.argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_cache_is_not_copied_as_it_grows():
    layer = SparQLayer()
    states = [torch.randn(1, 8, 20000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    one = [tensor[:, :, :1].clone() for tensor in states]
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer.update(*states)
        held = torch.cuda.memory_allocated() - before
        # Three copies of the prompt with at most 4096 places to spare, and never more than that.
        room = 3 * 8 * 128 * 2 * (20000 + 4096 + 64)
        assert held <= room * 1.05  # the allocator rounds up
        assert torch.cuda.max_memory_allocated() - before <= held * 1.01
        address = layer.update(*one)[0].data_ptr()
        allocated = torch.cuda.memory_allocated()
        for _ in range(1000):
            keys, _ = layer.update(*one)
        assert keys.data_ptr() == address
        assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_quantising_a_prompt_takes_little_memory(kind, static):
    from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer

    length = 65536
    layer = SparQStaticLayer(kind, length + 128) if static else SparQLayer(kind)
    states = [torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer.update(*states)
        held = torch.cuda.memory_allocated() - before
        assert torch.cuda.max_memory_allocated() - before <= 1.35 * held


def test_short_caches_are_read_whole_and_it_is_said(chosen, caplog):
    method._say.cache_clear()
    model, inputs = build(few(dense_below=None)), prompts()
    with caplog.at_level(logging.WARNING):
        got = decode(model, inputs, make_cache(model, "dynamic"))
    assert {choice.backend for choice in chosen} == {SparQBackend.DENSE}
    model.set_attn_implementation("flash")
    same(got, decode(model, inputs, make_cache(model, "dynamic")))
    assert sum("dense_below" in record.message for record in caplog.records) == 1
