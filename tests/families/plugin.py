"""``pytest -m families``: its marker, its options, and the table it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MARKER = "families"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("families", "the sweep over all architectures (-m families)")
    group.addoption(
        "--families-table", type=Path, help="write the table of all architectures to this file"
    )
    group.addoption(
        "--families-resume", action="store_true", help="keep the good results of earlier sweeps"
    )
    group.addoption(
        "--families-results", type=Path, help="folder of the results (in pytest's cache)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARKER}: every architecture in transformers; runs with -m {MARKER} only"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if MARKER in (config.option.markexpr or ""):
        return
    sweep = [item for item in items if item.get_closest_marker(MARKER)]
    if sweep:
        config.hook.pytest_deselected(items=sweep)
        items[:] = [item for item in items if item not in set(sweep)]


def results_folder(config: pytest.Config) -> Path:
    """Where the result of every architecture is kept."""
    chosen: Path | None = config.getoption("--families-results")
    return chosen or config.rootpath / ".pytest_cache" / "families"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--families-table")
    if path is None or hasattr(session.config, "workerinput"):  # the workers only keep results
        return
    from families import table

    try:
        table.write(results_folder(session.config), path)
    except ValueError as error:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        _say(session.config, str(error))
    else:
        _say(session.config, f"wrote {path}")


def _say(config: pytest.Config, text: str) -> None:
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text)
