"""Tiny models of many families, inputs for them, and the comparison that all model tests share.

The weights are large enough (``initializer_range``) for attention to be far from uniform: with
transformers' default of 0.02 a wrong mask changes the logits of a tiny model by next to nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 64
WINDOW = 6  # of the models that have one
LENGTH = 20

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 8}
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# All experts take part, so that rounding cannot change the routing.
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": WINDOW},
    "gemma2": {**_GQA, **_HYBRID, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GQA, **_HYBRID, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_GQA, **_HYBRID, **_EXPERTS},
    "qwen3": _GQA,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _NO_DROPOUT,
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1},
}
FAMILIES = {**DECODERS, **ENCODERS}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a two-layer model."""
    return CONFIG_MAPPING[family](**{**_SHAPE, **FAMILIES.get(family, {}), **overrides})


def from_config(config: Any, attn: str | dict[str, str], **kwargs: Any) -> Any:
    """A language model of a copy of this config, in eval mode."""
    config = copy.deepcopy(config)
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
        encoder = config.model_type in ENCODERS
        if type(config) in auto._model_mapping and not (encoder and auto is AutoModelForCausalLM):
            model = auto.from_config(config, attn_implementation=attn, **kwargs).eval()
            model.set_experts_implementation("eager")  # the default knows no float64
            return model
    raise AssertionError(f"no model for {type(config).__name__}")


def tiny_model(family: str, attn: str = "eager", seed: int = 0, **overrides: Any) -> Any:
    """A random two-layer language model in eval mode."""
    torch.manual_seed(seed)
    model = from_config(tiny_config(family, **overrides), attn)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # gpt-oss leaves them at zero
            nn.init.normal_(parameter, std=1.0)
    return model


def twin(model: Any, attn: str) -> Any:
    """The same model with another attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(attn)
    return other


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padding_mask(length: int, pads: list[int], side: str) -> Tensor:
    """A 2D attention mask with so many padding tokens per row."""
    index = torch.arange(length)
    rows = [index >= p if side == "left" else index < length - p for p in pads]
    return torch.stack(rows).long()


def pack_positions(rows: list[list[int]]) -> Tensor:
    """position_ids that restart at every document; ``rows`` holds the documents' lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def document_numbers(rows: list[list[int]]) -> Tensor:
    """The document of every token."""
    return torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(r)]) for r in rows])


def pairs(
    batch: int,
    length: int,
    rule: Callable[[int, int], bool],
    valid: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """A mask drawn pair by pair, bool ``[batch, 1, length, length]``.

    Args:
        rule: Of the query's and the key's index among the valid tokens of their document.
        valid: ``[batch, length]``, 0 at padding.
        documents: ``[batch, length]``.
    """
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        place, number, seen = [], [], {}
        for t in range(length):
            document = 0 if documents is None else int(documents[b, t])
            place.append(seen.get(document, 0))
            number.append(document)
            if valid is None or valid[b, t]:
                seen[document] = place[-1] + 1
        for q in range(length):
            for k in range(length):
                real = valid is None or bool(valid[b, q] and valid[b, k])
                if real and number[q] == number[k]:
                    mask[b, 0, q, k] = rule(place[q], place[k])
    return mask


def drawn_masks(
    model: Any,
    batch: int,
    length: int,
    rule: Callable[[int, int], bool],
    valid: Tensor | None = None,
    documents: Tensor | None = None,
) -> Any:
    """Additive masks for eager: ``rule`` within what this decoder lets attend by itself."""

    def draw(own: Callable[[int, int], bool]) -> Tensor:
        both = lambda q, k: k <= q and own(q, k) and rule(q, k)  # noqa: E731
        return additive(pairs(batch, length, both, valid, documents))

    kinds = getattr(model.config, "layer_types", None) or []
    window = getattr(model.config, "sliding_window", None)
    narrow = lambda q, k: q - k < window  # noqa: E731
    if "sliding_attention" in kinds:
        return {"full_attention": draw(lambda q, k: True), "sliding_attention": draw(narrow)}
    return draw(narrow if window else lambda q, k: True)


def counted_positions(valid: Tensor) -> Tensor:
    """position_ids as ``generate`` makes them from a padding mask."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def additive(mask: Tensor) -> Tensor:
    """A bool mask as eager attention wants it: 0 where a pair attends."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


class Float64(TorchFunctionMode):
    """Runs models in float64 throughout: they cast to float32 in norms, softmax and RoPE."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.__deepcopy__:  # its memo holds all tensors copied so far
            return func(*args, **(kwargs or {}))
        widen = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))


def _run(model: Any, weights: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Logits where ``weights`` is not zero, and all gradients of the weighted logits."""
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * weights[..., None].to(logits.dtype)).sin().sum().backward()
    result = {"logits": logits.detach()[weights != 0]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[name] = parameter.grad.detach().clone()
    return result


def loss_weights(valid: Tensor | None, batch: int, length: int) -> Tensor:
    """Random weights of the positions in the loss, 0 at padding."""
    weights = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) + 0.1
    return weights if valid is None else weights * valid


def results(
    model: Any, inputs: dict[str, Any], valid: Tensor | None = None, double: bool = False
) -> dict[str, Tensor]:
    """Logits at valid positions and gradients of every parameter."""
    batch, length = inputs["input_ids"].shape
    weights = loss_weights(valid, batch, length)
    if not double:
        return _run(model, weights, inputs)
    widened = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    with Float64():
        return _run(copy.deepcopy(model).double(), weights, widened)


def excess(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    """By how much each result leaves the budget; nothing above 1 is within it.

    The budget is twice eager's own error against float64, and a floor for rounding, both in the
    norm over the whole tensor: an element's error is too small a sample. The floor is measured
    by the largest gradient of the decoder layer, since some tensors are small samples too (sinks),
    or zero in truth and rounding in fact (key biases).
    """
    assert ours.keys() == eager.keys() == exact.keys(), "some parameter has no gradient"
    layer = {name: re.sub(r"(?<=\d)\..*", "", name) for name in exact}
    scale: dict[str, float] = {}
    for name, truth in exact.items():
        scale[layer[name]] = max(scale.get(layer[name], 0.0), float(truth.norm()))
    used = {}
    for name, truth in exact.items():
        floor = 8 * torch.finfo(torch.float32).eps * scale[layer[name]]
        budget = 2 * (eager[name].double() - truth).norm() + floor + 1e-9
        error = (ours[name].double() - truth).norm()
        used[name] = float("inf") if error.isnan() else float(error / budget)
    return used


def assert_within_budget(
    ours: Any,
    eager: Any,
    inputs: dict[str, Any],
    *,
    reference: dict[str, Any] | None = None,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """``ours`` computes what ``eager`` computes, logits and gradients.

    Args:
        ours: The model under test.
        eager: The same model with eager attention.
        inputs: What ``ours`` is called with.
        reference: What ``eager`` is called with, where it needs a mask drawn by hand.
        valid: ``[batch, length]``, 0 at padding, which is not compared.

    Returns:
        The results of ``ours``.
    """
    reference = inputs if reference is None else reference
    exact = results(eager, reference, valid, double=True)
    plain = results(eager, reference, valid)
    tried = results(ours, inputs, valid)
    used = excess(tried, plain, exact)
    worst = max(used, key=used.__getitem__)
    assert used[worst] <= 1, f"{worst} is {used[worst]:.3g} times its error budget"
    return tried


def assert_differs(result: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The negative control: another mask would have been noticed by a wide margin."""
    gap = (result["logits"] - other["logits"]).norm() / result["logits"].norm()
    assert gap > 1e-3, f"the control changes the logits by {float(gap):.2g} only"
