"""``hf-attn show``: draw the pattern of a method."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_attn_plugin.patterns import Pattern

HELP = "draw which keys each query sees under a method"

# Which options each method takes, and the values drawn when they are not given.
METHODS: dict[str, dict[str, int]] = {
    "flash": {},
    "sliding_window": {"window": 8, "sinks": 0},
    "longformer": {"window": 8, "globals": 2, "dilation": 1},
    "strided": {"window": 4, "stride": 8},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pattern's parameters."""
    parser.add_argument("method", choices=sorted(METHODS), help="whose pattern is drawn")
    parser.add_argument("--window", type=int, help="keys of the window, the query included")
    parser.add_argument("--global", dest="globals", type=int, help="global tokens (longformer)")
    parser.add_argument("--dilation", type=int, help="distance between window keys (longformer)")
    parser.add_argument("--sinks", type=int, help="sink tokens (sliding_window)")
    parser.add_argument("--stride", type=int, help="stride (strided)")
    parser.add_argument("--length", type=int, default=32, help="keys (default 32)")
    parser.add_argument("--queries", type=int, help="only this many last queries (decoding)")
    parser.add_argument("--bidirectional", action="store_true", help="as in an encoder")
    parser.add_argument("--documents", help="lengths of packed documents, as in 10,14,8")
    parser.add_argument("--pad-left", type=int, default=0, help="padded keys on the left")
    parser.add_argument("--pad-right", type=int, default=0, help="padded keys on the right")
    parser.add_argument("--model-window", type=int, help="the model's own sliding window")
    parser.add_argument("--png", help="save a PNG here besides")


def run(args: argparse.Namespace) -> int:
    """Print the picture."""
    from hf_attn_plugin.patterns.picture import show_pattern

    if args.png and not args.png.endswith((".png", ".svg", ".pdf")):
        raise ValueError(f"--png writes .png, .svg or .pdf, told by the ending; got {args.png}.")
    pattern = _pattern(args)
    words = [args.method] + [f"{k}={getattr(args, k)}" for k in METHODS[args.method]]
    print(show_pattern(pattern, args.png, title=" ".join(words)))
    if args.png:
        print(f"saved {args.png}")
    return 0


def _pattern(args: argparse.Namespace) -> Pattern:
    import torch

    from hf_attn_plugin.config import LongformerConfig, SlidingWindowConfig, StridedConfig
    from hf_attn_plugin.patterns import Pattern

    options = METHODS[args.method]
    for name in ("window", "globals", "dilation", "sinks", "stride"):
        given = getattr(args, name)
        if given is not None and name not in options:
            flag = "global" if name == "globals" else name
            valid = ", ".join("--global" if o == "globals" else f"--{o}" for o in options)
            raise ValueError(f"{args.method} has no --{flag}; it takes {valid or 'none of these'}.")
        if given is None:
            setattr(args, name, options.get(name))
    if args.model_window is not None and args.model_window < 1:
        raise ValueError(f"--model-window must be at least 1, got {args.model_window}.")
    if args.length < 1:
        raise ValueError(f"--length must be at least 1, got {args.length}.")
    queries = args.length if args.queries is None else args.queries
    if not 1 <= queries <= args.length:
        raise ValueError(f"--queries must be from 1 to {args.length}, got {queries}.")
    terms: dict[str, int] = {}
    if args.method == "sliding_window":
        SlidingWindowConfig(args.window, args.sinks)
        terms = {"window": args.window, "num_sink_tokens": args.sinks}
    elif args.method == "longformer":
        LongformerConfig(args.window, args.globals, args.dilation)
        terms = {
            "window": args.window,
            "num_global_tokens": args.globals,
            "dilation": args.dilation,
        }
    elif args.method == "strided":
        StridedConfig(args.window, args.stride)
        terms = {"window": args.window, "stride": args.stride}
    valid_keys = documents = None
    if args.pad_left or args.pad_right:
        if min(args.pad_left, args.pad_right) < 0 or args.pad_left + args.pad_right > args.length:
            raise ValueError(f"--pad-left and --pad-right must fit --length {args.length}.")
        valid_keys = torch.zeros(1, args.length, dtype=torch.bool)
        valid_keys[:, args.pad_left : args.length - args.pad_right] = True
    if args.documents:
        parts = args.documents.split(",")
        lengths = [int(part) if part.strip().isdecimal() else 0 for part in parts]
        if min(lengths) < 1 or sum(lengths) != args.length:
            raise ValueError(
                f"--documents must be positive lengths that add up to --length {args.length}, "
                f"got {args.documents}."
            )
        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return Pattern(
        q_len=queries,
        kv_len=args.length,
        causal=not args.bidirectional,
        band=args.model_window,
        key_valid=valid_keys,
        q_documents=None if documents is None else documents[:, args.length - queries :],
        kv_documents=documents,
    ).replace(**terms)
