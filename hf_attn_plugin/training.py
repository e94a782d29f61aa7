"""What training scripts share beside data: where to go on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerState

if TYPE_CHECKING:
    from transformers import Trainer


def last_checkpoint(folder: str | Path) -> str | None:
    """Find the newest complete checkpoint of transformers' Trainer.

    A process that is killed while it saves leaves a checkpoint that cannot be resumed from. Trainer
    writes `trainer_state.json` last, so a checkpoint with it is complete.

    Args:
        folder: The Trainer's `output_dir`; it need not exist.

    Returns:
        The checkpoint's folder, for `Trainer.train(resume_from_checkpoint=...)`, or None.
    """
    states = [
        state
        for state in Path(folder).glob("checkpoint-*/trainer_state.json")
        if state.stat().st_size > 0
    ]
    named = {state.parent.name.removeprefix("checkpoint-"): state.parent for state in states}
    # A user's own copies, such as checkpoint-best, are not the Trainer's.
    steps = {int(name): path for name, path in named.items() if name.isdecimal()}
    return str(steps[max(steps)]) if steps else None


def train_from_last_checkpoint(trainer: Trainer) -> None:
    """Train, going on from the last checkpoint in the trainer's output folder.

    A run that had ended already is loaded as it was: Trainer itself would train one step more, and
    so change a finished model each time the same line is run again.

    Args:
        trainer: Not yet trained.

    Raises:
        ValueError: If the run had ended and FSDP was to load it, which accelerate does with an
            optimizer only.
    """
    args = trainer.args
    assert args.output_dir is not None
    checkpoint = last_checkpoint(args.output_dir)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        by_steps = args.max_steps > 0
        ended = (
            state.global_step >= args.max_steps
            if by_steps
            else (state.epoch or 0.0) >= args.num_train_epochs
        )
        if ended and trainer.is_fsdp_enabled:
            raise ValueError(
                f"the run in {args.output_dir} has ended at step {state.global_step}, and under "
                "FSDP it cannot be loaded without training on: raise --max_steps, or start "
                "without FSDP"
            )
        if ended:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)
