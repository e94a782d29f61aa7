"""Stage 6: figures, and a model folder with its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.config import configure
from hf_attn_plugin.quickstart.report import recovered
from hf_attn_plugin.quickstart.settings import TEMPLATE, QuickstartSettings
from hf_attn_plugin.quickstart.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_attn_plugin.hub.card import CardContent

MODEL = "model"
HEATMAPS = Path("figures") / "needle.png"
QUALITY = Path("figures") / "quality.png"

_RECOMMENDED = "sparq 1/2"


def publish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: QuickstartSettings,
    workspace: Workspace,
    command: str,
) -> Path:
    """Write the model folder: weights, tokenizer, parameters of the methods, figures and card.

    Args:
        model: The model that was evaluated.
        tokenizer: Its tokenizer.
        settings: What the run was made with.
        workspace: Holds the results; the folder is made in it.
        command: What the user typed.

    Returns:
        The folder.
    """
    from hf_attn_plugin.hub.card import write_model_card

    for parameters in (settings.longformer, settings.sliding_window, settings.sparq(1 / 2)):
        configure(model, parameters)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "figures").mkdir()
        _draw(folder, workspace.results["evaluation"], settings)
        write_model_card(folder, _card(settings, workspace.results, command))

    return workspace.write(MODEL, write)


def _draw(folder: Path, evaluation: Mapping[str, Any], settings: QuickstartSettings) -> None:
    from hf_attn_plugin.hub.figures import QualityPoint, needle_heatmaps, quality_against_reads
    from hf_attn_plugin.lm_eval import NeedleGrid

    def tuples(grid: Mapping[str, Any]) -> NeedleGrid:
        return NeedleGrid(
            tuple(grid["lengths"]), tuple(grid["depths"]), tuple(map(tuple, grid["scores"]))
        )

    needle_heatmaps(
        {label: tuples(row["grid"]) for label, row in evaluation.items()},
        folder / HEATMAPS,
        title=f"Needles found (dashed: the context of {settings.context} before the extension)",
        trained_length=settings.context,
    )
    metrics = {
        "needles found (higher is better)": ("niah", "niah"),
        "bits per byte (lower is better)": ("long_bpb", "bits_per_byte"),
    }
    quality_against_reads(
        {
            axis: [
                QualityPoint(label, row[f"{task}_kv_share"], row[key])
                for label, row in evaluation.items()
            ]
            for axis, (task, key) in metrics.items()
        },
        folder / QUALITY,
        dense=next(iter(evaluation)),
    )


def _card(settings: QuickstartSettings, results: Mapping[str, Any], command: str) -> CardContent:
    from hf_attn_plugin.hub.card import CardContent, CardFigure, Measurement

    text, converted = results["text"], results["converted"]
    measurements = []
    for label, row in results["evaluation"].items():
        source = f"held-out part of {text['source']}"
        measurements.append(
            Measurement("niah", "exact_match", row["niah"], label, source, row["niah_kv_share"])
        )
        measurements.append(
            Measurement(
                "long_bpb",
                "bits_per_byte",
                row["bits_per_byte"],
                label,
                source,
                row["long_bpb_kv_share"],
            )
        )
    old_heads, new_heads = converted["heads"]
    return CardContent(
        title="hf-attn-quickstart",
        method="sparq",
        parameters=settings.sparq(1 / 2).to_dict(),
        command=command,
        summary=(
            f"A Llama of {results['pretrained']['parameters']:,} parameters, trained from scratch "
            f"in minutes on {text['source']} at a context of {settings.context} tokens; fine-tuned "
            f"to {settings.long_context} tokens with `longformer` attention (window "
            f"{settings.window}, {settings.global_tokens} global tokens), linear RoPE scaling, "
            f"LoRA and packed documents; converted from {old_heads} to {new_heads} key/value heads "
            f"by mean-pooling and trained on for {settings.uptrain_steps} steps, "
            f"{settings.uptrain_fraction:.0%} of those before, which recovered "
            f"{recovered(converted):.0%} of the loss that the conversion had cost."
        ),
        measurements=tuple(measurements),
        losses={
            "before conversion": converted["before"]["loss"],
            "after conversion": converted["converted"]["loss"],
            f"after {settings.uptrain_steps} more steps": converted["uptrained"]["loss"],
        },
        figures=(
            CardFigure(HEATMAPS, "Needles found over context length and depth, for each method"),
            CardFigure(QUALITY, "Quality against the KV cache read while decoding"),
        ),
        tags=("quickstart",),
        limitations=(
            "It was made in minutes to show a path, and is of no use as a language model.",
            f"It finds the word in `{TEMPLATE.needle.strip()}`, the sentence that it was trained "
            "on, and not the numbers of the sentence that the task `niah` hides by default (its "
            "option `template` chooses another). With several such sentences in one document it "
            "often takes the wrong one.",
            f"The windows of `longformer` and `sliding_window` do not see a needle further back "
            f"than {settings.window} tokens, except where a global token holds it.",
        ),
    )
