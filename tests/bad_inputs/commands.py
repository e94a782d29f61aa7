"""Lines of `hf-attn` that cannot be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_config, tiny_model

from .case import Case, command

EVAL = "hf-attn eval and sweep"
SHOW = "hf-attn show"
VERIFY = "hf-attn verify and doctor"
CONVERT = "hf-attn convert-gqa, convert-long and quickstart"


def line(area: str, written: str, asked: tuple[str, ...], instead: tuple[str, ...]) -> Case:
    """A line as it is typed; MODEL is a folder with a model, EMPTY one without, ADAPTER PEFT's."""

    def run(folder: Path) -> None:
        words = written.split()
        if "MODEL" in words:
            model = tiny_model("llama")
            model.save_pretrained(folder)
        if "CONFIG" in words:
            config: Any = tiny_config("llama", architectures=["LlamaForCausalLM"])
            config.save_pretrained(folder)
        if "ADAPTER" in words:
            (folder / "adapter_config.json").write_text("{}")
        names = dict.fromkeys(("MODEL", "CONFIG", "EMPTY", "ADAPTER"), folder)
        names["out"] = folder / "out"
        command(*(names.get(word, word) for word in words))

    return Case(area, f"hf-attn {written}", run, asked, instead)


CASES = [
    line(EVAL, "eval CONFIG --rank 32 --tasks niah",
         ("--rank",), ("Choose the method with --attn",)),
    line(EVAL, "eval CONFIG --attn sparq --window 512 --tasks niah", ("--window", "sparq"),
         ("--rank, --top-k",)),
    line(EVAL, "eval CONFIG --attn sdpa --top-k 64 --tasks niah", ("--top-k", "sdpa"),
         ("Choose the method with --attn",)),
    line(EVAL, "eval CONFIG --attn sparkle --tasks niah",
         ("'sparkle'",), ("registered are", "sparq")),
    line(EVAL, "eval CONFIG --attn sparq --rank 0 --tasks niah",
         ("rank", "0"), ("an integer >= 1",)),
    line(EVAL, "eval MODEL --attn sparq --no-decode-continuation --tasks niah",
         ("'sparq' acts in decoding only",), ("--no-decode-continuation", "'flash'")),
    line(EVAL, "eval CONFIG --heatmap needles.png --tasks long_bpb", ("--heatmap", "long_bpb"),
         ("add niah to --tasks",)),
    line(EVAL, "eval CONFIG --heatmap needles.doc --tasks niah", ("needles.doc",), (".png, .svg",)),
    line(EVAL, "eval CONFIG --model vllm --tasks niah", ("first argument",),
         ("python -m hf_attn_plugin.lm_eval run",)),
    line(EVAL, "eval no/such/folder --tasks niah", ("no/such/folder",), ("save_pretrained",)),
    line(SHOW, "show longformer --stride 4", ("longformer", "--stride"), ("--window, --global",)),
    line(SHOW, "show flash --window 4", ("flash", "--window"), ("none of these",)),
    line(SHOW, "show sliding_window --window 0", ("window", "0"), ("an integer >= 1",)),
    line(SHOW, "show sliding_window --length 0", ("--length", "0"), ("at least 1",)),
    line(SHOW, "show sliding_window --queries 40 --length 32",
         ("--queries", "40"), ("from 1 to 32",)),
    line(SHOW, "show flash --model-window 0", ("--model-window", "0"), ("at least 1",)),
    line(SHOW, "show flash --documents 10,10 --length 32", ("10,10",), ("add up to --length 32",)),
    line(SHOW, "show flash --documents 10,x --length 32", ("10,x",), ("positive lengths",)),
    line(SHOW, "show flash --pad-left 40 --length 32", ("--pad-left",), ("fit --length 32",)),
    line(SHOW, "show flash --png pattern.doc", ("pattern.doc",), (".png",)),
    line(SHOW, "show sparkle", ("'sparkle'",), ("longformer", "strided")),
    line(VERIFY, "verify no/such/folder --attn flash", ("no/such/folder",), ("save_pretrained",)),
    line(VERIFY, "verify EMPTY --attn flash", ("no config.json",), ("save_pretrained",)),
    line(VERIFY, "verify ADAPTER --attn flash", ("PEFT adapter",), ("merge_and_unload",)),
    line(VERIFY, "verify CONFIG --attn flahs", ("'flahs'",), ("registered are", "flash")),
    line(VERIFY, "verify CONFIG", ("--attn",), ("required",)),
    line(VERIFY, "verify CONFIG --attn longformer --rank 4", ("--rank", "longformer"),
         ("--window, --num-global-tokens",)),
    line(VERIFY, "verify CONFIG --attn flash --text missing.txt",
         ("missing.txt",), ("no text file",)),
    line(VERIFY, "verify MODEL --attn flash --length 4096", ("4096",), ("from 8 to 128",)),
    line(VERIFY, "verify CONFIG --attn flash --dtype float8", ("'float8'",), ("bfloat16",)),
    line(VERIFY, "doctor --attn sparq", ("--attn",), ("hf-attn doctor MODEL",)),
    line(VERIFY, "doctor --rank 4", ("--rank",), ("--attn",)),
    line(VERIFY, "doctor EMPTY", ("no config.json",), ("save_pretrained",)),
    line(VERIFY, "doctor CONFIG --length 100000", ("100000",), ("from 2 to 128",)),
    line(VERIFY, "doctor CONFIG --attn sparq --rank 64", ("rank", "64"), ("from 1 to 8",)),
    line(CONVERT, "convert-gqa MODEL --kv-heads 3 --out out",
         ("cannot become 3",), ("one of 1, 2",)),
    line(CONVERT, "convert-gqa MODEL --kv-heads 1 --out MODEL",
         ("own folder",), ("choose another",)),
    line(CONVERT, "convert-gqa ADAPTER --kv-heads 1 --out out", ("PEFT adapter",), ("merge",)),
    line(CONVERT, "convert-gqa no/such/folder --kv-heads 1 --out out", ("no/such/folder",),
         ("a folder",)),
    line(CONVERT, "convert-gqa MODEL --kv-heads 1 --method median --out out",
         ("'median'",), ("mean",)),
    line(CONVERT, "convert-long MODEL --max-positions 512 --out out", ("llama",),
         ("extend_context",)),
    line(EVAL, "sweep CONFIG --out out --batch-size 0", ("--batch-size",), ("at least 1",)),
    line(EVAL, "sweep CONFIG --out out --metric accuracy", ("'accuracy'",), ("TASK=NAME",)),
    line(CONVERT, "quickstart --seed -1", ("--seed", "-1"), (">= 0",)),
    line(CONVERT, "quickstart --text missing.txt", ("missing.txt",), ("No such file",)),
    line(CONVERT, "evaluate CONFIG", ("'evaluate'",), ("eval",)),
]  # fmt: skip
