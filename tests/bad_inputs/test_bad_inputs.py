"""Every bad input is refused, by an error that says what was asked and what to do instead."""

from __future__ import annotations

import collections
from importlib.metadata import version

import pytest
from packaging.version import Version

from .case import Case
from .page import CASES, PAGE, answer, page


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_refused_with_a_reason(case: Case) -> None:
    if Version(version("transformers")) < Version(case.since):
        pytest.skip(f"from transformers {case.since} on")
    kind, message = answer(case)
    assert kind is not None, "nothing was refused"
    assert issubclass(kind, case.error), f"{kind.__name__}: {message}"
    assert issubclass(kind, ValueError | ImportError | FileNotFoundError), kind
    missing = [part for part in (*case.asked, *case.instead) if part not in message]
    assert not missing, f"{missing} not in: {message}"


def test_they_are_many_and_distinct() -> None:
    assert len(CASES) >= 70
    assert not [text for text, n in collections.Counter(map(str, CASES)).items() if n > 1]
    # Two inputs may get one answer where the rule is one; most rules are different.
    assert len({answer(case)[1] for case in CASES}) >= 0.9 * len(CASES)


def test_each_says_what_to_do_instead() -> None:
    assert all(case.asked for case in CASES)
    assert all(case.instead for case in CASES)


@pytest.mark.skipif(
    not version("transformers").startswith("5.23."),
    reason="some messages are transformers' own, of the version that constraints.txt names",
)
def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.bad_inputs"
