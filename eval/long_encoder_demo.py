"""An encoder trained at 128 tokens, converted to 1024 and trained on: held-out masked-LM losses.

    python eval/long_encoder_demo.py --folder /tmp/long_encoder

Trains a byte-level BPE tokenizer and a small RoBERTa at 128 tokens on the Python standard library's
sources (or --text FILE...), then runs recipes/train_long_encoder.py on it. Some minutes on 2 CPU
cores. The table goes to eval/results/long_encoder_demo.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_attn_plugin.masked_lm import MaskingCollator, encoder_rows
from hf_attn_plugin.quickstart.text import read_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "eval" / "results" / "long_encoder_demo.md"
OLD, NEW = 128, 1024


def train_tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer with RoBERTa's special tokens at its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=OLD,
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def pretrain(
    folder: Path, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...], steps: int
) -> None:
    """Train a small RoBERTa at the old length and save it."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    documents = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = list(encoder_rows(documents, OLD, tokenizer.cls_token_id, tokenizer.sep_token_id))
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=OLD + 2,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
    )
    model = RobertaForMaskedLM(config)
    collate = MaskingCollator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(rows), (16,)).tolist()
        loss = model(**collate([rows[i] for i in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Pretrain, run the recipe, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True, help="for models and checkpoints")
    parser.add_argument("--text", nargs="+", default=[], help="text files")
    parser.add_argument("--steps", type=int, default=1000, help="at 128 tokens, 16 rows each")
    parser.add_argument("--long_steps", type=int, default=60, help="at 1024 tokens, 4 rows each")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    start = time.monotonic()
    corpus = read_corpus(args.text)
    args.folder.mkdir(parents=True, exist_ok=True)
    short, long, text = (args.folder / name for name in ("short", "long", "held_out.txt"))
    if not (short / "tokenizer.json").exists():
        pretrain(short, train_tokenizer(corpus.train), corpus.train, args.steps)
    # The recipe trains on the same text, and measures on the end of it, which is held out.
    text.write_text("\n\n".join((*corpus.train, *corpus.held_out)), encoding="utf-8")
    held_out = sum(map(len, corpus.held_out)) / text.stat().st_size
    line = [
        *(sys.executable, str(ROOT / "recipes" / "train_long_encoder.py")),
        *("--model", str(short), "--text", str(text), "--out", str(long)),
        *("--max_positions", str(NEW), "--window", str(args.window)),
        *("--max_steps", str(args.long_steps), "--learning_rate", "5e-4"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8"),
        *("--eval_fraction", f"{0.5 * held_out:.4f}", "--warmup_steps", "10"),
        *("--disable_tqdm", "true", "--use_cpu", "--report_to", "none"),
    ]
    subprocess.run(line, check=True)
    losses = json.loads((long / "long_encoder_results.json").read_text())
    command = f"python eval/long_encoder_demo.py {' '.join(sys.argv[1:])}"
    lines = [
        f"Made by `{command}`: a RoBERTa of 4 layers and width 128,",
        f"{args.steps} steps at {OLD} tokens on {corpus.source}, then {args.long_steps} steps at",
        f"{NEW} tokens under `longformer` with window {args.window};",
        f"{time.monotonic() - start:.0f} seconds, {torch.get_num_threads()} CPU threads.",
        "Masked-LM loss (nats) on the same held-out text:",
        "",
        f"| | rows of {OLD} tokens | rows of {NEW} tokens |",
        "|---|---|---|",
    ]
    for when in ("before_conversion", "after_conversion", "after_training"):
        found = [losses.get(f"loss_{when}_at_{length}") for length in (OLD, NEW)]
        cells = " | ".join("not possible" if x is None else f"{x:.3f}" for x in found)
        lines.append(f"| {when.replace('_', ' ')} | {cells} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
