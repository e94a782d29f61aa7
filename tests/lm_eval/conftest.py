"""A tiny Llama and a tokenizer trained on the spot, on text that every machine has."""

import random

import pytest

pytest.importorskip("lm_eval")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_attn_plugin.lm_eval.texts import standard_library


@pytest.fixture(scope="session")
def text() -> str:
    files = standard_library()[:12]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    return "\n\n".join(texts)[:250_000]


def _tokenizer(text, bos):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session", params=[False, True], ids=["no_bos", "bos"])
def any_tokenizer(request, text):
    return _tokenizer(text, request.param)


@pytest.fixture(scope="session")
def tokenizer(text):
    return _tokenizer(text, True)


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)
