"""Versions of what the package works with, and the devices of this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
from collections.abc import Collection

# As pyproject.toml has them, for a package that is imported without being installed too.
SUPPORTED: dict[str, str] = {
    "python": ">=3.11",
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.17,<5.24",
    "accelerate": ">=1.15",
    "peft": ">=0.21",
    "datasets": ">=4.0",
    "lm-eval": ">=0.4.13,<0.5",
    "matplotlib": ">=3.9",
    "flash-attn-4": ">=4.0.0b36",
}
# Comes with PyTorch for GPUs.
_BESIDES = ("triton",)
_REQUIRED = ("python", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        name: As on PyPI.
        installed: Its version, or None.
        supported: The range of versions, or None where any will do.
        ok: Whether it is in the range; None for an optional package that is not installed.
    """

    name: str
    installed: str | None
    supported: str | None
    ok: bool | None

    def __str__(self) -> str:
        verdict = {True: "ok", False: "NOT SUPPORTED", None: ""}[self.ok]
        if self.installed is None:
            verdict = "MISSING" if self.ok is False else "not installed"
        wanted = f"supported {self.supported}" if self.supported else ""
        return f"{self.name:<14}{self.installed or '-':<18}{wanted:<30}{verdict}".rstrip()


@dataclasses.dataclass(frozen=True)
class Device:
    """One device that PyTorch can use.

    Attributes:
        type: ``"cuda"`` or ``"cpu"``.
        name: What it calls itself.
        memory_bytes: Of the GPU; None for the CPU.
        capability: CUDA compute capability, as in ``"9.0"``; None for the CPU.
    """

    type: str
    name: str
    memory_bytes: int | None = None
    capability: str | None = None

    def __str__(self) -> str:
        if self.memory_bytes is None:
            return f"{self.type}: {self.name}"
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{self.type}: {self.name}, {memory}, compute capability {self.capability}"


def packages() -> list[Package]:
    """The packages that matter, installed or not."""
    from packaging.specifiers import SpecifierSet

    found = []
    for name in (*SUPPORTED, *_BESIDES):
        wanted, installed = SUPPORTED.get(name), _version(name)
        ok: bool | None = None
        if installed is None:
            ok = False if name in _REQUIRED else None
        elif wanted is not None:
            # Builds such as 2.13.0+cpu and pre-releases count as what they are built from.
            base = installed.split("+")[0]
            ok = SpecifierSet(wanted).contains(base, prereleases=True)
        found.append(Package(name, installed, wanted, ok))
    return found


def devices() -> list[Device]:
    """The GPUs, or else the CPU alone."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                Device(
                    "cuda",
                    properties.name,
                    int(properties.total_memory),
                    f"{properties.major}.{properties.minor}",
                )
            )
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    name = platform.processor() or platform.machine()
    return [*found, Device("cpu", f"{name}, {cores}")]


@dataclasses.dataclass(frozen=True)
class Target:
    """The device and packages that backends are chosen for.

    Attributes:
        type: ``"cuda"`` or ``"cpu"``.
        capability: Of an NVIDIA GPU, else None.
        installed: The packages with kernels.
    """

    type: str
    capability: tuple[int, int] | None
    installed: frozenset[str]

    def __str__(self) -> str:
        if self.type == "cpu":
            return self.type
        names = " and ".join(sorted(self.installed)) or "no package of kernels"
        capability = "" if self.capability is None else ":{}.{}".format(*self.capability)
        return f"{self.type}{capability} with {names}"


def target(device: str | None = None, installed: Collection[str] | None = None) -> Target:
    """What backends are to be chosen for.

    Args:
        device: ``"cpu"``, or ``"cuda:9.0"`` for any GPU of that compute capability, here or not.
            None: the first GPU of this machine, or its CPU.
        installed: Packages with kernels; None: those of this Python.

    Raises:
        ValueError: It names no such device or package.
    """
    import torch

    from hf_attn_plugin.ops.backend import KERNEL_PACKAGES, capability_of, installed_packages

    packages = installed_packages() if installed is None else frozenset(installed)
    unknown = packages - KERNEL_PACKAGES.keys()
    if unknown:
        raise ValueError(
            f"--installed: no kernels are known in {', '.join(sorted(unknown))}; "
            f"name some of {', '.join(KERNEL_PACKAGES)}."
        )
    if device is None:
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Target(here.type, capability_of(here), packages)
    told = re.fullmatch(r"cpu|cuda:(\d+)\.(\d+)", device)
    if told is None:
        raise ValueError(
            f"--device must be cpu, or cuda: and a compute capability, as in cuda:9.0 (H100, "
            f"H200); got {device!r}."
        )
    if device == "cpu":
        return Target("cpu", None, packages)
    return Target("cuda", (int(told[1]), int(told[2])), packages)


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
