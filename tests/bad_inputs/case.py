"""One bad input: how a user would write it, and what the answer has to say."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_attn_plugin.cli.main import main


@dataclasses.dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        area: The section of the page.
        written: How a user would write it.
        run: Does it, in an empty folder.
        asked: Parts of the message that repeat what was asked.
        instead: Parts of the message that say what is supported or what to use.
        error: The error's type.
        without: Packages that are not installed.
        since: The version of transformers from which on the message is so.
    """

    area: str
    written: str
    run: Callable[[Path], Any]
    asked: tuple[str, ...]
    instead: tuple[str, ...]
    error: type[Exception] = ValueError
    without: tuple[str, ...] = ()
    since: str = "5.17"

    def __str__(self) -> str:
        return re.sub(r"\W+", " ", f"{self.area} {self.written}").strip()

    def message(self, folder: Path) -> tuple[type[BaseException] | None, str]:
        """The error's type and message; None and "" where nothing is refused."""
        try:
            with _not_installed(self.without):
                self.run(folder)
        except Exception as error:
            # Folders made for the test are no part of the message.
            return type(error), str(error).replace(str(folder), "FOLDER")
        return None, ""


class CommandError(ValueError):
    """`hf-attn` ended with status 2 and this line."""


def command(*arguments: Any) -> None:
    """Run `hf-attn`; raises what it refuses with."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
    if status == 2:
        lines = errors.getvalue().splitlines()
        found = [line for line in lines if line.startswith("hf-attn") and "error: " in line]
        raise CommandError(found[-1].split("error: ", 1)[1])


@contextlib.contextmanager
def _not_installed(packages: tuple[str, ...]) -> Iterator[None]:
    """Importing these packages, or anything in them, fails inside the block."""
    modules: dict[str, Any] = sys.modules
    inside = [name for name in modules if name.split(".")[0] in packages]
    gone = {name: modules.pop(name) for name in inside}
    modules.update(dict.fromkeys(packages))  # None makes the import fail
    try:
        yield
    finally:
        for name in packages:
            del modules[name]
        modules.update(gone)
