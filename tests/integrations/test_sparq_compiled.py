"""What CUDA graphs need of a compiled step over ``sparq``'s static cache, without a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import hf_attn_plugin.methods.sparq as method
from hf_attn_plugin import SparQConfig
from hf_attn_plugin.integrations import sparq_static_cache
from hf_attn_plugin.ops.sparq_backend import SparQBackend, SparQChoice
from tests.methods.sparq_models import build, prompt

# The arguments that each operation writes.
WRITTEN = {"sparq_append": range(2, 9), "sparq_add_value": (1, 2, 6), "add_": (0,)}


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({}, 4),  # keys, values, their length, the copy
        ({"key_copy": "none"}, 3),
        ({"mean_value_reallocation": True}, 7),  # sums, their number, how far they are counted
        ({"key_copy": "int8"}, 8),  # codes, scale, offset, the tail and its place
    ],
    ids=str,
)
def test_everything_a_step_writes_stays_where_it_is(monkeypatch, options, tensors):
    """Inductor captures no graph that writes to an input whose address may change."""
    choice = SparQChoice(SparQBackend.TRITON, "told to")
    monkeypatch.setattr(method, "choose_sparq_backend", lambda call: choice)
    monkeypatch.setattr(sparq_static_cache, "stored_by_kernel", lambda keys, values: True)
    found = []

    def examine(graph, inputs):
        for node in graph.graph.nodes:
            name = str(getattr(node.target, "_opname", node.target)).split(".")[-1]
            for argument in (node.args[i] for i in WRITTEN.get(name, ()) if node.args[i]):
                told = argument.meta.get("tensor_dict", {})
                found.append((name, told.get("_dynamo_static_input_type")))
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        examples = [result.meta["example_value"] for result in results]
        return lambda *args: [torch.zeros(e.shape, dtype=e.dtype) for e in examples]

    how = CompileConfig(backend=examine, mode=None, fullgraph=True)
    how._compile_all_devices = True
    torch._dynamo.reset()
    model = build("llama", "sparq", SparQConfig(rank=3, top_k=5, **options), dtype=torch.float32)
    model.generate(
        prompt(), max_new_tokens=3, do_sample=False, cache_implementation="static",
        compile_config=how,
    )  # fmt: skip
    assert len(found) == 2 * tensors, "per layer"
    assert {kind for _, kind in found} <= {"guarded", "unguarded"}, found


@torch.no_grad()
def test_short_caches_of_any_length_are_read_whole():
    """The choice is made while a graph is traced for a length that is a symbol there."""
    torch._dynamo.reset()
    dense = build("llama", "flash", None, dtype=torch.float32)
    model = build("llama", "sparq", SparQConfig(top_k=3, dense_below=2**30), dtype=torch.float32)
    step = torch.compile(model, backend="eager", dynamic=True)
    caches = [DynamicCache(config=each.config) for each in (model, dense)]
    for token in (prompt(), *torch.arange(6).view(3, 2, 1)):
        run = model if token.shape[1] > 1 else step
        found = run(token, past_key_values=caches[0]).logits
        wanted = dense(token, past_key_values=caches[1]).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
