"""The stages before the evaluation: text, pretraining, long context, conversion."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_attn_plugin.config import configure
from hf_attn_plugin.convert import extend_context, to_gqa
from hf_attn_plugin.quickstart.documents import (
    DocumentMaker,
    Mix,
    TrainingBatches,
    make_batch,
)
from hf_attn_plugin.quickstart.settings import QuickstartSettings
from hf_attn_plugin.quickstart.text import Corpus, train_tokenizer
from hf_attn_plugin.quickstart.training import Curriculum, measure, train
from hf_attn_plugin.quickstart.workspace import Workspace

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# Numbers that keep the random streams of the stages apart.
_PRETRAIN, _FINETUNE, _UPTRAIN, _HELD_OUT = range(4)

TEXT, PRETRAINED, FINETUNED, CONVERTED = "text", "pretrained", "finetuned", "converted"
HELD_OUT_FILE = "held_out.txt"


class Stages:
    """Runs each stage that is not finished yet, and takes the others from the folder.

    Args:
        settings: Sizes and steps.
        workspace: The output folder.
        corpus: The text.
        seed: Draws the model and the documents.
        progress: Progress bars: True, False, or None for on terminals only.
        say: Told what is going on, a line at a time.
    """

    def __init__(
        self,
        settings: QuickstartSettings,
        workspace: Workspace,
        corpus: Corpus,
        seed: int,
        progress: bool | None,
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.workspace = workspace
        self.corpus = corpus
        self.seed = seed
        self.progress = progress
        self.say = say

    def prepare_text(self) -> PreTrainedTokenizerBase:
        """Stage 1: train the tokenizer, encode the text, put a part aside."""
        started = time.perf_counter()
        folder = self.workspace.path(TEXT)
        if not folder.exists():
            self.workspace.write(TEXT, self._write_text)
        tokenizer = _load_tokenizer(folder)
        self.tokens = len(tokenizer)
        tokens = np.load(folder / "train.npy")
        held_out = np.load(folder / "held_out.npy")
        self.train_documents = DocumentMaker(tokenizer, tokens)
        self.held_out_documents = DocumentMaker(tokenizer, held_out)
        self._record(
            TEXT,
            started,
            {
                "source": self.corpus.source,
                "train_tokens": len(tokens),
                "held_out_tokens": len(held_out),
                "bytes_per_token": len("".join(self.corpus.held_out).encode()) / len(held_out),
            },
        )
        return tokenizer

    def _write_text(self, folder: Path) -> None:
        tokenizer = train_tokenizer(
            self.corpus.train, self.settings.vocab_size, self.settings.long_context
        )
        tokenizer.save_pretrained(folder)
        for name, texts in (("train", self.corpus.train), ("held_out", self.corpus.held_out)):
            rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            np.save(folder / f"{name}.npy", np.concatenate([np.array(row) for row in rows]))
        (folder / HELD_OUT_FILE).write_text("\n".join(self.corpus.held_out), encoding="utf-8")

    def pretrain(self) -> LlamaForCausalLM:
        """Stage 2: teach a new model text and retrieval, in sequences that grow."""
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = self.settings
        if self.workspace.path(PRETRAINED).exists():
            return self._load(PRETRAINED)
        started = time.perf_counter()
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.tokens,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            max_position_embeddings=settings.context,
            initializer_range=settings.initializer_range,
            attention_bias=True,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                torch.nn.init.normal_(parameter, std=settings.bias_range)
        curriculum = Curriculum(
            settings.first_length, settings.context, threshold=settings.advance_accuracy
        )
        self._train(
            model,
            PRETRAINED,
            curriculum,
            stage=_PRETRAIN,
            description="text and retrieval",
            steps=settings.pretrain_steps,
            learning_rate=settings.pretrain_lr,
            weight_decay=0.01,
            decay_share=0.4,
        )
        measured = measure(
            model,
            self._held_out(
                settings.context, self._mix(_PRETRAIN, settings.pretrain_steps), packed=False
            ),
        )
        self._finish(
            model,
            PRETRAINED,
            started,
            {
                **measured,
                "steps": settings.pretrain_steps,
                "parameters": model.num_parameters(),
                "lengths_reached_at_step": {
                    str(length): step for step, length in curriculum.changes
                },
            },
        )
        return model

    def finetune(self) -> LlamaForCausalLM:
        """Stage 3: extend the context with a sparse attention, scaled RoPE, LoRA and packing."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, LlamaForCausalLM

        settings = self.settings
        if self.workspace.path(FINETUNED).exists():
            return self._load(FINETUNED)
        started = time.perf_counter()
        folder = self.workspace.path(PRETRAINED)
        config = extend_context(AutoConfig.from_pretrained(folder), settings.long_context, "linear")
        configure(config, settings.longformer)
        model = LlamaForCausalLM.from_pretrained(
            folder, config=config, attn_implementation="longformer"
        )
        torch.manual_seed(self.seed)
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules="all-linear"
            ),
        )
        self._train(
            adapted,
            FINETUNED,
            Curriculum(settings.long_context, settings.long_context),
            stage=_FINETUNE,
            description="long context",
            steps=settings.finetune_steps,
            learning_rate=settings.finetune_lr,
            weight_decay=0.0,
            decay_share=0.5,
        )
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        merged: Any = adapted.merge_and_unload()
        self._finish(
            merged,
            FINETUNED,
            started,
            {
                **measure(merged, self.long_held_out()),
                "steps": settings.finetune_steps,
                "context": settings.long_context,
                "lora_parameters": trained,
            },
        )
        return merged

    def convert(self) -> LlamaForCausalLM:
        """Stage 4: pool the key/value heads, and train on for a few steps."""
        settings = self.settings
        if self.workspace.path(CONVERTED).exists():
            return self._load(CONVERTED)
        started = time.perf_counter()
        model = self._load(FINETUNED)
        rows = self.long_held_out()
        before = measure(model, rows)
        to_gqa(model, settings.num_key_value_heads)
        converted = measure(model, rows)
        self._train(
            model,
            CONVERTED,
            Curriculum(settings.long_context, settings.long_context),
            stage=_UPTRAIN,
            description="after conversion",
            steps=settings.uptrain_steps,
            learning_rate=settings.uptrain_lr,
            weight_decay=0.0,
            decay_share=0.8,
        )
        after = measure(model, rows)
        self._finish(
            model,
            CONVERTED,
            started,
            {
                "heads": [settings.num_heads, settings.num_key_value_heads],
                "steps": settings.uptrain_steps,
                "before": before,
                "converted": converted,
                "uptrained": after,
            },
        )
        return model

    def long_held_out(self) -> list[dict[str, torch.Tensor]]:
        """Packed rows of held-out text on which the long-context losses are measured."""
        return self._held_out(self.settings.long_context, self._mix(_FINETUNE, 0), packed=True)

    def _mix(self, stage: int, step: int, length: int | None = None) -> Mix:
        """What the documents of a step are made of."""
        settings = self.settings
        growing, first, second, afterwards = settings.fact_shares
        if stage != _PRETRAIN:
            return Mix(afterwards, settings.window, settings.global_tokens)
        if length is not None and length < settings.context:
            return Mix(growing)
        return Mix(first if step < settings.pretrain_steps // 2 else second)

    def _held_out(self, length: int, mix: Mix, packed: bool) -> list[dict[str, torch.Tensor]]:
        return [
            make_batch(
                self.held_out_documents,
                np.random.default_rng([_HELD_OUT, number]),
                4,
                length,
                mix,
                packed,
            )
            for number in range(max(1, self.settings.held_out_rows // 4))
        ]

    def _train(
        self,
        model: Any,
        name: str,
        curriculum: Curriculum,
        *,
        stage: int,
        description: str,
        steps: int,
        learning_rate: float,
        weight_decay: float,
        decay_share: float,
    ) -> None:
        long = stage != _PRETRAIN
        resume_from = self.workspace.last_checkpoint(name)
        if resume_from is not None:
            self.say(f"going on from {resume_from}")
        train(
            model,
            TrainingBatches(
                self.train_documents,
                steps,
                self.settings.tokens_per_step,
                curriculum.length_at,
                (self.seed, stage),
                lambda step: self._mix(stage, step, curriculum.length_at(step)),
                packed=long,
            ),
            curriculum,
            description=description,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            decay_share=decay_share,
            save_steps=self.settings.save_steps,
            checkpoints=self.workspace.checkpoints(name),
            resume_from=resume_from,
            seed=self.seed,
            progress=self.progress,
        )

    def _finish(self, model: Any, name: str, started: float, measured: Mapping[str, Any]) -> None:
        # The numbers first: a folder that exists is finished.
        self._record(name, started, measured)
        self.workspace.write(name, model.save_pretrained)
        self.workspace.drop_checkpoints(name)

    def _record(self, name: str, started: float, measured: Mapping[str, Any]) -> None:
        if name not in self.workspace.results:
            seconds = round(time.perf_counter() - started, 1)
            self.workspace.record(name, {**measured, "seconds": seconds})

    def _load(self, name: str) -> LlamaForCausalLM:
        from transformers import LlamaForCausalLM

        attention = "sdpa" if name == PRETRAINED else "longformer"
        return LlamaForCausalLM.from_pretrained(
            self.workspace.path(name), attn_implementation=attention
        )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
