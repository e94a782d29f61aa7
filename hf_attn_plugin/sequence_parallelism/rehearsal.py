"""What a model does to tokens, found by running it on a few of them without attention.

A sequence can be spread over ranks if tokens meet in attention alone, if that attention is one of
this package's methods, and if a token's place reaches the model by ``position_ids``. No list of
models says so. So once per model a handful of tokens goes through it with attention that returns
each token's own value. Two such runs that share some tokens, at the same positions but with other
neighbours, must agree on these, in every query, key and value and in the output: recurrent layers,
convolutions, token shifts, attention of another kind and positions counted by the model itself do
not. What is seen on the way (the layers' windows, heads, how positions are numbered without
position_ids, whether the loss takes shifted labels) is what spreading needs to know.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.methods.call import AttentionCall, chunk_size
from hf_attn_plugin.methods.sharding import Rows
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.sequence_parallelism.batch import IGNORED, WholeBatch
from hf_attn_plugin.sequence_parallelism.hanging import hung
from hf_attn_plugin.sequence_parallelism.losses import sum_of_losses

if TYPE_CHECKING:
    from hf_attn_plugin.ops.torch.linear_features import FeatureMap

_TOKENS = 8
_SHIFT = 3
_PADS = 3
# Largest difference of equal tokens, relative to the tokens' norm: rounding, and what quantised
# layers make of it. What mixes tokens, or another position, is of the order of 1.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-2, 0.15


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What layers of one kind have in common.

    Attributes:
        method: The ``attn_implementation``.
        causal: Whether they look back only.
        band: Their own window.
        chunk: Tokens of their own chunks.
        window: The method's terms, as in `Pattern`.
        dilation: The same.
        stride: The same.
        num_sink_tokens: The same.
        num_global_tokens: The same.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Of queries and keys.
        value_dim: Of values.
        itemsize: Bytes of a number.
        linear: Whether they have a state in place of softmax.
    """

    method: str
    causal: bool
    band: int | None
    chunk: int | None
    window: int | None
    dilation: int
    stride: int | None
    num_sink_tokens: int
    num_global_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    linear: bool

    def terms(self) -> dict[str, Any]:
        """The method's terms of a `Pattern`."""
        names = ("window", "dilation", "stride", "num_sink_tokens", "num_global_tokens")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What was found.

    Attributes:
        layers: How many layers there are of each kind.
        positions: How the model numbers tokens when it is given no position_ids: "order", "valid"
            (padding does not count, and is at 0), "valid, padding at -1" (OPT), "padding" (RoBERTa:
            token ids that are not padding, from its id on), or None if it has no use for them.
        loss: "own" (the model's loss takes shift_labels and num_items_in_batch), "next" or "same"
            (a mean over tokens, which predict the next one or themselves), None without labels.
        options: Arguments that the model takes, of those that may be passed.
    """

    layers: dict[LayerKind, int]
    positions: str | None
    loss: str | None
    options: tuple[str, ...]


def number(kind: str, inputs: Mapping[str, Tensor], config: Any) -> Tensor:
    """position_ids as a model numbers tokens by itself, int64 ``[batch or 1, tokens]``.

    Args:
        kind: One of `Rehearsal.positions`, but None.
        inputs: Its ``input_ids`` or ``inputs_embeds``, and ``attention_mask`` if there is one.
        config: Of the model.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    tokens = inputs["inputs_embeds"] if ids is None else ids
    order = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if kind in ("valid", "valid, padding at -1") and mask is not None:
        real = mask.long()
        positions = real.cumsum(1) * real - 1
        return positions.clamp(min=0) if kind == "valid" else positions
    if kind == "padding":
        pad = int(getattr(config.get_text_config(), "pad_token_id", None) or 0)
        if ids is None:
            return order + pad + 1
        real = (ids != pad).long()
        return real.cumsum(1) * real + pad
    return order


class _RehearsedRows(Rows):
    """Tokens that do not see each other."""

    def __init__(self, length: int) -> None:
        self.length = self.share = length
        self.calls: list[tuple[AttentionCall, Pattern, bool]] = []
        self._patterns: dict[Any, Pattern] = {}

    def pattern(
        self, causal: bool, band: int | None, chunk: int | None, device: torch.device
    ) -> Pattern:
        """See `Rows.pattern`."""
        key = (causal, band)
        made = Pattern(q_len=self.length, kv_len=self.length, causal=causal, band=band)
        return self._patterns.setdefault(key, made)

    def attend(self, call: AttentionCall, pattern: Pattern) -> Tensor:
        """Every token's own value."""
        self.calls.append((call, pattern, False))
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)

    def attend_linear(
        self, call: AttentionCall, pattern: Pattern, feature_map: FeatureMap
    ) -> tuple[Tensor, None]:
        """Every token's own value."""
        output = self.attend(call, pattern).transpose(1, 2).contiguous()
        self.calls[-1] = (call, pattern, True)
        return output, None


@dataclasses.dataclass(frozen=True, eq=False)
class _Trace:
    """What was seen in one run: ``[1, tokens, numbers]`` each."""

    inputs: dict[str, Any]
    tensors: list[Tensor]
    output: Any
    rows: _RehearsedRows

    @property
    def tolerance(self) -> float:
        return _TOLERANCE_16_BITS if self.is_coarse else _TOLERANCE

    @property
    def is_coarse(self) -> bool:
        """Whether 16-bit numbers took part."""
        device = self.tensors[0].device.type
        return torch.is_autocast_enabled(device) or any(t.itemsize < 4 for t in self.tensors)

    def difference(self, other: _Trace, mine: slice, others: slice) -> float:
        """The largest relative difference of tokens that both have."""
        if len(self.tensors) != len(other.tensors):
            return float("inf")
        worst = []
        for a, b in zip(self.tensors, other.tensors, strict=True):
            a, b = a[:, mine].double(), b[:, others].double()
            scale = a.norm(dim=-1).mean() + 1e-30
            worst.append((a - b).norm(dim=-1).max() / scale)
        largest = float(torch.stack(worst).max())
        return largest if largest == largest else float("inf")


class Rehearsed:
    """A model that runs on a few tokens.

    Args:
        model: As the caller calls it, without DDP around it.
        config: The transformers model's.
        signature: Of the transformers model's forward.
        whole: A batch, for what is in it.
    """

    def __init__(
        self, model: nn.Module, config: Any, signature: inspect.Signature, whole: WholeBatch
    ) -> None:
        self.model, self.config, self.whole = model, config, whole
        names = set(signature.parameters)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        self.options = tuple(
            name
            for name in ("position_ids", "use_cache", "shift_labels")
            if name in names
            or (takes_any and (name != "use_cache" or getattr(config, name, None) is not None))
        )
        text = config.get_text_config()
        self.pad = getattr(text, "pad_token_id", None)
        special = _special_ids(config) | _special_ids(text)
        plain = [i for i in range(text.vocab_size) if i not in special]
        step = max(1, len(plain) // (3 * (_TOKENS + _SHIFT)))
        self.plain = plain[::step] or [0]

    def run(
        self,
        first: int,
        given: Mapping[str, Any],
        *,
        seed: int = 0,
        pads: int = 0,
        mask: bool = False,
    ) -> _Trace:
        """One run over tokens ``first``, ``first + 1``, ...; ``pads`` tokens of padding before."""
        inputs: dict[str, Any] = dict(given)
        whole, device = self.whole, self.whole.tokens.device
        count = _TOKENS - pads
        if "input_ids" in whole.tensors:
            chosen = range(first + 17 * seed, first + 17 * seed + count)
            ids = [self.plain[i % len(self.plain)] for i in chosen]
            ids = [0 if self.pad is None else int(self.pad)] * pads + ids
            inputs["input_ids"] = torch.tensor([ids], device=device)
        else:
            index = torch.arange(first + seed, first + seed + _TOKENS, device=device)
            embeds = whole.tokens[:1, index % whole.length].detach()
            # Rows shorter than this are gone through again, at another size.
            again = 1 + (index // whole.length)[None, :, None]
            inputs["inputs_embeds"] = embeds * again.to(embeds.dtype)
        if mask:
            inputs["attention_mask"] = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
            inputs["attention_mask"][:, :pads] = 0
        if "token_type_ids" in whole.tensors:
            inputs["token_type_ids"] = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
        if "use_cache" in self.options:
            inputs["use_cache"] = False
        rows = _RehearsedRows(_TOKENS)
        with hung(self.model, rows):
            output = self.model(**inputs)
        if not rows.calls:
            raise ValueError(
                f"{type(self.model).__name__} makes no attention call through transformers' "
                "interface, so that nothing could spread it over ranks. Models of the Llama, "
                "Mistral, Qwen, Gemma, GPT-2 or BERT kinds do."
            )
        final = getattr(output, "logits", None)
        final = getattr(output, "last_hidden_state", None) if final is None else final
        if not isinstance(final, Tensor) or final.ndim != 3 or final.shape[1] != _TOKENS:
            raise ValueError(
                f"{type(self.model).__name__} returns no logits or last_hidden_state for every "
                "token, and one for a whole row lies on one rank. Use a model for causal or masked "
                "language modelling or for token classification, or the model without a head."
            )
        tensors = [t for call, _, _ in rows.calls for t in (call.query, call.key, call.value)]
        tensors = [t.detach().transpose(1, 2).flatten(2) for t in tensors]
        return _Trace(inputs, [*tensors, final.detach()], output, rows)

    def at(self, first: int) -> dict[str, Tensor]:
        """position_ids from ``first`` on, if the model takes any."""
        if "position_ids" not in self.options:
            return {}
        index = torch.arange(first, first + _TOKENS, device=self.whole.tokens.device)
        return {"position_ids": index[None]}

    def check_mixing(self) -> _Trace:
        """Refuse a model in which tokens meet outside of attention; a run from token 0 on."""
        largest = []
        for seed in range(2):  # experts that rounding chooses may differ once, not twice
            one = self.run(0, self.at(0), seed=seed)
            other = self.run(_SHIFT, self.at(_SHIFT), seed=seed)
            same = slice(_SHIFT, None), slice(0, _TOKENS - _SHIFT)
            largest.append(one.difference(other, *same))
            if largest[-1] <= one.tolerance:
                return one
        raise ValueError(
            f"{type(self.model).__name__}: what this model makes of a token depends on more than "
            "attention through transformers' interface, the token and its position_ids (the same "
            f"tokens with others beside them differ by {min(largest):.0%}). A recurrent state, a "
            "convolution, a token shift, attention of its own or positions that it counts itself "
            "would be wrong at every border between ranks. Run this model on one GPU."
        )

    def numbering(self) -> str | None:
        """How the model numbers tokens by itself: `Rehearsal.positions`."""
        if "position_ids" not in self.options:
            return None
        if "position_ids" in self.whole.tensors:
            return "order"  # never asked
        mask = "attention_mask" in self.whole.tensors
        pads = _PADS if mask else 0
        found = self.run(0, {}, pads=pads, mask=mask)
        kinds = ["order", "padding"]
        if mask:
            kinds.insert(1, "valid")
            if any(getattr(m, "offset", 0) for m in self.model.modules()):  # else -1 is no index
                kinds.append("valid, padding at -1")
        # What padding is numbered matters to the loss alone, if a label follows it.
        best, name = (float("inf"), float("inf")), ""
        for kind in kinds:
            positions = number(kind, found.inputs, self.config)
            tried = self.run(0, {"position_ids": positions}, pads=pads, mask=mask)
            here = found.difference(tried, slice(pads, None), slice(pads, None))
            difference = (here, found.difference(tried, slice(None), slice(None)))
            if difference < best:
                best, name = difference, kind
        if best[0] > found.tolerance:
            raise ValueError(
                f"{type(self.model).__name__} numbers the tokens in a way of its own when it is "
                "given no position_ids. Put position_ids into the batch."
            )
        return name

    def loss(self, plain: _Trace) -> str:
        """What the model makes of labels: `Rehearsal.loss`."""
        logits = getattr(plain.output, "logits", None)
        if logits is None:
            raise ValueError(
                f"{type(self.model).__name__} returns no logits, and the batch has labels. Leave "
                "them out."
            )
        index = torch.arange(_TOKENS, device=logits.device)[None]
        labels = (index * 5 + 1) % logits.shape[-1]
        labels[:, 1] = IGNORED
        others = (index * 3 + 2) % logits.shape[-1]
        others[:, 2] = IGNORED
        close = 2e-2 if plain.is_coarse else 1e-3
        if "shift_labels" in self.options:
            given = {"labels": labels, "shift_labels": others, "num_items_in_batch": 5.0}
            with contextlib.suppress(TypeError, AttributeError):
                loss = self.run(0, {**self.at(0), **given}).output.loss
                if _near(loss, sum_of_losses(logits, others) / 5.0, close):
                    return "own"
        loss = self.run(0, {**self.at(0), "labels": labels}).output.loss
        if _near(loss, sum_of_losses(logits, labels) / (_TOKENS - 1), close):
            return "same"
        if _near(loss, sum_of_losses(logits[:, :-1], labels[:, 1:]) / (_TOKENS - 2), close):
            return "next"
        raise ValueError(
            f"{type(self.model).__name__}: its loss is no cross-entropy over tokens, so that the "
            "ranks' losses do not add up to one process'. Leave labels out of the batch, and "
            "compute the loss of this rank's logits by the shard's mean()."
        )


def rehearse(
    model: nn.Module, config: Any, signature: inspect.Signature, whole: WholeBatch
) -> Rehearsal:
    """Run ``model`` on a few tokens; see the module.

    With sharded weights (FSDP) this is collective. It leaves the random state as it is.

    Args:
        model: As the caller calls it, without DDP around it.
        config: The transformers model's.
        signature: Of the transformers model's forward.
        whole: A batch, for what is in it.

    Raises:
        ValueError: The model cannot be spread over ranks, with the reason.
    """
    rehearsed = Rehearsed(model, config, signature, whole)
    device = whole.tokens.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _evaluating(model):
        plain = rehearsed.check_mixing()
        positions = rehearsed.numbering()
        loss = rehearsed.loss(plain) if whole.has_labels else None
    kinds = collections.Counter(_kind(*call) for call in plain.rows.calls)
    return Rehearsal(dict(kinds), positions, loss, rehearsed.options)


def _kind(call: AttentionCall, pattern: Pattern, linear: bool) -> LayerKind:
    return LayerKind(
        method=call.method,
        causal=pattern.causal,
        band=pattern.band,
        chunk=chunk_size(call.module),
        window=pattern.window,
        dilation=pattern.dilation,
        stride=pattern.stride,
        num_sink_tokens=pattern.num_sink_tokens,
        num_global_tokens=pattern.num_global_tokens,
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        head_dim=call.key.shape[3],
        value_dim=call.value.shape[3],
        itemsize=call.query.itemsize,
        linear=linear,
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode (no dropout, no checkpoints), and back to what it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _near(loss: Any, expected: Tensor, tolerance: float) -> bool:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return False
    return bool((loss.double() - expected.double()).abs() <= tolerance * expected.double().abs())


def _special_ids(config: Any) -> set[int]:
    """Ids of padding, images and the like."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith("token_id"):
            found |= {v for v in (value if isinstance(value, list) else [value]) if v is not None}
    return found
