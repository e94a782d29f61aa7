"""What training scripts share beside data: where to go on after an interruption."""

from __future__ import annotations

from pathlib import Path


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
