"""Fixtures of the methods' tests."""

from __future__ import annotations

import pytest

from tests.methods.sparq_models import paper_attention


@pytest.fixture
def paper():
    """The attention implementation "paper"."""
    with paper_attention():
        yield
