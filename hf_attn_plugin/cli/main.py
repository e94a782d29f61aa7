"""The ``hf-attn`` command: one subcommand per module of this folder."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from hf_attn_plugin import __version__

COMMANDS = {
    "quickstart": "hf_attn_plugin.cli.quickstart",
    "show": "hf_attn_plugin.cli.show",
    "convert-gqa": "hf_attn_plugin.cli.convert_gqa",
    "convert-long": "hf_attn_plugin.cli.convert_long",
    "eval": "hf_attn_plugin.cli.eval",
    "sweep": "hf_attn_plugin.cli.sweep",
    "verify": "hf_attn_plugin.cli.verify",
    "doctor": "hf_attn_plugin.cli.doctor",
    "bench": "hf_attn_plugin.cli.bench",
    "list": "hf_attn_plugin.cli.list",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments without the program's name; None takes the process's.

    Returns:
        The exit status: 0, 2 for wrong input, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-attn", description="Long-context attention for transformers, chosen by name."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the command that is run is imported; the others show their help line.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, module_name in COMMANDS.items():
        if chosen in COMMANDS and name != chosen:
            commands.add_parser(name)
            continue
        module = importlib.import_module(module_name)
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(module=module)
    args, rest = parser.parse_known_args(arguments)
    if getattr(args.module, "PASS_THROUGH", False):
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.module.run(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-attn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-attn: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
