"""Forward passes and generation that a method cannot honour."""

from __future__ import annotations

from typing import Any

import torch
from tiny import LENGTH, random_ids, tiny_model
from transformers import BartConfig, BartModel, T5Config, T5Model

import hf_attn_plugin
from hf_attn_plugin import (
    LongformerConfig,
    Pattern,
    SlidingWindowConfig,
    SparQConfig,
    attention,
    count_reads,
    verify,
)

from .case import Case

AREA = "Forward passes"
GENERATION = "Generation and caches"
OPS = "Calling the operations directly"


def forward(
    attn: str, family: str = "llama", parameters: Any = None, rows: int = 2, **inputs: Any
) -> Any:
    model = tiny_model(family, attn)
    if parameters is not None:
        hf_attn_plugin.configure(model, parameters)
    return model(random_ids(rows, LENGTH), **inputs)


def in_training() -> Any:
    model = tiny_model("llama", "flash", attention_dropout=0.1).train()
    return model(random_ids(1, LENGTH))


def bart(attn: str) -> Any:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    model = BartModel._from_config(config, attn_implementation=attn).eval()
    return model(random_ids(1, 5), decoder_input_ids=random_ids(1, 3))


def t5() -> Any:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = T5Model._from_config(config, attn_implementation="flash").eval()
    return model(random_ids(1, 5), decoder_input_ids=random_ids(1, 3))


def lengths(**values: list[int]) -> dict[str, Any]:
    given = {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}
    return {**given, "max_length_q": LENGTH, "max_length_k": LENGTH}


def both(*values: int) -> dict[str, Any]:
    return lengths(cu_seq_lens_q=list(values), cu_seq_lens_k=list(values))


def continued_packing() -> Any:
    model = tiny_model("llama", "flash")
    cache = model(random_ids(1, 6)).past_key_values
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    return model(random_ids(1, 5), past_key_values=cache, position_ids=positions)


def changed_method() -> Any:
    model = tiny_model("llama", "sliding_window")
    hf_attn_plugin.configure(model, SlidingWindowConfig(4))
    with torch.no_grad():
        cache = model(random_ids(1, LENGTH)).past_key_values
        model.set_attn_implementation("flash")
        return model(random_ids(1, 1), past_key_values=cache)


def generate(attn: str, family: str = "llama", parameters: Any = None, **options: Any) -> Any:
    model = tiny_model(family, attn)
    if parameters is not None:
        hf_attn_plugin.configure(model, parameters)
    return model.generate(
        random_ids(1, 12), max_new_tokens=4, do_sample=False, pad_token_id=0, **options
    )


def batching(attn: str) -> Any:
    from transformers import GenerationConfig

    model = tiny_model("llama", attn)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None)
    return model.generate_batch([[5, 6, 7]], generation_config=config)


def counted_twice() -> None:
    model = tiny_model("llama", "sparq")
    with count_reads(model), count_reads(model):
        pass


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def attend(query: Any, key: Any, value: Any, pattern: Pattern | None = None, **options: Any) -> Any:
    return attention(query, key, value, pattern or Pattern(q_len=6, kv_len=6), **options)


QKV = ((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8))
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]


def biased() -> torch.Tensor:
    mask = torch.zeros(2, 1, LENGTH, LENGTH)
    mask[0, 0, 3, 1] = -0.5
    return mask


CASES = [
    Case(AREA, "training with attention_dropout=0.1, flash", lambda f: in_training(),
         ("'flash'", "0.1"), ("attention_dropout=0.0", "'sdpa'")),
    Case(AREA, "model(ids, output_attentions=True), flash",
         lambda f: forward("flash", output_attentions=True),
         ("'flash'", "output_attentions"), ("'eager'",)),
    Case(AREA, "model(ids, output_attentions=True), sparq on Gemma 2",
         lambda f: forward("sparq", "gemma2", output_attentions=True),
         ("'sparq'", "output_attentions"), ("'eager'",)),
    Case(AREA, "a 4D attention_mask that holds a bias (-0.5)",
         lambda f: forward("flash", attention_mask=biased()),
         ("'flash'", "bias"), ("'sdpa'",)),
    Case(AREA, "a 4D attention_mask of integers",
         lambda f: forward("flash", attention_mask=CAUSAL.long()),
         ("torch.int64",), ("bool (True attends)", "float")),
    Case(AREA, "a 4D attention_mask that is one query short",
         lambda f: forward("flash", attention_mask=CAUSAL[:, :, 1:]),
         (f"(1, 1, {LENGTH - 1}, {LENGTH})",), (f"{LENGTH}, {LENGTH}]",)),
    Case(AREA, "a 4D attention_mask for another batch size",
         lambda f: forward("sliding_window", attention_mask=CAUSAL.expand(3, -1, -1, -1)),
         ("batch of 3",), ("one of 2",)),
    Case(AREA, "a 3D attention_mask",
         lambda f: forward("flash", attention_mask=torch.ones(2, LENGTH, LENGTH)),
         (f"(2, {LENGTH}, {LENGTH})",), ("[batch, ",)),
    Case(AREA, "a 2D attention_mask for another batch size",
         lambda f: forward("flash", attention_mask=torch.ones(3, LENGTH).tril().long()),
         ("batch of 3",), ("query (2, ",)),
    Case(AREA, "global_attention_mask under sparq",
         lambda f: forward("sparq", global_attention_mask=torch.ones(2, LENGTH)),
         ("'sparq'", "global_attention_mask"), ("'longformer'",)),
    Case(AREA, "global_attention_mask that is a list",
         lambda f: forward("longformer", global_attention_mask=[[1] + [0] * (LENGTH - 1)] * 2),
         ("global_attention_mask", "list"), ("a tensor",)),
    Case(AREA, "global_attention_mask that is a token short",
         lambda f: forward("longformer", global_attention_mask=torch.ones(2, LENGTH - 1)),
         (f"(2, {LENGTH - 1})",), (f"[batch, {LENGTH}]",)),
    Case(AREA, "sink tokens, and a 4D attention_mask",
         lambda f: forward("sliding_window", parameters=SlidingWindowConfig(4, 1),
                           attention_mask=CAUSAL),
         ("'sliding_window'", "4D attention_mask"), ("2D attention_mask", "num_sink_tokens")),
    Case(AREA, "global tokens, and a 4D attention_mask",
         lambda f: forward("longformer", parameters=LongformerConfig(4), attention_mask=CAUSAL),
         ("'longformer'", "4D attention_mask"), ("2D attention_mask", "num_global_tokens")),
    Case(AREA, "cu_seq_lens_q without cu_seq_lens_k",
         lambda f: forward("flash", rows=1, **lengths(cu_seq_lens_q=[0, 5, LENGTH])),
         ("cu_seq_lens_q",), ("cu_seq_lens_k belong together",)),
    Case(AREA, "cu_seq_lens that end before the tokens do",
         lambda f: forward("flash", rows=1, **both(0, 5, 9)),
         ("[0, 5, 9]",), (f"from 0 to the {LENGTH} tokens",)),
    Case(AREA, "cu_seq_lens that do not start at 0",
         lambda f: forward("flash", rows=1, **both(2, LENGTH)),
         (f"[2, {LENGTH}]",), ("ascend from 0",)),
    Case(AREA, "cu_seq_lens that descend",
         lambda f: forward("flash", rows=1, **both(0, 9, 5, LENGTH)),
         ("[0, 9, 5",), ("ascend from 0",)),
    Case(AREA, "cu_seq_lens for a batch of two rows",
         lambda f: forward("flash", rows=2, **both(0, 5, LENGTH)),
         ("a batch of 2",), ("position_ids that start again",)),
    Case(AREA, "T5 under flash", lambda f: t5(),
         ("'flash'", "'position_bias'"), ("'sdpa' or 'eager'",)),
    Case(AREA, "BART under sliding_window", lambda f: bart("sliding_window"),
         ("'sliding_window'", "cross-attention"), ("'flash'",)),
    Case(AREA, "BART under strided", lambda f: bart("strided"),
         ("'strided'", "cross-attention"), ("'flash'",)),
    Case(AREA, "gpt-oss, sparq with mean_value_reallocation",
         lambda f: generate("sparq", "gpt_oss",
                            SparQConfig(2, 4, mean_value_reallocation=True)),
         ("mean_value_reallocation", "sinks"), ("mean_value_reallocation=False",)),
    Case(AREA, "gpt-oss under linear", lambda f: forward("linear", "gpt_oss"),
         ("'linear'", "sinks"), ("Use ",)),
    Case(AREA, "Gemma 2 under linear", lambda f: forward("linear", "gemma2"),
         ("'linear'", "softcap"), ("Use ",)),
    Case(GENERATION, "packed documents over a cache", lambda f: continued_packing(),
         ("packed documents", "cached"), ("a batch row of its own",)),
    Case(GENERATION, "a cache filled under sliding_window, continued under flash",
         lambda f: changed_method(),
         ("'flash'", "'sliding_window'"), ("DynamicCache()",)),
    Case(GENERATION, 'sparq, generate(cache_implementation="quantized")',
         lambda f: generate("sparq", cache_implementation="quantized",
                            cache_config={"backend": "quanto"}),
         ("sparq", "quantized"), ("key_copy='int8'", "'flash'")),
    Case(GENERATION, 'h2o, generate(cache_implementation="quantized")',
         lambda f: generate("h2o", cache_implementation="quantized"),
         ("'h2o'", "quantized"), ("default cache", "'flash'")),
    Case(GENERATION, 'linear, generate(cache_implementation="quantized")',
         lambda f: generate("linear", cache_implementation="quantized"),
         ("'linear'", "quantized"), ("default cache", "'flash'")),
    Case(GENERATION, "kv_cache_bytes(None)", lambda f: hf_attn_plugin.kv_cache_bytes(None),
         ("NoneType",), ("use_cache=True", "return_dict_in_generate=True")),
    Case(GENERATION, 'h2o, generate(cache_implementation="static")',
         lambda f: generate("h2o", cache_implementation="static"),
         ("'h2o'", "static"), ("'sparq'",)),
    Case(GENERATION, "h2o, generate(prompt_lookup_num_tokens=2)",
         lambda f: generate("h2o", prompt_lookup_num_tokens=2),
         ("'h2o'",), ("'sparq'",)),
    Case(GENERATION, "generate_batch under sparq", lambda f: batching("sparq"),
         ("sparq",), ("flash",), since="5.19"),
    Case(GENERATION, "generate_batch under sliding_window", lambda f: batching("sliding_window"),
         ("sliding_window",), ("flash",), since="5.19"),
    Case(GENERATION, "count_reads inside count_reads", lambda f: counted_twice(),
         ("count_reads",), ("already",)),
    Case(OPS, "attention of 3D tensors",
         lambda f: attend(*tensors((4, 6, 8), (4, 6, 8), (4, 6, 8))),
         ("(4, 6, 8)",), ("[batch, heads, tokens, dim]",)),
    Case(OPS, "attention with 3 KV heads for 4 query heads",
         lambda f: attend(*tensors((1, 4, 6, 8), (1, 3, 6, 8), (1, 3, 6, 8))),
         ("(1, 3, 6, 8)",), ("must divide",)),
    Case(OPS, "attention with a pattern for other lengths",
         lambda f: attend(*tensors(*QKV), Pattern(q_len=6, kv_len=9)),
         ("6 queries and 9 keys",), ("(1, 2, 6, 8)",)),
    Case(OPS, "attention of float32 queries and bfloat16 keys",
         lambda f: attend(*(t.to(d) for t, d in zip(
             tensors(*QKV), (torch.float32, torch.bfloat16, torch.bfloat16), strict=True))),
         ("torch.bfloat16",), ("share a float dtype",)),
    Case(OPS, "attention(..., softcap=0)", lambda f: attend(*tensors(*QKV), softcap=0.0),
         ("softcap", "0.0"), ("above 0, or None",)),
    Case(OPS, "attention(..., sinks) of 3 heads", lambda f: attend(
        *tensors(*QKV), sinks=torch.zeros(3)), ("(3,)",), ("one logit per query head, 4",)),
    Case(OPS, "Pattern(window=0)", lambda f: Pattern(q_len=4, kv_len=4, window=0),
         ("window", "0"), (">= 1",)),
    Case(OPS, "Pattern(key_valid) of integers",
         lambda f: Pattern(q_len=4, kv_len=4, key_valid=torch.ones(1, 4, dtype=torch.int64)),
         ("key_valid", "torch.int64"), ("torch.bool",)),
    Case(OPS, "Pattern(q_documents) without kv_documents",
         lambda f: Pattern(q_len=4, kv_len=4, q_documents=torch.zeros(1, 4, dtype=torch.int64)),
         ("q_documents",), ("kv_documents together",)),
    Case(OPS, "verify(torch.nn.Linear(2, 2))", lambda f: verify(torch.nn.Linear(2, 2)),
         ("Linear",), ("a transformers model",)),
    Case(OPS, 'verify(model, "some text")',
         lambda f: verify(tiny_model("llama", "flash"), "some text"),  # type: ignore[arg-type]
         ("str",), ("{'input_ids': ...}",)),
    Case(OPS, "verify(model, length=4)", lambda f: verify(tiny_model("llama", "flash"), length=4),
         ("got 4",), ("from 8 to 128",)),
    Case(OPS, "verify(model, length=4096) of a model that takes 128",
         lambda f: verify(tiny_model("llama", "flash"), length=4096),
         ("got 4096",), ("from 8 to 128",)),
    Case(OPS, "verify(model, batch, length=64)",
         lambda f: verify(tiny_model("llama", "flash"), random_ids(1, 9), length=64),
         ("length",), ("batches made here",)),
    Case(OPS, "verify(bloom, ids)", lambda f: verify(_bloom(), random_ids(1, 8)),
         ("BloomModel",), ("Llama, Mistral",)),
]  # fmt: skip


def _bloom() -> Any:
    from transformers import BloomConfig, BloomModel

    return BloomModel(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64))
