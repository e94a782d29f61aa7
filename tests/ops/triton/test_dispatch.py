"""What every launch does on the host before its kernel; without a GPU, and without Triton."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_attn_plugin.ops.triton.dispatch import on_device


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices on which an element is filled, instead of filling it."""
    devices: list[torch.device] = []

    def empty(size: int, device: torch.device) -> Any:
        return SimpleNamespace(zero_=lambda: devices.append(device))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    return devices


def test_every_thread_gets_its_context_once(filled: list[torch.device]) -> None:
    first, second = (torch.device("cuda", index) for index in (0, 1))

    def work() -> None:
        for device in (first, first, second, first, second):
            with on_device(SimpleNamespace(device=device)):  # type: ignore[arg-type]
                pass

    for count in (1, 2):
        with ThreadPoolExecutor(1) as threads:
            threads.submit(work).result()
        assert filled == [first, second] * count


def test_nothing_is_filled_on_the_cpu(filled: list[torch.device]) -> None:
    with on_device(SimpleNamespace(device=torch.device("cpu"))):  # type: ignore[arg-type]
        pass
    assert not filled
