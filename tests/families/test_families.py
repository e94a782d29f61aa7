"""Every architecture in transformers: `flash` equals eager attention, or says why not.

The sweep: ``pytest -m families`` (``--families-resume`` to go on, ``--families-table FILE`` for
the table). It is not part of a plain ``pytest``.
"""

from __future__ import annotations

import pytest
import torch
from families import odd, table
from families.catalogue import architectures
from families.compare import sweep
from families.plugin import results_folder
from families.result import GOOD, NOT_BUILT


@pytest.mark.families
@pytest.mark.parametrize("architecture", architectures())
def test_family(architecture: str, request: pytest.FixtureRequest) -> None:
    folder = results_folder(request.config)
    if request.config.getoption("--families-resume"):
        known = table.load(architecture, folder)
        if known is not None and known.outcome in GOOD and known.outcome != NOT_BUILT:
            return
    torch.set_num_threads(1)
    result = sweep(architecture)
    table.save(result, folder)
    assert result.outcome in GOOD, f"{result.model_class}: {result.message}"
    expected = result.outcome != NOT_BUILT or architecture in odd.NOT_BUILT
    assert expected, f"not built, and not listed so: {result.message}"
