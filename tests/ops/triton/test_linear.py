"""Linear attention's kernels against the quadratic definition in float64.

On a GPU as they are; without one through Triton's interpreter, which must be chosen before Triton
is imported: `test_through_the_interpreter` runs this file again, in a process of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugin.ops.linear import linear_attention, reference_linear_attention
from hf_attn_plugin.ops.linear_backend import (
    LinearBackend,
    LinearCall,
    choose_linear_backend,
)
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.patterns import Pattern

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="run by test_through_the_interpreter"
)
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # interpreted, bfloat16 is off
MAPS: dict[str, FeatureMap] = {"elu": EluFeatures(), "favor": FavorFeatures(num_features=25)}
maps = pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS)
LENGTH, CHUNK = 70, 32


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run here")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def inputs(
    q_len: int = LENGTH,
    kv_len: int = LENGTH,
    dtype: torch.dtype = torch.float32,
    dims: tuple[int, int] = (20, 18),
    batch: int = 2,
    heads: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """Query, key and value, tokens before heads as models have them."""
    torch.manual_seed(q_len + kv_len)
    shapes = [
        (batch, q_len, heads[0], dims[0]),
        (batch, kv_len, heads[1], dims[0]),
        (batch, kv_len, heads[1], dims[1]),
    ]
    return [
        torch.randn(shape).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for shape in shapes
    ]


def documents(starts: list[list[int]], length: int = LENGTH) -> dict[str, Tensor]:
    """A new document starts at each of ``starts``, for each row of the batch."""
    numbers = torch.zeros(len(starts), length, dtype=torch.int64)
    for row, places in enumerate(starts):
        for place in places:
            numbers[row, place:] += 1
    return {"q_documents": numbers.to(DEVICE), "kv_documents": numbers.to(DEVICE)}


def padding(left: int, right: int, length: int = LENGTH) -> dict[str, Tensor]:
    """The first row lacks tokens on the left, the second on the right."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :left] = False
    valid[1, length - right :] = False
    return {"key_valid": valid.to(DEVICE)}


PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "padding, bidirectional": {"causal": False, **padding(9, 40)},
    "documents, padding": {**padding(9, 5), **documents([[3, 11, 32, 50], [33, 64]])},
    "one row of documents": documents([[10, 31, 60]]),
    "documents, bidirectional": {"causal": False, **documents([[20], [31, 69]])},
}


def triton(tensors: list[Tensor], pattern: Pattern, **options: Any) -> Any:
    options = {"chunk": CHUNK, "backend": LinearBackend.TRITON, **options}
    return linear_attention(*tensors, pattern, **options)


def with_gradients(
    output: Tensor, tensors: list[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    """Output and gradients, in float64."""
    torch.manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float64).to(output)
    results = [output, *torch.autograd.grad(output, tensors, grad, retain_graph)]
    return [t.detach().double() for t in results]


def exact(tensors: list[Tensor], pattern: Pattern, feature_map: FeatureMap) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return with_gradients(reference_linear_attention(*wide, pattern, feature_map=feature_map), wide)


def plain(tensors: list[Tensor], pattern: Pattern, feature_map: FeatureMap) -> list[Tensor]:
    """What one would write in PyTorch, in the inputs' dtype."""
    query, key, value = (t.detach().requires_grad_() for t in tensors)
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5
    phi_q, phi_k = (
        torch.exp(log - log.detach().amax((-1, -2) if per_row else -1, keepdim=True))
        for log, per_row in (
            (feature_map.log(query, scaling), False),
            (feature_map.log(key, scaling), True),
        )
    )
    weights = phi_q @ phi_k.repeat_interleave(groups, 1).transpose(-1, -2)
    weights = weights.masked_fill(~pattern.visible(query.device), 0.0)
    below = weights.sum(-1, keepdim=True)
    output = weights @ value.repeat_interleave(groups, 1) / torch.where(below == 0, 1.0, below)
    return with_gradients(output, [query, key, value])


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def assert_as_good_as_plain(
    found: list[Tensor], tensors: list[Tensor], pattern: Pattern, feature_map: FeatureMap
) -> None:
    """At most twice plain PyTorch's error in the same dtype, and a rounding."""
    truth = exact(tensors, pattern, feature_map)
    dtype = tensors[0].dtype
    # Three TF32 products hold 22 bits of float32's 24.
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    budgets = [
        2 * error(p, t) + floor
        for p, t in zip(plain(tensors, pattern, feature_map), truth, strict=True)
    ]
    # Plain PyTorch's gradients through favor's features overflow in float16.
    worst = max(budget for budget in budgets if math.isfinite(budget))
    budgets = [budget if math.isfinite(budget) else worst for budget in budgets]
    errors = [error(f, t) for f, t in zip(found, truth, strict=True)]
    assert all(e <= b for e, b in zip(errors, budgets, strict=True)), (errors, budgets)


# -- against the definition --------------------------------------------------------------------


@in_kernel
@pytest.mark.parametrize(
    ("features", "name", "chunk"),
    [
        *(("elu", name, 32) for name in PATTERNS),  # a tile is a chunk
        ("elu", "documents, padding", 64),
        ("favor", "bidirectional", 64),
        ("two tiles", "documents, padding", 64),
    ],
)
def test_equals_the_definition(features: str, name: str, chunk: int) -> None:
    feature_map = MAPS.get(features, FavorFeatures(num_features=70))
    pattern = Pattern(q_len=LENGTH, kv_len=LENGTH, **PATTERNS[name])
    grouped = (features, chunk) != ("two tiles", 64) and "padding" in name  # the interpreter's time
    tensors = inputs(heads=(2, 1) if grouped else (1, 1))
    output, _ = triton(tensors, pattern, feature_map=feature_map, chunk=chunk)
    found = with_gradients(output, tensors)
    for one, truth in zip(found, exact(tensors, pattern, feature_map), strict=True):
        assert error(one, truth) < 2e-6
    other = pattern.replace(causal=not pattern.causal)
    assert error(found[0], exact(tensors, other, feature_map)[0]) > 0.1, "the control"


@in_kernel
@maps
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(feature_map: FeatureMap, dtype: torch.dtype) -> None:
    pattern = Pattern(q_len=40, kv_len=40)
    tensors = inputs(40, 40, dtype=dtype, dims=(32, 16), batch=1, heads=(2, 1))
    output, state = triton(tensors, pattern, feature_map=feature_map)
    assert output.dtype == dtype and state.sums.dtype == torch.float32
    found = with_gradients(output, tensors)
    assert_as_good_as_plain(found, tensors, pattern, feature_map)
    found[3] *= 1 + 16 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError):
        assert_as_good_as_plain(found, tensors, pattern, feature_map)


@in_kernel
@pytest.mark.parametrize(
    "q_len, kv_len, offsets",
    [
        (5, 70, {}),
        (1, 33, {}),
        (70, 40, {}),  # the first 30 see nothing
        (40, 70, {"q_offset": 7}),  # a static cache's keys beyond the queries
        (33, 40, {"q_offset": 9, "kv_offset": 20}),  # keys that start later
        (20, 10, {"q_offset": 500}),  # all keys long before
        (10, 20, {"kv_offset": 500, "q_offset": 0}),  # no key yet
    ],
)
def test_queries_at_other_places_than_keys(
    q_len: int, kv_len: int, offsets: dict[str, int]
) -> None:
    pattern = Pattern(q_len=q_len, kv_len=kv_len, **offsets)
    tensors = inputs(q_len, kv_len, batch=1)
    output, _ = triton(tensors, pattern)
    found = with_gradients(output, tensors)
    for one, truth in zip(found, exact(tensors, pattern, EluFeatures()), strict=True):
        assert (one - truth).norm() <= 2e-6 * truth.norm()
    blind = ~pattern.visible(DEVICE).any(-1)[0, 0]
    assert (output[:, :, blind] == 0).all()


@in_kernel
@pytest.mark.parametrize("dims", [(80, 96), (192, 40)], ids=str)
def test_widths_that_fill_no_tile(dims: tuple[int, int]) -> None:
    pattern = Pattern(q_len=34, kv_len=34)
    tensors = inputs(34, 34, dims=dims, batch=1)
    output, _ = triton(tensors, pattern)
    found = with_gradients(output, tensors)
    for one, truth in zip(found, exact(tensors, pattern, EluFeatures()), strict=True):
        assert error(one, truth) < 2e-6


@in_kernel
def test_any_strides() -> None:
    pattern = Pattern(q_len=40, kv_len=40)
    tensors = inputs(40, 40, batch=1, heads=(2, 1))
    output, _ = triton(tensors, pattern)
    grads = torch.autograd.grad(output.sum(), tensors)  # of stride 0
    torch.testing.assert_close(
        grads[2], torch.autograd.grad(triton(tensors, pattern)[0], tensors, grads_like(output))[2]
    )
    spaced = [
        torch.stack([t.detach(), torch.full_like(t, float("nan"))], -1)
        .permute(3, 2, 4, 0, 1)[:, :, 0]
        .permute(2, 3, 1, 0)
        .requires_grad_()
        for t in tensors
    ]
    assert spaced[0].stride() != tensors[0].stride() and spaced[0].stride(-1) != 1
    again, _ = triton(spaced, pattern)
    assert torch.equal(again, output)
    for one, other in zip(torch.autograd.grad(again.sum(), spaced), grads, strict=True):
        assert torch.equal(one, other)


def grads_like(output: Tensor) -> Tensor:
    return torch.ones_like(output)


@in_kernel
@maps
@pytest.mark.parametrize("factor", [0.0, 20.0])
def test_features_of_every_size(feature_map: FeatureMap, factor: float) -> None:
    """Keys of very different sizes, and tokens all of whose features are tiny."""
    pattern = Pattern(q_len=40, kv_len=40)
    tensors = [t.detach() for t in inputs(40, 40, batch=1)]
    for i in range(2):
        tensors[i] = (tensors[i] * factor if factor else tensors[i] - 150).requires_grad_()
    tensors[2].requires_grad_()
    output, _ = triton(tensors, pattern, feature_map=feature_map)
    found = with_gradients(output, tensors)
    same, _ = linear_attention(
        *tensors, pattern, feature_map=feature_map, backend=LinearBackend.TORCH
    )
    plain_float32 = with_gradients(same, tensors)
    for one, other, truth in zip(
        found, plain_float32, exact(tensors, pattern, feature_map), strict=True
    ):
        assert one.isfinite().all()
        # Exponents of several hundred have an error of their own in float32.
        assert error(one, truth) <= 2 * error(other, truth) + 1e-4


# -- states ------------------------------------------------------------------------------------


@in_kernel
@maps
def test_states_carry_on_and_have_gradients(feature_map: FeatureMap) -> None:
    tensors = inputs(40, 40)
    state, parts, start = None, [], 0
    valid = padding(9, 5, 40)["key_valid"]
    for stop in (3, 36, 40):
        rows = slice(start, stop)
        pattern = Pattern(q_len=stop - start, kv_len=stop - start, key_valid=valid[:, rows])
        pieces = [t[:, :, rows] for t in tensors]
        part, state = triton(pieces, pattern, feature_map=feature_map, state=state)
        parts.append(part)
        start = stop
    found = with_gradients(torch.cat(parts, 2), tensors, retain_graph=True)
    whole = Pattern(q_len=40, kv_len=40, key_valid=valid)
    for one, truth in zip(found, exact(tensors, whole, feature_map), strict=True):
        assert error(one, truth) < 2e-6
    assert state is not None
    _, expected = linear_attention(*tensors, whole, feature_map=feature_map, chunk=64)
    assert expected is not None
    torch.testing.assert_close(state.log_scale, expected.log_scale)
    torch.testing.assert_close(state.sums, expected.sums, rtol=1e-5, atol=1e-6)
    # A loss on the last state alone.
    own = torch.autograd.grad(state.sums.sum(), tensors)
    other = torch.autograd.grad(expected.sums.sum(), tensors)
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@in_kernel
def test_the_state_after_documents_is_that_of_the_last() -> None:
    tensors = inputs()
    pattern = Pattern(q_len=LENGTH, kv_len=LENGTH, **documents([[40], [70]]))
    state = triton(tensors, pattern)[1]
    alone = [t[:1, :, 40:] for t in tensors]
    wanted = triton(alone, Pattern(q_len=30, kv_len=30))[1]
    torch.testing.assert_close(state.sums[:1], wanted.sums)
    # A state that is passed in belongs to the first document.
    output, _ = triton(tensors, pattern, state=state)
    fresh, _ = triton(tensors, pattern)
    changed = (output != fresh).any(-1).any(1)
    assert changed[0, :40].all() and not changed[0, 40:].any() and changed[1].all()


@in_kernel
def test_a_row_of_padding_alone() -> None:
    tensors = inputs()
    pattern = Pattern(q_len=LENGTH, kv_len=LENGTH, **padding(LENGTH, 1))
    output, state = triton(tensors, pattern)
    grads = torch.autograd.grad(output.sum() + state.sums.sum(), tensors)
    assert (output[0] == 0).all()
    assert all((g[0] == 0).all() and g.isfinite().all() for g in grads)
    assert (state.sums[0] == 0).all() and state.log_scale[0].isneginf().all()


# -- as an operator ----------------------------------------------------------------------------


@in_kernel
@pytest.mark.parametrize("fields", [[], [17, 0, 0, 0]], ids=["elu", "favor"])
def test_opcheck(fields: list[int]) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    from hf_attn_plugin.ops.triton.linear import linear_attention_forward

    query, key, value = inputs(20, 20, dims=(16, 12), batch=1)
    sums = torch.zeros(1, 1, fields[0] if fields else 16, 13, device=DEVICE, requires_grad=True)
    log_scale = torch.full((1, 1), float("-inf"), device=DEVICE)
    masks = (torch.ones(1, 20, dtype=torch.bool, device=DEVICE), None, None)
    torch.library.opcheck(
        linear_attention_forward,
        (query, key, value, sums, log_scale, *masks, fields, 0, 0.25, CHUNK),
        test_utils=tests if fields else [*tests, "test_aot_dispatch_dynamic"],
    )


@in_kernel
def test_compile_traces_through() -> None:
    def layer(*tensors: Tensor) -> Tensor:
        length = tensors[0].shape[2]
        return triton(list(tensors), Pattern(q_len=length, kv_len=length))[0]

    tensors = inputs(40, 40, batch=1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = with_gradients(compiled(*tensors), tensors)
    for one, other in zip(found, with_gradients(layer(*tensors), tensors), strict=True):
        assert torch.equal(one, other)


@in_kernel
def test_misuse_is_named() -> None:
    tensors = inputs(4, 4)
    pattern = Pattern(q_len=4, kv_len=4)
    with pytest.raises(ValueError, match="scaling > 0"):
        triton(tensors, pattern, feature_map="favor", scaling=0.0)
    with pytest.raises(ValueError, match=r"the inputs are torch.float64"):
        triton([t.double() for t in tensors], pattern)
    with pytest.raises(ValueError, match="head_dim up to 256"):
        triton([*inputs(4, 4, dims=(257, 8))], pattern)


# -- the choice --------------------------------------------------------------------------------

CALL: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "device_type": "cuda",
    "capability": (9, 0),
    "installed": frozenset({"triton"}),
    "head_dim": 128,
    "value_dim": 128,
}


def test_a_gpu_gets_triton() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        choice = choose_linear_backend(LinearCall(**{**CALL, "dtype": dtype}))
        assert choice.backend is LinearBackend.TRITON and not choice.falls_back


@pytest.mark.parametrize(
    ("change", "reason", "falls_back"),
    [
        ({"device_type": "cpu", "capability": None}, "this is cpu", False),
        ({"dtype": torch.float64}, "float64", False),
        ({"installed": frozenset()}, "pip install triton", True),
        ({"capability": (7, 5)}, "8.0", True),
        ({"capability": None}, "NVIDIA", True),
        ({"head_dim": 512}, "head_dim up to 256, this is 512", True),
        ({"value_dim": 512}, "value_dim up to 256", True),
        ({"empty": True}, "nothing to attend to", False),
    ],
)
def test_what_gets_pytorch_and_why(change: dict[str, Any], reason: str, falls_back: bool) -> None:
    choice = choose_linear_backend(LinearCall(**{**CALL, **change}))
    assert choice.backend is LinearBackend.TORCH
    assert reason in choice.reason
    assert choice.falls_back is falls_back


def test_a_cpu_computes_in_pytorch() -> None:
    tensors = [t.detach().cpu() for t in inputs(5, 5)]
    pattern = Pattern(q_len=5, kv_len=5)
    output, _ = linear_attention(*tensors, pattern)
    same, _ = linear_attention(*tensors, pattern, backend=LinearBackend.TORCH)
    assert torch.equal(output, same)
    if not INTERPRETED:
        with pytest.raises(ValueError, match="need a GPU"):
            linear_attention(*tensors, pattern, backend=LinearBackend.TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lengths_do_not_change_tiles(dtype: torch.dtype) -> None:
    """Every constant of a kernel is one more compilation."""
    from hf_attn_plugin.ops.triton.linear_layout import lay_out

    tiles = [lay_out(dtype, n, n, 128, 128, 0).tiles for n in (1, 100, 4096, 1 << 22)]
    assert all(t == tiles[0] for t in tiles)
