"""What conversion to fewer key/value heads does to a tiny model of every decoder architecture.

    python tests/convert/gqa_families.py  # writes eval/results/gqa_families.md

For each architecture that makes a causal language model, or a model of images and text: is a
model whose key/value heads are equal within each group the same model afterwards, does it come
back from its folder, does it generate; and under `method="aligned"`, is a model whose equal heads
are scattered over the layer and turned in ways that the architecture cannot notice the same model
afterwards. Or it is refused, and the table says why.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as tests/conftest.py does

from families.odd import OVERRIDES
from families.shrink import ORDINARY, few_layers, tiny_config
from transformers.models.auto import modeling_auto

from hf_attn_plugin.convert import to_gqa
from hf_attn_plugin.convert.gqa_layers import Conversion
from hf_attn_plugin.convert.gqa_plan import head_counts
from hf_attn_plugin.convert.gqa_structure import AlignedLayer

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
# Attention that the sweep runs them with, where it is not eager.
ATTENTION = {"unlimited_ocr": "sdpa"}  # its eager function does not repeat key/value heads
TOLERANCE = 2e-5  # of the logits' norm: models compute norms and RoPE in float32
_LARGEST = 30_000_000


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        mean: "equal", or why it was refused.
        aligned: "equal", "equal (keys averaged)", or why it was refused.
        error: What went wrong, if anything did; a defect of ours.
        unbuilt: Why no tiny model of it could be run before the conversion.
    """

    mean: str = ""
    aligned: str = ""
    error: str = ""
    unbuilt: str = ""


def model_types() -> list[str]:
    """Every architecture that the sweep covers."""
    return sorted(
        {name for m in MAPPINGS for name in getattr(modeling_auto, f"MODEL_FOR_{m}_MAPPING_NAMES")}
    )


def outcome(model_type: str) -> Outcome:
    """Convert tiny models of one architecture."""
    refusals: list[str] = []
    try:
        made = _make(model_type, refusals)
    except Exception as error:  # whatever a config or a model raises by itself
        return Outcome(unbuilt=_one_line(error))
    if made is None:
        return Outcome(mean=refusals[-1])
    model, ids, heads = made
    try:
        _check_mean(copy.deepcopy(model), ids, heads)
    except Exception as error:
        return Outcome(error=f"mean: {_one_line(error)}")
    try:
        conversion = Conversion(type(model), model.config, heads, "aligned")
    except ValueError as error:
        return Outcome("equal", str(error))
    try:
        _check_aligned(model, conversion, ids, heads)
    except Exception as error:
        return Outcome("equal", error=f"aligned: {_one_line(error)}")
    keys = "" if conversion.layers_with_turned_keys else " (keys averaged)"
    return Outcome("equal", f"equal{keys}")


def _make(model_type: str, refusals: list[str]) -> tuple[Any, Tensor, int] | None:
    """A model that runs, or None where the conversion refuses it from its config."""
    overrides = OVERRIDES.get(model_type, {})
    failure: Exception | None = None
    makers: list[Callable[[], Any]] = [
        # As many as query heads, and some as many more than others.
        lambda: tiny_config(model_type, overrides, kv_heads=4),
        lambda: tiny_config(model_type, overrides, kv_heads=2),
        lambda: few_layers(model_type, overrides),
    ]
    for maker in makers:
        try:
            config = maker()
            cls = _model_class(model_type, config)
            try:
                heads = 2 if max(head_counts(config)) > 2 else 1
                Conversion(cls, config, heads)
            except ValueError as error:
                refusals.append(str(error))
                raise
            if not Conversion(cls, config, heads).plan.layers:
                refusals.append(f"{model_type} has but {heads} key/value head")
                raise ValueError(refusals[-1])
            model = _random_model(cls, config)
            ids = torch.randint(3, ORDINARY, (2, 9), generator=torch.Generator().manual_seed(1))
            _logits(model, ids)
            return model, ids, heads
        except Exception as error:
            failure = error
    if refusals:
        return None
    assert failure is not None
    raise failure


def _model_class(model_type: str, config: Any) -> Any:
    for mapping in MAPPINGS:
        if model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            return getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING")[type(config)]
    raise AssertionError(model_type)


def _attention(config: Any) -> str:
    return ATTENTION.get(config.model_type, "eager")


def _random_model(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
    if size > _LARGEST:
        raise RuntimeError(f"{size} parameters are not tiny")
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=_attention(config)).eval()
    model.set_experts_implementation("eager")  # the default knows no float64
    for parameter in model.parameters():
        # Biases, norms and sinks that are all 0 or 1 would hide a wrong order.
        if parameter.ndim <= 1 or parameter.std() == 0:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    if not torch.isfinite(logits).all():
        raise RuntimeError("the logits are not finite")
    return logits.where(logits.abs() < 1e30, 0)  # Chameleon forbids tokens by the lowest number


def _check_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise AssertionError(f"{what}: the logits differ by {error:.2g}")


def _check_mean(model: Any, ids: Tensor, heads: int) -> None:
    plan = Conversion(type(model), model.config, heads).plan
    untouched = _logits(model, ids)
    for name, rows in plan.rows.items():
        for run in rows:
            groups = (
                model.get_parameter(name)
                .data[run.start : run.stop]
                .unflatten(0, (run.new_heads, run.heads // run.new_heads, run.head_dim))
            )
            groups[:] = groups[:, :1].clone()
    before = _logits(model, ids)
    if float((before - untouched).norm() / before.norm()) < 1e-4:
        raise AssertionError("the logits do not depend on the heads that are pooled")
    works = _comes_back(model, ids)
    to_gqa(model, heads)
    _check_equal(_logits(model, ids), before, "pooled")
    if works and not _comes_back(model, ids):
        raise AssertionError("it does not come back from its folder, or does not generate")


def _comes_back(model: Any, ids: Tensor) -> bool:
    """Whether a model is itself after saving and loading, and generates."""
    model = copy.deepcopy(model).float()
    kept = _logits(model, ids)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            attention = _attention(model.config)
            loaded = type(model).from_pretrained(folder, attn_implementation=attention).eval()
            loaded.set_experts_implementation("eager")
            _check_equal(_logits(loaded, ids), kept, "reloaded")
            if loaded.can_generate():
                loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    except Exception:  # whatever transformers raises
        return False
    return True


def _check_aligned(model: Any, conversion: Conversion, ids: Tensor, heads: int) -> None:
    for name, rows in conversion.plan.rows.items():
        for run in rows:  # head h of the first n' is repeated at h + n', h + 2n', ...
            groups = (
                model.get_parameter(name)
                .data[run.start : run.stop]
                .unflatten(0, (run.heads // run.new_heads, run.new_heads, run.head_dim))
            )
            groups[:] = groups[:1].clone()
    before = _logits(model, ids)
    generator = torch.Generator().manual_seed(2)
    for layer in conversion._aligned.values():
        _turn_at_random(model, layer, generator)
    _check_equal(_logits(model, ids), before, "turned")
    to_gqa(model, heads, "aligned")
    _check_equal(_logits(model, ids), before, "aligned")


def _turn_at_random(model: Any, layer: AlignedLayer, generator: torch.Generator) -> None:
    """Change every head in ways that the layer's output does not show."""
    plan, planes = layer.plan, layer.planes
    assert plan.values is not None
    share = layer.query_heads // plan.heads

    def rows(name: str, start: int, count: int, dim: int) -> list[Tensor]:
        """Views of weight and bias, head by head."""
        bias = name.removesuffix("weight") + "bias"
        return [
            model.get_parameter(n).data[start : start + count * dim].unflatten(0, (count, dim))
            for n in (name, bias)
            if n in layer.names
        ]

    queries = rows(*layer.query, layer.query_heads, plan.key_dim)
    keys = rows(plan.keys[0], plan.keys[1].start, plan.heads, plan.key_dim)
    values = rows(plan.values[0], plan.values[1].start, plan.heads, plan.value_dim)
    output = model.get_parameter(layer.output).data.unflatten(
        1, (layer.query_heads, plan.value_dim)
    )

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for head in range(plan.heads):
        own = range(head * share, (head + 1) * share)
        mix = torch.eye(plan.value_dim) + 0.3 * randn(plan.value_dim, plan.value_dim)
        for value in values:
            value[head] = mix @ value[head]
        for query in own:
            output[:, query] = output[:, query] @ mix.inverse()
        if planes is None:
            continue
        factor = torch.complex(randn(len(planes.first)), randn(len(planes.first))) + 0.5
        for part, heads, by in ((keys, [head], factor), (queries, own, 1 / factor.conj())):
            for tensor in part:
                for h in heads:
                    turned = torch.complex(tensor[h, planes.first], tensor[h, planes.second])
                    turned *= by if turned.ndim == 1 else by[:, None]
                    tensor[h, planes.first], tensor[h, planes.second] = turned.real, turned.imag
        if len(planes.rest):
            mix = torch.eye(len(planes.rest)) + 0.3 * randn(len(planes.rest), len(planes.rest))
            for part, heads, by in ((keys, [head], mix), (queries, own, mix.inverse().mT)):
                for tensor in part:
                    for h in heads:
                        tensor[h, planes.rest] = by @ tensor[h, planes.rest]


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:159] + "…"


def _table(outcomes: dict[str, Outcome]) -> str:
    def short(text: str) -> str:
        text = text.split(": supported are")[0].replace("|", "\\|")
        text = text.removesuffix(
            ", so its heads cannot be turned without changing the model: use method='mean'"
        )
        return text.partition(", because ")[2] or text if "cannot convert" in text else text

    counts = {
        "converted": sum(o.mean == "equal" and not o.error for o in outcomes.values()),
        "of them also by aligned": sum(o.aligned.startswith("equal") for o in outcomes.values()),
        "refused": sum(bool(o.mean) and o.mean != "equal" for o in outcomes.values()),
        "no tiny model": sum(bool(o.unbuilt) for o in outcomes.values()),
        "wrong": sum(bool(o.error) for o in outcomes.values()),
    }
    lines = [
        "<!-- Written by `python tests/convert/gqa_families.py`. -->",
        "",
        f"Conversion to fewer key/value heads, transformers {transformers.__version__}: "
        + ", ".join(f"{name} {count}" for name, count in counts.items())
        + ".",
        "",
        "Equal: a model whose heads are equal within each group is the same model afterwards.",
        "",
        "| architecture | mean, first, random | aligned |",
        "|---|---|---|",
    ]
    for name, o in outcomes.items():
        if o.error or o.unbuilt:
            lines.append(f"| {name} | {'WRONG' if o.error else 'no tiny model'}: "
                         f"{short(o.error or o.unbuilt)} | |")  # fmt: skip
        elif o.mean == "equal":
            aligned = o.aligned if o.aligned.startswith("equal") else f"refused: {short(o.aligned)}"
            lines.append(f"| {name} | equal | {aligned} |")
        else:
            lines.append(f"| {name} | refused: {short(o.mean)} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the whole sweep and write its table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = sys.argv[1:] or model_types()
    outcomes = {}
    for name in names:
        outcomes[name] = outcome(name)
        o = outcomes[name]
        print(f"{name:28} {o.error or o.unbuilt or o.mean + ' | ' + o.aligned}"[:200], flush=True)
    if not sys.argv[1:]:
        target = Path(__file__).parents[2] / "eval" / "results" / "gqa_families.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_table(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
