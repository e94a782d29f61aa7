"""The output folder: what belongs in it, what is finished already, and how it is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_attn_plugin.training import last_checkpoint

_MANIFEST = "quickstart.json"
_RESULTS = "results.json"


class Workspace:
    """A folder in which a run can be interrupted at any moment and taken up again.

    Everything that counts as finished was written under another name and renamed, so that a
    finished piece is a whole one.

    Attributes:
        out: The folder.
        results: Everything that was measured so far, as it is in ``results.json``.
    """

    def __init__(self, out: Path, results: dict[str, Any]) -> None:
        self.out = out
        self.results = results

    @classmethod
    def open(cls, out: Path | str, identity: Mapping[str, Any]) -> Workspace:
        """Make the folder, or take up the one that an interrupted run left.

        Args:
            out: The folder.
            identity: What the results depend on, as plain JSON values. A folder that was made with
                anything else is refused.

        Raises:
            OSError: The folder cannot be written.
            ValueError: It holds something else, or a run with another identity.
        """
        out = Path(out)
        identity = json.loads(json.dumps(identity))
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"--out {out} is a file, not a folder: name another.")
        manifest = out / _MANIFEST
        if not manifest.exists() and out.is_dir() and any(out.iterdir()):
            raise ValueError(
                f"--out {out} holds files that are not from the quickstart: name an empty or a new "
                "folder."
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise OSError(f"--out {out} cannot be written: {error.strerror or error}.") from error
        if not manifest.exists():
            _write_json(manifest, identity)
            return cls(out, {})
        try:
            previous = json.loads(manifest.read_text(encoding="utf-8"))
            results = out / _RESULTS
            found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{error.msg} in the results of --out {out}: delete the folder or name another."
            ) from error
        differing = sorted(
            key for key in {*previous, *identity} if previous.get(key) != identity.get(key)
        )
        if differing:
            raise ValueError(
                f"--out {out} holds a run with another {', '.join(differing)}: name another "
                "folder, or delete this one."
            )
        return cls(out, found)

    def path(self, name: str) -> Path:
        """A piece of the run, for example "pretrained"; it exists when it is finished."""
        return self.out / name

    def write(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Make a folder of the run in one piece.

        Args:
            name: Its name.
            make: Fills the empty folder that it is given.

        Returns:
            The finished folder.
        """
        path, unfinished = self.path(name), self.path(f"{name}.unfinished")
        for left_over in (unfinished, path):
            if left_over.exists():
                shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(path)
        return path

    def record(self, name: str, values: Any) -> None:
        """Add to the results, and write them."""
        self.results[name] = json.loads(json.dumps(values))
        _write_json(self.out / _RESULTS, self.results)

    def checkpoints(self, stage: str) -> Path:
        """Where a training stage keeps its checkpoints."""
        return self.out / "checkpoints" / stage

    def last_checkpoint(self, stage: str) -> str | None:
        """The newest complete checkpoint of a stage, or None."""
        return last_checkpoint(self.checkpoints(stage))

    def drop_checkpoints(self, stage: str) -> None:
        """Delete the checkpoints of a finished stage."""
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)


def _write_json(path: Path, values: Any) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
