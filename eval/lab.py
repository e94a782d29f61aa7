"""Train the lab model: small, but it can look things up in 2048 tokens of real text.

    python eval/lab.py --out runs/lab --bf16     # four minutes on one H200

The tables in eval/results that need a model which has really learnt something are measured on it.
It is a Llama with as many KV heads as query heads, heads of 64, and it reads Python sources (those
of the standard library, torch and transformers, which every installation of this package has) in
which facts are stated and asked for again, as `niah` does, and passages come twice, as in
`repetition`. Killed and started again, it goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_attn_plugin.data import IGNORE_INDEX
from hf_attn_plugin.lm_eval.needle import NeedleTemplate
from hf_attn_plugin.quickstart.settings import TEMPLATE as WORD_TEMPLATE
from hf_attn_plugin.quickstart.text import train_tokenizer
from hf_attn_plugin.training import train_from_last_checkpoint

TEMPLATES = (NeedleTemplate(), WORD_TEMPLATE)
"""Numbers, the default of `niah`, and single words, as in the quickstart."""

PACKAGES = ("torch", "transformers")
HELD_OUT_EVERY = 40
TEXT, FACT, COPY = 0, 1, 2
"""What a token is: text, a value that nobody can foresee, something that stands earlier."""

# A passage that comes again can be told from new text only after some tokens.
_RECOGNISED = 8


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """The lab model's options, beside Trainer's."""

    output_dir: str = field(metadata={"aliases": ["--out"], "help": "checkpoints, final model"})
    hidden_size: int = 512
    num_layers: int = 6
    vocab_size: int = 4096
    context: int = 2048
    first_context: int = 256
    tokens_per_step: int = 65536
    max_steps: int = 2500
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    adam_beta2: float = 0.98
    warmup_steps: float = 200
    lr_scheduler_type: str = "cosine"
    dataloader_num_workers: int = 8
    logging_steps: float = 100
    save_steps: float = 500
    save_total_limit: int | None = 1
    remove_unused_columns: bool = False
    per_device_train_batch_size: int = 1


def read_sources() -> tuple[list[str], list[str]]:
    """Python source files to train on, and every 40th, held out."""
    paths = {name: Path(path) for name, path in sysconfig.get_paths().items()}
    standard = paths["stdlib"].rglob("*.py")
    files = sorted(f for f in standard if not {"site-packages", "dist-packages"} & set(f.parts))
    for name in PACKAGES:
        files += sorted((paths["purelib"] / name).rglob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    texts = [text for text in texts if len(text) > 1000]
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], texts[::HELD_OUT_EVERY]


class Documents:
    """Makes documents out of a stream of tokens.

    Args:
        tokenizer: Encodes the facts.
        tokens: The text, int64 ``[tokens]``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens

    def make(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and what they are, int64 ``[length]`` each."""
        facts = self._facts(rng, rng.randint(1, max(1, length // 100)))
        room = length - sum(len(ids) for ids, _ in facts)
        start = rng.randrange(len(self.tokens) - length)
        text = self.tokens[start : start + room].copy()
        kinds = np.full(room, TEXT, dtype=np.int64)
        if rng.random() < 0.5:
            passage = rng.randint(min(32, room // 4), max(room // 4, 33))
            first = rng.randint(0, room - 2 * passage)
            second = rng.randint(first + passage, room - passage)
            text[second : second + passage] = text[first : first + passage]
            kinds[second + _RECOGNISED : second + passage] = COPY
        cuts = sorted(rng.randint(0, room) for _ in facts)
        columns = []
        for whole, index in ((text, 0), (kinds, 1)):
            pieces = np.split(whole, cuts)
            rest = (
                part
                for fact, piece in zip(facts, pieces[1:], strict=True)
                for part in (fact[index], piece)
            )
            columns.append(np.concatenate([pieces[0], *rest]))
        return columns[0], columns[1]

    def _facts(self, rng: random.Random, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Every fact twice, in any order: the first time it is told, the second it is asked for."""
        template = rng.choice(TEMPLATES)
        keys = rng.sample(template.keys, min(number, len(template.keys)))
        values = {key: template.draw_value(rng) for key in keys}
        order = keys * 2
        rng.shuffle(order)
        told: set[str] = set()
        facts = []
        for key in order:
            sentence = template.needle.format(key=key, value=values[key])
            ids = self._encode(sentence)
            first = len(self._encode(template.question.format(key=key)))
            last = len(self._encode(sentence[: sentence.rindex(values[key])] + values[key]))
            kinds = np.full(len(ids), TEXT, dtype=np.int64)
            kinds[first:last] = COPY if key in told else FACT
            told.add(key)
            facts.append((ids, kinds))
        return facts

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


class Batches(Dataset[dict[str, torch.Tensor]]):
    """One batch per step, made from its index alone, so that a resumed run sees the same."""

    def __init__(self, documents: Documents, args: Arguments) -> None:
        self.documents = documents
        self.args = args

    def __len__(self) -> int:
        return self.args.max_steps

    def length_at(self, step: int) -> int:
        """Tokens per row: they double at equal intervals of the first half of the training."""
        doublings = int(math.log2(self.args.context // self.args.first_context))
        done = min(doublings, step * 2 * (doublings + 1) // self.args.max_steps)
        return self.args.first_context * 2**done

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        length = self.length_at(step)
        return make_batch(
            self.documents,
            random.Random(f"{self.args.seed} {step}"),
            max(1, self.args.tokens_per_step // length),
            length,
        )


def make_batch(
    documents: Documents, rng: random.Random, rows: int, length: int
) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `kinds`, int64 ``[rows, length]`` each."""
    made = [documents.make(rng, length) for _ in range(rows)]
    ids, kinds = (torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(kinds == FACT, IGNORE_INDEX),
        "kinds": kinds,
    }


class LabTrainer(Trainer):
    """Trainer over batches in their order, in whose loss copies count as much as all the text."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        batches: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean loss of the text plus mean loss of the copies."""
        text, copies, _ = losses(model, inputs)
        return text.mean() + copies.mean()


def losses(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of the text and of the copies, and which copies were right; one-dimensional."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels, kinds = batch["labels"][:, 1:], batch["kinds"][:, 1:]
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(labels)
    right = logits.argmax(-1) == labels
    return loss[kinds == TEXT], loss[kinds == COPY], right[kinds == COPY]


def only_item(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batches come ready made."""
    return items[0]


def write_text(folder: Path, args: Arguments) -> None:
    """Train the tokenizer and encode the text, once."""
    train, held_out = read_sources()
    tokenizer = train_tokenizer(train[::8], args.vocab_size, args.context)
    for name, texts in (("train", train), ("held_out", held_out)):
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        np.save(folder / f"{name}.npy", np.concatenate([np.array(row) for row in rows]))
    # Both commands that measure the model take text files.
    (folder / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    (folder / "train.txt").write_text("\n".join(train[::8]), encoding="utf-8")
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def measure(model: LlamaForCausalLM, documents: Documents, context: int) -> dict[str, float]:
    """Loss of held-out text in nats, and the share of right copies."""
    model.eval()
    rng = random.Random("held out")
    parts = []
    for _ in range(8):
        batch = make_batch(documents, rng, 4, context)
        parts.append(losses(model, {name: t.to(model.device) for name, t in batch.items()}))
    text, _, right = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"loss": float(text.mean()), "copies_right": float(right.float().mean())}


def main() -> None:
    """Make the text, train, measure and save."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer_config.json").exists():
        write_text(out, args)
    tokenizer = AutoTokenizer.from_pretrained(out)
    set_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            max_position_embeddings=args.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    trainer = LabTrainer(
        model=model,
        args=args,
        data_collator=only_item,
        train_dataset=Batches(Documents(tokenizer, np.load(out / "train.npy")), args),
    )
    train_from_last_checkpoint(trainer)
    measured = measure(model, Documents(tokenizer, np.load(out / "held_out.npy")), args.context)
    model.config.use_cache = True  # Trainer turns the cache off, and would save that.
    model.save_pretrained(out)
    (out / "lab.json").write_text(
        json.dumps(
            {**measured, "steps": args.max_steps, "tokens": args.max_steps * args.tokens_per_step}
        ),
        encoding="utf-8",
    )
    print(measured)


if __name__ == "__main__":
    main()
