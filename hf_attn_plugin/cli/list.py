"""``hf-attn list``: the attention implementations."""

from __future__ import annotations

import argparse

from hf_attn_plugin.integrations.registry import implementations

HELP = "list the attention implementations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> int:
    """Print them, a line each."""
    for name, line in implementations().items():
        print(f"{name:<16} {line}")
    return 0
