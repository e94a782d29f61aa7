"""What SparQ's settings cost in quality, for the tables that say how fast they are.

Scores of a model that has learnt something are read from what `hf-attn sweep` measured. Errors of
the attention itself are measured here, on queries, keys and values of a model that reads real text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.integrations.attention_calls import InterfaceCall, intercept_attention
from hf_attn_plugin.lm_eval.sweep import fingerprint
from hf_attn_plugin.lm_eval.sweep_report import TaskSweep, read_sweep
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern

from .decoding import HEAD_DIM
from .sparq_decoding import make_copy, torch_step
from .sparq_numerics import Setting

SCORES = Path("eval/results/sweep/lab/results.json")
ERRORS = "sparq_errors.json"
SCORED_HEAD_DIM = 64
"""Of the models of `eval/lab.py`, whose scores are read."""

_DEFAULTS = {"local_window": None, "mean_value_reallocation": False, "mean_block": None}
_WINDOWS, _QUERIES = 4, 8


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a sweep measured, for settings at the benchmark's head_dim.

    A setting stands for the one with the same share of the components and as many keys.

    Attributes:
        path: The file.
        model: Fingerprint of the model's weights.
        sweeps: Per task.
        settings: Those of SparQ that were measured, at the benchmark's head_dim.
    """

    path: Path
    model: str
    sweeps: tuple[TaskSweep, ...]
    settings: tuple[Setting, ...]

    @classmethod
    def read(cls, path: Path) -> Scores:
        """The file that ``hf-attn sweep`` writes.

        Raises:
            ValueError: There is none: no speed is shown without its quality.
        """
        if not path.is_file():
            raise ValueError(
                f"no speed without its quality: {path} does not exist. Pass --scores with the "
                "results.json of hf-attn sweep on a model of eval/lab.py."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = [run for run in content["runs"].values() if run["attn"] == "sparq"]
        found = [_setting(run["parameters"]) for run in runs]
        settings = tuple(setting for setting in found if setting is not None)
        sweeps = tuple(read_sweep(content))
        return cls(path, content["about"]["weights"], sweeps, settings)

    def of(self, setting: Setting) -> dict[str, float | None]:
        """Per task, the share of dense attention's quality that is kept, 0 to 1.

        On a task that the model cannot do, the share of dense attention's answers that come out
        again. None where it was not measured. What is picked out of the keys themselves are the
        same numbers as those in a full copy.
        """
        kind = "full" if setting.key_copy == "none" else setting.key_copy
        rank = setting.rank * SCORED_HEAD_DIM // HEAD_DIM
        label = f"sparq {dataclasses.replace(setting, rank=rank, key_copy=kind).title}"
        found: dict[str, float | None] = {}
        for sweep in self.sweeps:
            points = [point for point in sweep.points if point.label == label]
            found[sweep.task] = sweep.kept(points[0]) if points else None
        return found

    @property
    def titles(self) -> dict[str, str]:
        """Per task, the head of its column."""
        return {
            sweep.task: sweep.task if sweep.doable else f"{sweep.task} (answers as dense)"
            for sweep in self.sweeps
        }


def _setting(parameters: dict[str, Any]) -> Setting | None:
    """The same at the benchmark's head_dim; None where it has parameters that are not timed."""
    if any(parameters[name] != value for name, value in _DEFAULTS.items()):
        return None
    if parameters["rank_coverage"] is not None or parameters["rank"] is None:
        return None
    rank = parameters["rank"] * HEAD_DIM // SCORED_HEAD_DIM
    return Setting(rank, parameters["top_k"], parameters["key_copy"], parameters["coverage"])


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of SparQ's steps against dense attention, on what a model computes from text.

    Attributes:
        model: Where it lay.
        weights: Its fingerprint.
        head_dim: Its heads' width.
        keys: Keys of the longest step.
        steps: Steps that were compared, over all layers.
        errors: By the setting's title at the benchmark's head_dim: ‖difference‖ / ‖dense‖, the
            root of the mean square over steps and heads.
    """

    model: str
    weights: str
    head_dim: int
    keys: int
    steps: int
    errors: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> Errors | None:
        """What `measure_errors` left in a folder, None if nothing."""
        path = folder / ERRORS
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def write(self, folder: Path) -> None:
        """Keep them."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / ERRORS).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def measure_errors(model: Path, text: Path, settings: Sequence[Setting]) -> Errors:
    """Compare SparQ's step with dense attention on the queries and keys of a model.

    Args:
        model: A folder with a causal language model, and its tokenizer.
        text: What it reads: some windows of its whole context, spread over the file.
        settings: At the benchmark's head_dim; the model's steps use the same share of components.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    every = torch.tensor(ids["input_ids"])
    context = loaded.config.max_position_embeddings
    if len(every) < context:
        raise ValueError(f"{text} has {len(every)} tokens, less than the model's {context}.")
    starts = torch.linspace(0, len(every) - context, _WINDOWS).long().tolist()
    batch = torch.stack([every[start : start + context] for start in starts])
    squares: dict[str, list[Tensor]] = {}
    steps = 0
    for query, keys, values in _steps(loaded, batch):
        steps += 1
        dense, _ = reference_attention(query, keys, values, _all_of(keys))
        size = dense.square().sum(-1)
        for setting in settings:
            share = dataclasses.replace(setting, rank=setting.rank * keys.shape[-1] // HEAD_DIM)
            output, _ = torch_step(share, (query, keys, values), make_copy(share, keys))
            apart = (output - dense).square().sum(-1) / size
            squares.setdefault(setting.title, []).append(apart.flatten())
    errors = {title: math.sqrt(float(torch.cat(all_).mean())) for title, all_ in squares.items()}
    head_dim = keys.shape[-1]
    return Errors(model.name, fingerprint(loaded), head_dim, context, steps, errors)


def _steps(model: Any, batch: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query [B, H, 1, D], keys and values of decoding steps, in every layer."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(call: InterfaceCall) -> tuple[Tensor, Any]:
        calls.append((call.query, call.key, call.value))
        return call.run()

    with intercept_attention(model.modules(), keep):
        model(batch, use_cache=False, logits_to_keep=1)
    context = batch.shape[1]
    places = torch.linspace(context // 2, context - 1, _QUERIES).long().tolist()
    for query, keys, values in calls:
        for place in places:
            past = slice(0, place + 1)
            yield query[:, :, place, None], keys[:, :, past], values[:, :, past]


def _all_of(keys: Tensor) -> Pattern:
    return Pattern(q_len=1, kv_len=keys.shape[2], causal=False)
