"""``sparq`` in models by its kernels, without a GPU: through Triton's interpreter.

That must be chosen before Triton is imported: `test_through_the_interpreter` runs this file again,
in a process of its own. What only a GPU shows is in ``test_sparq_gpu.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import CompileConfig

import hf_attn_plugin
import hf_attn_plugin.methods.sparq as method
from hf_attn_plugin import SparQConfig
from hf_attn_plugin.integrations import sparq_cache, sparq_static_cache
from hf_attn_plugin.ops.sparq_backend import SparQBackend, SparQChoice
from tests.methods.sparq_models import build, padded_prompt, same

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(not INTERPRETED, reason="run by test_through_the_interpreter")
STEPS, LAYERS = 2, 2


@pytest.mark.skipif(
    torch.cuda.is_available() or INTERPRETED, reason="the tests below, or those of a GPU, run here"
)
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def by_kernels(monkeypatch):
    """From now on kernels store tokens and take the steps."""
    choice = SparQChoice(SparQBackend.TRITON, "told to")
    monkeypatch.setattr(method, "choose_sparq_backend", lambda call: choice)
    for module in (sparq_cache, sparq_static_cache):
        monkeypatch.setattr(module, "stored_by_kernel", lambda keys, values: True)


def made(**options):
    parameters = SparQConfig(rank=3, top_k=5, local_window=2, **options)
    return build("llama", "sparq", parameters, dtype=torch.float32)


def generate(model, **options):
    """One row is padded on the left; another has a hole, as right-padded prompts get one."""
    ids, mask = padded_prompt()
    mask[0, 14:] = 0
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS + 1, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, dim=1)


@in_kernel
def test_the_same_tokens_and_bytes_as_gathers_in_pytorch(monkeypatch):
    model = made(mean_value_reallocation=True)
    with hf_attn_plugin.count_reads(model) as expected:
        tokens = generate(model)
    by_kernels(monkeypatch)
    with hf_attn_plugin.count_reads(model) as found:
        same(generate(model), tokens)
    assert found.kv_bytes_dense == expected.kv_bytes_dense
    # In PyTorch all rows are read alike; kernels leave out what a row does not see.
    hidden = STEPS * LAYERS * (3 + 3 + 9) * 2 * 3 * 4  # positions, KV heads, components, bytes
    assert found.kv_bytes_read == expected.kv_bytes_read - hidden


@in_kernel
def test_compiled_over_a_static_cache(monkeypatch):
    """As transformers does it: traced in one graph, once, and the mask made outside of it."""
    model = made(key_copy="int8")
    expected = generate(model, cache_implementation="static")
    by_kernels(monkeypatch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True
    got = generate(model, cache_implementation="static", compile_config=how)
    same(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
