"""Stage 5: the same questions under every method, through lm-eval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hf_attn_plugin.config import MethodConfig
from hf_attn_plugin.quickstart.settings import TEMPLATE, QuickstartSettings
from hf_attn_plugin.quickstart.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the results.

    Attributes:
        label: Its name in the table.
        attn: The attention implementation.
        parameters: Its parameters.
        exact: Whether it computes what dense attention does.
    """

    label: str
    attn: str
    parameters: MethodConfig | None = None
    exact: bool = False


def methods(settings: QuickstartSettings) -> list[Method]:
    """What is compared."""
    return [
        Method("sdpa (dense)", "sdpa", exact=True),
        Method("sliding_window", "sliding_window", settings.sliding_window),
        Method("longformer", "longformer", settings.longformer),
        Method("sparq 1/2", "sparq", settings.sparq(1 / 2)),
        Method("sparq 1/8", "sparq", settings.sparq(1 / 8)),
    ]


def evaluate_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: QuickstartSettings,
    workspace: Workspace,
    held_out: Path,
    seed: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Measure every method that is not measured yet.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        settings: Lengths, depths, samples.
        workspace: Results are kept here after each method.
        held_out: Text that was not trained on.
        seed: Draws the needles.
        progress: Progress bar: True, False, or None for on terminals only.

    Returns:
        The results by label.
    """
    found: dict[str, Any] = dict(workspace.results.get(EVALUATION, {}))
    missing = [method for method in methods(settings) if method.label not in found]
    if not missing:
        return found
    from hf_attn_plugin.lm_eval import evaluate, load_tasks

    metadata: dict[str, Any] = {
        "niah": {
            "lengths": list(settings.lengths),
            "depths": list(settings.depths),
            "samples": settings.samples,
            "files": [str(held_out)],
            "seed": seed,
            "template": {
                "needle": TEMPLATE.needle,
                "question": TEMPLATE.question,
                "values": list(TEMPLATE.values),
            },
        },
        "long_bpb": {
            "context": settings.long_context - settings.bpb_scored,
            "scored": settings.bpb_scored,
            "samples": settings.bpb_samples,
            "files": [str(held_out)],
        },
    }
    loaded = {
        task: load_tasks(tokenizer, task, metadata, settings.long_context) for task in metadata
    }
    steps = [(method, task) for method in missing for task in loaded]
    bar = tqdm(steps, unit="run", disable=None if progress is None else not progress)
    runs: dict[str, Any] = {}
    for method, task in bar:
        bar.set_description(f"evaluating {method.label}")
        # All through the decoding path, so that what they read can be compared.
        runs[task] = evaluate(
            model,
            tokenizer,
            tasks=loaded[task],
            attn=method.attn,
            parameters=method.parameters,
            batch_size=settings.batch_size,
            decode_continuation=True,
        )
        if len(runs) == len(loaded):
            found[method.label] = _summary(method, runs, settings)
            workspace.record(EVALUATION, found)
            runs = {}
    return found


def _summary(
    method: Method, runs: Mapping[str, Any], settings: QuickstartSettings
) -> dict[str, Any]:
    niah, text = runs["niah"], runs["long_bpb"]
    grid = niah.needle_grid()
    near = [
        float(sample["exact_match"])
        for sample in niah.samples["niah"]
        if _distance(sample["doc"]) < settings.window
    ]
    return {
        "attn": method.attn,
        "parameters": {} if method.parameters is None else method.parameters.to_dict(),
        "exact": method.exact,
        "niah": niah.metric("niah", "exact_match"),
        "niah_within_window": sum(near) / len(near) if near else None,
        "needles": len(niah.samples["niah"]),
        "grid": dataclasses.asdict(grid),
        "bits_per_byte": text.metric("long_bpb", "bits_per_byte"),
        "niah_kv_bytes_read": niah.kv_bytes_read,
        "niah_kv_share": niah.reads.fraction,
        "long_bpb_kv_bytes_read": text.kv_bytes_read,
        "long_bpb_kv_share": text.reads.fraction,
        "seconds": round(niah.seconds + text.seconds, 1),
    }


def _distance(document: Mapping[str, Any]) -> int:
    """How far back the needle starts, seen from the answer's last token."""
    return int(document["prompt_tokens"]) + 1 - int(document["needle_start"])
