"""The same promises on a GPU: devices, half precision, compiled static caches, long windows."""

import copy

import pytest
import torch
from tiny import DECODERS, Float64, padding_mask, random_ids, tiny_model, twin

import hf_attn_plugin
from hf_attn_plugin import SlidingWindowConfig, SparQConfig, configure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def left_padded(length: int = 24) -> dict[str, torch.Tensor]:
    mask = padding_mask(length, [0, 7], "left")
    return {"input_ids": random_ids(2, length).cuda(), "attention_mask": mask.cuda()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", list(DECODERS))
def test_flash_equals_eager(family: str, dtype: torch.dtype) -> None:
    eager = tiny_model(family)
    ids, mask = random_ids(2, 24), padding_mask(24, [0, 7], "left")
    with torch.no_grad(), Float64():
        exact = copy.deepcopy(eager).double()(ids, attention_mask=mask).logits[mask.bool()]
    eager, ids, mask = eager.cuda().to(dtype), ids.cuda(), mask.cuda()
    with torch.no_grad():
        plain = eager(ids, attention_mask=mask).logits[mask.bool()].cpu().double()
        ours = twin(eager, "flash")(ids, attention_mask=mask).logits[mask.bool()].cpu().double()
    floor = 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["flash", "sliding_window", "longformer", "strided", "sparq"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_generation_equals_eager(family: str, name: str, cache: str) -> None:
    """Windows and k beyond the sequence leave the tokens as they are; static caches compile."""
    eager = configure(tiny_model(family), SlidingWindowConfig(window=4096)).cuda()
    inputs = left_padded()
    options = {"max_new_tokens": 8, "do_sample": False}
    want = eager.generate(**inputs, **options)
    ours = twin(eager, name)
    if cache == "static":
        options["cache_implementation"] = "static"
    assert torch.equal(ours.generate(**inputs, **options), want)


def test_sparq_reads_less() -> None:
    model = configure(tiny_model("llama"), SparQConfig(rank=2, top_k=8)).cuda().bfloat16()
    model.set_attn_implementation("sparq")
    with hf_attn_plugin.count_reads(model) as reads:
        model.generate(random_ids(2, 100).cuda(), max_new_tokens=8, do_sample=False)
    assert 0 < reads.kv_bytes_read < 0.3 * reads.kv_bytes_dense


def test_long_window_trains() -> None:
    model = configure(tiny_model("llama"), SlidingWindowConfig(window=256)).cuda().bfloat16()
    model.set_attn_implementation("sliding_window")
    model.train()
    ids = random_ids(1, 16384).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hidden = model.model(ids, use_cache=False).last_hidden_state
    hidden.float().square().mean().backward()
    # One head's scores alone would take 16384² * 2 bytes = 0.5 GB, eight matrices in all 4.3 GB.
    assert torch.cuda.max_memory_allocated() - before < 0.6e9
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
