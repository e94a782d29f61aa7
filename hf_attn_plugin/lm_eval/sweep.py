"""Measure many settings of the decoding methods on the same documents: quality against bytes.

What is measured is kept in one JSON file, written anew after every setting and task, so that a
sweep that was stopped goes on where it was. `sweep_report` says what follows from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hf_attn_plugin
from hf_attn_plugin.config import (
    ExactTopKConfig,
    H2OConfig,
    LMInfiniteConfig,
    MethodConfig,
    SparQConfig,
)
from hf_attn_plugin.lm_eval.run import EvalRun, evaluate

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESULTS = "results.json"
DENSE = "dense"
RANKS = (4, 8, 16, 32, 64)
TOP_KS = (32, 64, 128, 256, 512)
COVERAGES = (0.8, 0.9, 0.95, 0.99)
KEY_COPIES = ("int8", "int4", "none")
BASELINES = ("exact_topk", "h2o", "lm_infinite")
SINK_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class SweepSetting:
    """One configuration of a sweep.

    Attributes:
        label: Its name in tables, another for every other setting.
        group: What it belongs to in pictures: settings that differ in their budget only.
        attn: The attention implementation.
        parameters: Its parameters.
    """

    label: str
    group: str
    attn: str
    parameters: MethodConfig | None = None

    @property
    def key(self) -> str:
        """What tells it from all other settings."""
        values = {} if self.parameters is None else self.parameters.to_dict()
        return json.dumps([self.attn, values], sort_keys=True)


def sweep_settings(
    head_dim: int,
    *,
    ranks: Sequence[int] = RANKS,
    top_ks: Sequence[int] = TOP_KS,
    coverages: Sequence[float] = COVERAGES,
    key_copies: Sequence[str] = KEY_COPIES,
    baselines: Sequence[str] = BASELINES,
    mean_value_reallocation: bool = False,
) -> list[SweepSetting]:
    """What a sweep measures: dense attention, SparQ's parameters, and the baselines.

    Coverage is tried with the largest ``top_k`` as its upper bound, at the ranks next to a quarter
    and a half of head_dim; the kinds of key copy at the latter. The baselines get every ``top_k``
    as their budget of keys; ``lm_infinite`` takes its 4 sink tokens out of it.

    Args:
        head_dim: The model's; ranks above it are left out.
        ranks: SparQ's r.
        top_ks: Numbers of keys k.
        coverages: SparQ's coverage targets.
        key_copies: SparQ's ways to keep the second copy of the keys, besides the full one.
        baselines: Names among exact_topk, h2o and lm_infinite.
        mean_value_reallocation: SparQ's option, for all its settings.

    Raises:
        ValueError: An unknown baseline, or no rank that the model can take.
    """
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ValueError(f"no baseline named {', '.join(unknown)}; known: {', '.join(BASELINES)}.")
    possible = [rank for rank in ranks if rank <= head_dim]
    if ranks and not possible:
        raise ValueError(f"every rank of {list(ranks)} is above the model's head_dim {head_dim}.")
    settings = [SweepSetting(DENSE, DENSE, "sdpa")]

    mean = " mean" if mean_value_reallocation else ""

    def sparq(group: str, label: str, **values: Any) -> None:
        parameters = SparQConfig(mean_value_reallocation=mean_value_reallocation, **values)
        settings.append(
            SweepSetting(f"sparq {label}{mean}", f"sparq {group}{mean}", "sparq", parameters)
        )

    for rank in possible:
        for k in top_ks:
            sparq(f"r={rank}", f"r={rank} k={k}", rank=rank, top_k=k)
    nearest = sorted({_nearest(possible, head_dim / part) for part in (4, 2)}) if possible else []
    for rank in nearest:
        for share in coverages if top_ks else ():
            sparq(
                f"coverage r={rank} k≤{max(top_ks)}",
                f"r={rank} coverage={share:g} k≤{max(top_ks)}",
                rank=rank,
                top_k=max(top_ks),
                coverage=share,
            )
    for kind in key_copies if nearest else ():
        for k in top_ks:
            rank = nearest[-1]
            sparq(f"copy={kind}", f"r={rank} k={k} copy={kind}", rank=rank, top_k=k, key_copy=kind)
    for name in baselines:
        for k in top_ks:
            parameters = _baseline(name, k)
            if parameters is not None:
                settings.append(SweepSetting(f"{name} {k}", name, name, parameters))
    return settings


def _nearest(ranks: Sequence[int], wanted: float) -> int:
    return min(ranks, key=lambda rank: (abs(math.log2(rank / wanted)), rank))


def _baseline(name: str, budget: int) -> MethodConfig | None:
    """A baseline that reads ``budget`` keys; None where there is nothing so small."""
    if name == "exact_topk":
        return ExactTopKConfig(top_k=budget)
    if name == "h2o":
        return H2OConfig(top_k=budget)
    if budget <= SINK_TOKENS:
        return None
    return LMInfiniteConfig(window=budget - SINK_TOKENS, num_sink_tokens=SINK_TOKENS)


class SweepResults:
    """What has been measured, kept in ``results.json``.

    Attributes:
        path: The file.
        content: ``{"about": …, "tasks": {task: …}, "runs": {key: {"label", "group", "attn",
            "parameters", "refused": {task: reason}, "tasks": {task: measurement}}}}``; a
            measurement is what `measure` returns.
    """

    def __init__(self, folder: Path | str) -> None:
        """Read the results in ``folder``, or begin with none.

        Raises:
            ValueError: The file is not a sweep's.
        """
        self.path = Path(folder) / RESULTS
        self.content: dict[str, Any] = {"about": {}, "tasks": {}, "runs": {}}
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{self.path} cannot be read ({error}); delete it, or name another folder."
                ) from error
            if not isinstance(content, dict) or not set(self.content) <= set(content):
                raise ValueError(f"{self.path} is not a sweep's results; name another folder.")
            self.content = content

    def begin(self, about: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what is measured now.

        Args:
            about: Facts of this run; ``about["weights"]`` must be those of the runs before.
            tasks: Facts per task; their ``"documents"`` and ``"metric"`` must be those of the runs
                before.

        Raises:
            ValueError: The folder holds results of another model, of other documents or by another
                metric.
        """
        known = self.content["about"].get("weights")
        advice = f"Name another folder, or delete {self.path}."
        if known not in (None, about["weights"]):
            raise ValueError(f"{self.path} holds results of another model. {advice}")
        for task, facts in tasks.items():
            before = self.content["tasks"].get(task)
            if before is not None and before["documents"] != facts["documents"]:
                raise ValueError(
                    f"{self.path} holds results of {task} on other documents (options, limit or "
                    f"texts differ). {advice}"
                )
            if before is not None and before["metric"] != facts["metric"]:
                raise ValueError(
                    f"{self.path} holds results of {task} by {before['metric']}, asked is "
                    f"{facts['metric']}. {advice}"
                )
        self.content["about"] = dict(about)
        self.content["tasks"].update({task: dict(facts) for task, facts in tasks.items()})
        self.save()

    def measurement(self, setting: SweepSetting, task: str) -> dict[str, Any] | None:
        """What was measured, or None."""
        run = self.content["runs"].get(setting.key, {})
        found: dict[str, Any] | None = run.get("tasks", {}).get(task)
        return found

    def record(self, setting: SweepSetting, task: str, measured: Mapping[str, Any] | str) -> None:
        """Keep a measurement, or why the model refused the setting; written at once."""
        run = self.content["runs"].setdefault(
            setting.key,
            {
                "label": setting.label,
                "group": setting.group,
                "attn": setting.attn,
                "parameters": {} if setting.parameters is None else setting.parameters.to_dict(),
                "tasks": {},
            },
        )
        refused = run.setdefault("refused", {})
        if isinstance(measured, str):
            refused[task] = measured
        else:
            refused.pop(task, None)
            run["tasks"][task] = dict(measured)
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        partial.replace(self.path)


def run_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    settings: Sequence[SweepSetting],
    results: SweepResults,
    *,
    command: str = "",
    metrics: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Iterator[tuple[SweepSetting, str]]:
    """Measure what ``results`` does not hold yet, one setting and task after the other.

    All of them decode token by token from the same prefilled prompts, dense attention too.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        tasks: What `load_tasks` returned; any task that has a metric.
        settings: The first is what the others' answers are compared with: dense attention.
        results: Where the measurements go.
        command: The command line that does this again, for the report.
        metrics: The metric that counts, by task; by default each task's first.
        limit: Documents per task; None takes all.
        batch_size: Requests per forward pass.
        max_length: Tokens the model may be given.

    Yields:
        Each setting and task before it is measured.

    Raises:
        ValueError: A metric that a task does not have, results of another model or of other
            documents, or dense attention itself is refused. A refusal of any other setting is
            recorded with its reason.
    """
    facts = {
        task.task_name: _task_facts(task, (metrics or {}).get(task.task_name), limit)
        for task in tasks
    }
    unknown = sorted(set(metrics or {}) - set(facts))
    if unknown:
        raise ValueError(f"a metric is named for {', '.join(unknown)}, not among the tasks.")
    about = {
        "command": command,
        "model": model.name_or_path,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {
            "hf_attn_plugin": hf_attn_plugin.__version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }
    results.begin(about, facts)
    dense = settings[0]
    for setting in settings:
        for task in tasks:
            name = task.task_name
            if results.measurement(setting, name) is not None:
                continue
            yield setting, name
            try:
                run = evaluate(
                    model,
                    tokenizer,
                    tasks=[task],
                    attn=setting.attn,
                    parameters=setting.parameters,
                    limit=limit,
                    batch_size=batch_size,
                    max_length=max_length,
                    decode_continuation=True,
                )
            except ValueError as error:
                if setting is dense:
                    raise
                results.record(setting, name, str(error))
                continue
            compared = results.measurement(dense, name)
            results.record(
                setting, name, measure(run, name, facts[name]["metric"], tokenizer, compared)
            )


def measure(
    run: EvalRun,
    task: str,
    metric: str,
    tokenizer: PreTrainedTokenizerBase,
    dense: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The numbers of one evaluation, as plain JSON.

    Args:
        run: What `evaluate` returned.
        task: The task.
        metric: The metric that counts.
        tokenizer: For comparing answers token by token.
        dense: The measurement of dense attention, whose answers are the standard of ``agreement``;
            None makes this one the standard, and keeps its answers.

    Returns:
        ``quality`` (the metric), ``metrics`` (all of the task's), ``scores`` (the metric per
        document), ``agreement`` (share of dense attention's answer that is reproduced token by
        token up to the first difference, or share of equal choices; None where a task has no
        answers), ``agreements`` (the same per document), ``ratio`` (bytes of KV cache read, of
        what dense attention reads in the same steps), ``bytes_read``, ``bytes_dense``,
        ``decode_steps``, ``seconds``.
    """
    samples = sorted(run.samples[task], key=lambda sample: int(sample["doc_id"]))
    answers = [answer for sample in samples if (answer := _answer(sample)) is not None]
    measured: dict[str, Any] = {
        "quality": run.metric(task, metric),
        "metrics": {
            name.removesuffix(",none"): value
            for name, value in run.results["results"][task].items()
            if name.endswith(",none") and isinstance(value, float | int)
        },
        "scores": [_score(sample[metric]) for sample in samples],
        "agreement": None,
        "agreements": None,
        "ratio": run.reads.fraction,
        "bytes_read": run.kv_bytes_read,
        "bytes_dense": run.kv_bytes_dense,
        "decode_steps": run.reads.decode_steps,
        "seconds": round(run.seconds, 2),
    }
    if not answers:
        return measured
    standard = answers if dense is None else dense["answers"]
    shares = [
        token_agreement(tokenizer, answer, other)
        for answer, other in zip(answers, standard, strict=True)
    ]
    measured["agreement"] = sum(shares) / len(shares)
    measured["agreements"] = shares
    if dense is None:
        measured["answers"] = answers
    return measured


def token_agreement(
    tokenizer: PreTrainedTokenizerBase, answer: str | int, standard: str | int
) -> float:
    """Share of two answers' tokens, of the longer one, up to the first that differs; 0 to 1.

    Choices, given by their number, agree or do not.
    """
    if isinstance(answer, int) or isinstance(standard, int):
        return float(answer == standard)
    one, two = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, standard)
    )
    same = 0
    for left, right in zip(one, two, strict=False):
        if left != right:
            break
        same += 1
    longest = max(len(one), len(two))
    return same / longest if longest else 1.0


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the model's config and of a few numbers from each of its weights."""
    config = model.config.to_dict()
    # Where it lies, who saved it and under which attention is not what it is.
    for name in ("_name_or_path", "attn_params", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        few = weight.flatten()[:: max(1, weight.numel() // 16)].double().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {few.tolist()}".encode())
    return digest.hexdigest()[:16]


def _task_facts(task: Task, metric: str | None, limit: int | None) -> dict[str, Any]:
    higher = task.higher_is_better()
    if not higher:
        raise ValueError(f"the task {task.task_name} has no metric.")
    filters = [part["name"] for part in task.get_config("filter_list") or [{"name": "none"}]]
    if filters != ["none"]:
        raise ValueError(
            f"the task {task.task_name} scores its answers through the filters "
            f"{', '.join(filters)}, and a sweep compares one score per document: use a task "
            "without a filter_list, or hf-attn eval."
        )
    if metric is None:
        metric = next(iter(higher))
    if metric not in higher:
        raise ValueError(
            f"the task {task.task_name} has no metric {metric!r}; it has {', '.join(higher)}."
        )
    documents = list(task.eval_docs)[:limit]
    text = json.dumps(documents, sort_keys=True, default=str)
    return {
        "metric": metric,
        "higher_is_better": bool(higher[metric]),
        "count": len(documents),
        "documents": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def _answer(sample: Mapping[str, Any]) -> str | int | None:
    """The text that was generated, the number of the choice taken, or None for plain scoring."""
    responses = [part[0] if isinstance(part, list) else part for part in sample["resps"]]
    if isinstance(responses[0], str):
        return responses[0]
    if len(responses) > 1:
        scores = [score for score, _ in responses]
        return scores.index(max(scores))
    return None


def _score(value: Any) -> float:
    """A document's score; log-likelihood (nats) and length become bits per byte or character."""
    if isinstance(value, tuple | list):
        log_likelihood, length = value
        return float(-log_likelihood / length / math.log(2))
    return float(value)
