"""Imports run one way through the package, and the ground floors know nothing of transformers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_attn_plugin

PACKAGE = Path(hf_attn_plugin.__file__).parent
# From the ground up. What stands on the same floor may import each other (figures know the results
# they draw), what stands higher may not be imported.
FLOORS = [
    {"config", "compat", "patterns", "data", "masked_lm", "training"},
    {"ops"},
    {"parallel"},
    {"methods"},
    {"integrations"},
    {"sequence_parallelism"},
    {"convert", "verification", "doctor", "lm_eval", "hub"},
    {"quickstart"},
    {"cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(path: Path, source: str | None = None) -> Iterator[str]:
    """Full names of the modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: a relative import"
            yield node.module
            if node.module == PACKAGE.name:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    # A `__main__.py` is a way in, and a command: what it stands beside does not import it.
    found = (path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py")
    return [path for path in found if path.parent != PACKAGE or path.stem != "__init__"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upwards(path: Path, source: str | None = None) -> list[str]:
    names = [name.split(".") for name in imported(path, source)]
    parts = [name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1]
    return [part for part in parts if FLOOR.get(part, -1) > FLOOR[room(path)]]


def test_every_part_has_its_floor() -> None:
    assert {room(path) for path in files()} == {*FLOOR}


def test_imports_run_one_way() -> None:
    assert {str(path): up for path in files() if (up := upwards(path))} == {}


@pytest.mark.parametrize("part", ["ops", "patterns"])
def test_the_lower_floors_do_not_know_transformers(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        assert "transformers" not in {name.split(".")[0] for name in imported(path)}, path


def test_the_scan_would_notice() -> None:
    inside = "def f():\n    from hf_attn_plugin.integrations.counters import count_reads\n"
    assert upwards(PACKAGE / "methods/call.py", inside) == ["integrations"]
    assert upwards(PACKAGE / "ops/linear.py", "from hf_attn_plugin import cli, config") == ["cli"]
    assert upwards(PACKAGE / "cli/main.py", inside) == []
