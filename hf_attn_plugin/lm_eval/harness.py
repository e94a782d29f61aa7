"""lm-eval's own command line with our attention, model and tasks in reach."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from types import ModuleType
from typing import Any

from hf_attn_plugin.lm_eval.options import check_metadata
from hf_attn_plugin.lm_eval.run import NeedleGrid, require_lm_eval
from hf_attn_plugin.lm_eval.tasks import our_tasks, tasks_dir


def run_harness(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run lm-eval's command line, which has no hook of its own for plugins.

    The model is `hf-attn` unless ``--model`` names another, and our tasks are found besides
    lm-eval's and those on the user's ``--include_path``.

    Args:
        arguments: What follows the program's name, for example ``["run", "--tasks", "niah", …]``.

    Returns:
        lm-eval's results with the logged samples; None where it evaluated nothing (another
        command) or on all processes but the first.
    """
    require_lm_eval()
    import lm_eval
    import lm_eval.tasks
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    import hf_attn_plugin.lm_eval.model  # noqa: F401  (registers the model)

    setup_logging()
    with _program_arguments(arguments):
        parser = HarnessCLI()
        parsed = parser.parse_args()
    ours, named = our_tasks(), getattr(parsed, "tasks", None) or []
    if hasattr(parsed, "include_path"):
        config = getattr(parsed, "config", None)
        from_file = EvaluatorConfig.load_yaml_config(config) if config else {}
        theirs = parsed.include_path or from_file.get("include_path") or []
        named = named or from_file.get("tasks") or []
        named = named if isinstance(named, list) else [named]
        cached = getattr(parsed, "cache_requests", None) or from_file.get("cache_requests")
        _check_request_cache(cached, [name for name in ours for p in named if fnmatch(name, p)])
        check_metadata(
            getattr(parsed, "metadata", None) or from_file.get("metadata"),
            [task for name in named for task in str(name).split(",")],
            ours,
        )
        theirs = theirs if isinstance(theirs, list) else [theirs]
        parsed.include_path = [str(tasks_dir()), *theirs]
        if hasattr(parsed, "model"):
            parsed.model = parsed.model or from_file.get("model") or "hf-attn"
    recorded: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(lm_eval, "simple_evaluate", _recording(recorded)))
        if named and set(named) <= set(ours):
            # Indexing lm-eval's thousands of tasks takes longer than everything else here.
            quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
            stack.enter_context(_replaced(lm_eval.tasks, "TaskManager", quick))
        parser.execute(parsed)
    return recorded or None


def summarize(results: dict[str, Any]) -> str:
    """The needle grid and the KV cache that was read, as text."""
    lines = []
    for task, samples in results.get("samples", {}).items():
        if samples and {"length", "depth"} <= set(samples[0]["doc"]):
            lines += [f"{task}: needles found, depth (down) by context length (across)"]
            lines += [format_grid(NeedleGrid.from_samples(samples))]
    reads = results.get("config", {}).get("kv_reads")
    if reads and reads["decode_steps"]:
        read, dense = reads["kv_bytes_read"], reads["kv_bytes_dense"]
        lines.append(
            f"KV cache read in {reads['decode_steps']} decoding steps: {read / 2**20:.1f} MiB; "
            f"dense attention reads {dense / 2**20:.1f} MiB"
            + (f" (ratio {read / dense:.3f})" if dense else "")
        )
    elif reads:
        lines.append("KV cache read: nothing was decoded.")
    return "\n".join(lines)


def format_grid(grid: NeedleGrid) -> str:
    """A needle grid as aligned text, in percent."""
    rows = [["depth", *map(str, grid.lengths)]]
    for depth, scores in zip(grid.depths, grid.scores, strict=True):
        rows.append([f"{depth:.2f}", *(f"{100 * score:.0f}%" for score in scores)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _check_request_cache(cache: Any, ours: Sequence[str]) -> None:
    """Refuse lm-eval's cache of prompts for tasks whose prompts depend on options."""
    asked = cache.get("cache_requests") if isinstance(cache, dict) else cache
    if asked and ours:
        raise ValueError(
            f"--cache_requests keeps prompts by the name of the task alone, and would give "
            f"{', '.join(ours)} those of other options or texts: leave it out, or run lm-eval's "
            "own tasks by themselves."
        )


@contextlib.contextmanager
def _program_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """lm-eval reads its arguments from `sys.argv` only."""
    previous = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = previous


def _recording(recorded: dict[str, Any]) -> Callable[..., Any]:
    """lm-eval's `simple_evaluate`, which its command line calls, keeping what it returns."""
    from lm_eval.evaluator import simple_evaluate

    def recording(*args: Any, **kwargs: Any) -> Any:
        logged = kwargs.get("log_samples", True)
        results = simple_evaluate(*args, **{**kwargs, "log_samples": True})
        if results is not None:
            recorded.update(results)
            if not logged:
                results.pop("samples", None)
        return results

    return recording


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace a name that lm-eval's command line looks up in a module when it runs."""
    previous = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if previous is None:
            delattr(module, name)
        else:
            setattr(module, name, previous)
