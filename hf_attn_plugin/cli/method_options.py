"""Options for every parameter of every method, shared by the commands that take ``--attn``."""

from __future__ import annotations

import argparse
import dataclasses
import typing

from hf_attn_plugin.config import METHOD_CONFIGS, MethodConfig, parse_parameters

# Names that mean something else to the commands, or to lm-eval, whose options they pass on; here
# they are said with the method's name before them.
_TAKEN = ("seed",)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Declare an option per parameter; methods with a parameter of one name share its option."""
    methods: dict[str, list[str]] = {}
    types: dict[str, type] = {}
    for name, cls in METHOD_CONFIGS.items():
        for field, kind in _parameters(cls).items():
            methods.setdefault(field, []).append(name)
            types[field] = kind
    group = parser.add_argument_group("parameters of the methods")
    for field, names in methods.items():
        option, dest = _option(field, names[0]), _dest(field)
        text = f"for {', '.join(names)}"
        if types[field] is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, dest=dest, help=text)
        else:
            kind = types[field]
            group.add_argument(
                option, type=kind, dest=dest, metavar=kind.__name__.upper(), help=text
            )


def method_parameters(args: argparse.Namespace) -> MethodConfig | None:
    """The chosen method's parameters, or None when none were given.

    Raises:
        ValueError: An option belongs to another method, or its value is out of range.
    """
    fields = {field for cls in METHOD_CONFIGS.values() for field in _parameters(cls)}
    given = {field: value for field in fields if (value := getattr(args, _dest(field))) is not None}
    if not given:
        return None
    cls = METHOD_CONFIGS.get(args.attn)
    valid = list(_parameters(cls)) if cls is not None else []
    owners = {field: name for name, cls in METHOD_CONFIGS.items() for field in _parameters(cls)}
    wrong = sorted(_option(field, owners[field]) for field in set(given) - set(valid))
    if cls is None or wrong:
        options = ", ".join(_option(field, args.attn) for field in valid) or "none"
        raise ValueError(
            f"{', '.join(wrong)}: not a parameter of {args.attn or 'the model as it is'} "
            f"(its parameters: {options}). Choose the method with --attn, one of "
            f"{', '.join(METHOD_CONFIGS)}."
        )
    return parse_parameters(cls, given)


def _dest(field: str) -> str:
    """Where argparse keeps it, apart from the command's own options."""
    return f"method_{field}"


def _option(field: str, method: str) -> str:
    words = [method, field] if field in _TAKEN else [field]
    return "--" + "-".join(words).replace("_", "-")


def _parameters(cls: type[MethodConfig]) -> dict[str, type]:
    """Names and types of a method's parameters, without the ``| None`` of those with a default."""
    hints = typing.get_type_hints(cls)
    found: dict[str, type] = {}
    for field in dataclasses.fields(cls):
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        found[field.name] = kinds[0] if kinds else hints[field.name]
    return found
