"""All stages in their order."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.quickstart.settings import QuickstartSettings
from hf_attn_plugin.quickstart.text import MINIMUM_CHARACTERS, read_corpus
from hf_attn_plugin.quickstart.workspace import Workspace

if TYPE_CHECKING:
    from hf_attn_plugin.quickstart.stages import Stages

_PACKAGES = ("accelerate", "datasets", "lm_eval", "matplotlib", "peft")
_VERSION = 1
"""Raised when the stages change so that an older folder cannot be taken up."""


def run_quickstart(
    out: Path | str,
    files: Sequence[Path | str] = (),
    seed: int = 0,
    settings: QuickstartSettings | None = None,
    *,
    command: str = "hf-attn quickstart",
    progress: bool | None = None,
    say: Callable[[str], None] = print,
    minimum_characters: int = MINIMUM_CHARACTERS,
) -> dict[str, Any]:
    """Train a small model, extend its context, convert it, evaluate it and write its folder.

    A run that was interrupted, in whatever way, is taken up where its last checkpoint was made, and
    ends as the uninterrupted one does. A finished one is only reported.

    Args:
        out: Folder for everything.
        files: Text files to learn from; none takes the Python standard library's sources.
        seed: Draws the model, the documents and the needles.
        settings: Sizes and steps.
        command: What the user typed, for the model card.
        progress: Progress bars: True, False, or None for on terminals only.
        say: Told what is going on, a line at a time.
        minimum_characters: Refuse less text than this.

    Returns:
        Everything that was measured, as in ``results.json``.

    Raises:
        OSError: A text file cannot be read, or the folder not be written.
        ValueError: A text is empty or too short, or the folder holds something else.
        ImportError: A package of the extra `quickstart` is missing.
    """
    for package in _PACKAGES:
        _require(package)
    settings = settings or QuickstartSettings()
    corpus = read_corpus(files, minimum_characters)
    workspace = Workspace.open(
        out,
        {
            "version": _VERSION,
            "seed": seed,
            "text": {"source": corpus.source, "sha256": corpus.digest},
            "settings": dataclasses.asdict(settings),
        },
    )

    from hf_attn_plugin.quickstart.publish import HEATMAPS, MODEL, QUALITY
    from hf_attn_plugin.quickstart.report import places, summary
    from hf_attn_plugin.quickstart.stages import Stages

    folder = workspace.path(MODEL)
    if not folder.exists():
        started = time.perf_counter()
        with _one_thread():
            _run_stages(Stages(settings, workspace, corpus, seed, progress, say), command)
        say(f"{time.perf_counter() - started:.0f} seconds")
    say("")
    say(summary(workspace.results, settings))
    say("")
    say(places(folder, HEATMAPS, QUALITY, workspace.path("results.json")))
    return workspace.results


def _run_stages(stages: Stages, command: str) -> None:
    """Run what is not finished yet."""
    from hf_attn_plugin.quickstart.evaluation import evaluate_methods
    from hf_attn_plugin.quickstart.publish import publish
    from hf_attn_plugin.quickstart.stages import HELD_OUT_FILE, TEXT

    settings, workspace, say = stages.settings, stages.workspace, stages.say
    say(f"[1/6] tokenizer: {settings.vocab_size} tokens, trained on {stages.corpus.source}")
    tokenizer = stages.prepare_text()
    say(
        f"[2/6] a Llama with {settings.num_layers} layers learns text and retrieval at "
        f"{settings.first_length} to {settings.context} tokens"
    )
    stages.pretrain()
    say(
        f"[3/6] fine-tuning to {settings.long_context} tokens: longformer attention, linear "
        "RoPE scaling, LoRA, packed documents"
    )
    stages.finetune()
    say(
        f"[4/6] conversion from {settings.num_heads} to {settings.num_key_value_heads} "
        f"key/value heads, {settings.uptrain_steps} steps of uptraining"
    )
    model = stages.convert()
    say("[5/6] evaluation through lm-eval: needles and bits per byte")
    held_out = workspace.path(TEXT) / HELD_OUT_FILE
    evaluate_methods(model, tokenizer, settings, workspace, held_out, stages.seed, stages.progress)
    say("[6/6] figures, model card, model folder")
    publish(model, tokenizer, settings, workspace, command)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain little from a second thread, and stall when cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"the quickstart needs {package}: pip install 'hf_attn_plugin[quickstart]'"
        ) from error
