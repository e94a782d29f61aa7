"""Evaluate a model in memory through lm-eval, under one attention implementation after another."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.config import MethodConfig, configure
from hf_attn_plugin.lm_eval.always import choose_always
from hf_attn_plugin.lm_eval.names import check_implementation
from hf_attn_plugin.lm_eval.options import check_metadata
from hf_attn_plugin.lm_eval.reads import KVReads
from hf_attn_plugin.lm_eval.tasks import our_tasks, tasks_dir

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class NeedleGrid:
    """Share of needles found, over context length and depth.

    Attributes:
        lengths: Context lengths in tokens, ascending.
        depths: Depths, ascending.
        scores: ``scores[depth][length]``, 0 to 1; NaN where nothing was measured.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]

    @classmethod
    def from_samples(cls, samples: Sequence[Mapping[str, Any]]) -> NeedleGrid:
        """Average the samples that lm-eval logged for `niah` or its variants over each cell."""
        metric = "recall" if samples and "recall" in samples[0] else "exact_match"
        cells: dict[tuple[int, float], list[float]] = {}
        for sample in samples:
            place = int(sample["doc"]["length"]), float(sample["doc"]["depth"])
            cells.setdefault(place, []).append(float(sample[metric]))
        lengths = tuple(sorted({length for length, _ in cells}))
        depths = tuple(sorted({depth for _, depth in cells}))

        def mean(values: list[float] | None) -> float:
            return sum(values) / len(values) if values else float("nan")

        scores = tuple(
            tuple(mean(cells.get((length, depth))) for length in lengths) for depth in depths
        )
        return cls(lengths, depths, scores)


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """What one evaluation gave.

    Attributes:
        results: lm-eval's results as they are: "results", "configs", "n-samples", …
        samples: lm-eval's logged samples per task.
        attn: The attention implementation.
        attn_params: That method's parameters.
        reads: KV cache read while decoding.
        seconds: Wall-clock time, without loading the tasks.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    attn: str
    attn_params: dict[str, Any]
    reads: KVReads
    seconds: float

    @property
    def kv_bytes_read(self) -> int:
        """Bytes of KV cache read in the decoding steps."""
        return self.reads.kv_bytes_read

    @property
    def kv_bytes_dense(self) -> int:
        """Bytes of KV cache that dense attention reads in the same steps."""
        return self.reads.kv_bytes_dense

    def metric(self, task: str, name: str) -> float:
        """A task's aggregated metric, for example ``metric("niah", "exact_match")``."""
        return float(self.results["results"][task][f"{name},none"])

    def needle_grid(self, task: str = "niah") -> NeedleGrid:
        """The scores of `niah`, or of one of its variants, over length and depth."""
        return NeedleGrid.from_samples(self.samples[task])


def load_tasks(
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    metadata: Mapping[str, Any] | None = None,
    max_length: int | None = None,
) -> list[Task]:
    """Load lm-eval tasks once, to evaluate several configurations on the very same documents.

    Args:
        tokenizer: The tokenizer that our tasks measure their prompts with.
        tasks: Task names, in a list or separated by commas: ours, or any of lm-eval's.
        metadata: Task options, see `hf_attn_plugin.lm_eval.tasks`.
        max_length: The model's maximum, to refuse longer prompts; None does not check here.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    check_metadata(metadata, names, our_tasks())
    options = {**(metadata or {}), "tokenizer": tokenizer}
    if max_length is not None:
        options["max_length"] = max_length
    with _quiet():
        # Indexing lm-eval's thousands of tasks takes seconds.
        manager = TaskManager(
            include_path=str(tasks_dir()),
            include_defaults=not set(names) <= set(our_tasks()),
            metadata=options,
        )
        missing = [name for name in names if not manager.match_tasks([name])]
        if missing:
            raise ValueError(
                f"no task named {', '.join(missing)}; ours are {', '.join(our_tasks())}, and "
                "`lm-eval ls tasks` lists lm-eval's."
            )
        loaded = list(manager.load(names)["tasks"].values())
    for task in loaded:
        if isinstance(task.config.metadata, dict):
            # lm-eval copies the metadata deeply into every result.
            task.config.metadata = {**task.config.metadata, "tokenizer": tokenizer.name_or_path}
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)
    return loaded


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: str | Sequence[str] | Sequence[Task],
    metadata: Mapping[str, Any] | None = None,
    attn: str | None = None,
    parameters: MethodConfig | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    decode_continuation: bool | None = None,
    progress: bool = False,
) -> EvalRun:
    """Evaluate a model in memory with lm-eval, under any attention implementation.

    Args:
        model: A causal model; it is left as it was found.
        tokenizer: Its tokenizer.
        tasks: Task names, or what `load_tasks` returned.
        metadata: Task options, see `hf_attn_plugin.lm_eval.tasks`.
        attn: The attention implementation; None takes that of `parameters`, or the model's own.
        parameters: The method's parameters, for example ``SparQConfig(rank=16)``.
        limit: Documents per task; None takes all.
        batch_size: Requests per forward pass.
        max_length: Tokens the model may be given; None takes what its config says.
        decode_continuation: See `AttentionLM`: None measures the decoding path where the method
            acts there only.
        progress: Show lm-eval's progress bars.

    Raises:
        ValueError: A name that is not registered, parameters of another method, unknown tasks or
            options, or prompts longer than the model takes.
    """
    require_lm_eval()
    from lm_eval import evaluator

    from hf_attn_plugin.lm_eval.model import AttentionLM

    if parameters is not None and attn not in (None, parameters.name):
        raise ValueError(
            f"{type(parameters).__name__} holds parameters of {parameters.name!r}, not of {attn!r}."
        )
    attn = attn or (parameters.name if parameters is not None else None)
    check_implementation(attn)
    with _attention(model, attn, parameters), _quiet():
        lm = AttentionLM(
            model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            decode_continuation=decode_continuation,
            progress=progress,
        )
        loaded = [task for task in tasks if not isinstance(task, str)]
        if isinstance(tasks, str) or not loaded:
            loaded = load_tasks(tokenizer, tasks, metadata, lm.max_length)
        started = time.perf_counter()
        results = evaluator.evaluate(
            lm,
            {"tasks": {task.task_name: task for task in loaded}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        return EvalRun(
            samples=results.pop("samples"),
            results=results,
            attn=lm.attn_implementation,
            attn_params=copy.deepcopy(
                (getattr(model.config, "attn_params", None) or {}).get(lm.attn_implementation, {})
            ),
            reads=lm.reads,
            seconds=time.perf_counter() - started,
        )


@contextlib.contextmanager
def _attention(
    model: PreTrainedModel, attn: str | None, parameters: MethodConfig | None
) -> Iterator[None]:
    """Set a model's attention and mode, and put them back."""
    config = model.config
    previous: str | dict[str, str] = config._attn_implementation
    if config.sub_configs:
        parts = {
            name: getattr(config, name)._attn_implementation
            for name in config.sub_configs
            if getattr(config, name, None) is not None
        }
        previous = {"": config._attn_implementation, **parts}
    params = [(part, copy.deepcopy(getattr(part, "attn_params", None))) for part in _parts(config)]
    training, changed = model.training, parameters is not None
    try:
        if parameters is not None:
            configure(model, parameters)
        if attn is not None:
            model.set_attn_implementation(attn)
        changed = choose_always(model) or changed
        yield
    finally:
        if attn is not None:
            model.set_attn_implementation(previous)
        if changed:
            for part, kept in params:
                if kept is not None or hasattr(part, "attn_params"):
                    part.attn_params = kept
        model.train(training)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those within it, each of which may hold parameters."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _parts(getattr(config, name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notes on every task and model to itself."""
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task.tqdm
    logger.setLevel(logging.ERROR)
    # Its bar over building the requests has no switch.
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar


def require_lm_eval() -> None:
    """Raise an ``ImportError`` that names the extra when lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("evaluation needs lm-eval: pip install 'hf_attn_plugin[eval]'") from error
