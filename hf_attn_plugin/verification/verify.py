"""Every attention layer's output beside eager attention's, on the user's own batch."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.integrations.attention_calls import (
    Handler,
    InterfaceCall,
    eager_names,
    intercept_attention,
)
from hf_attn_plugin.integrations.packed_positions import jumps_cut_nothing
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.verification.batches import DecodingBatch, example_batches, inner_model
from hf_attn_plugin.verification.compare import compare_gradients, compare_output
from hf_attn_plugin.verification.definitions import linear_definition, softmax_definition
from hf_attn_plugin.verification.expected import (
    Tokens,
    describes,
    expected_pairs,
    is_approximate,
    is_linear,
    read_tokens,
)
from hf_attn_plugin.verification.report import LayerCheck, VerifyReport


def verify(
    model: nn.Module,
    batch: Mapping[str, Any] | Tensor | None = None,
    *,
    gradients: bool = False,
    length: int | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Compare every attention layer's output with eager attention's under the same pattern.

    The model runs once as it is. Each layer's queries, keys and values, as they come to it, also go
    through the family's own eager attention (softcap, sinks and scaling as the model defines them)
    in float64, under the mask that transformers makes for eager attention in this call, with packed
    documents kept apart and the method's written definition drawn over it. So a layer is judged by
    itself, whatever the layers before it did. The time and memory are those of eager attention,
    quadratic in the length; torch.compile is off meanwhile. Parameters, gradients, random state and
    a cache in the batch stay as they are.

    ``linear`` is held against its own definition over these pairs, each weighed by itself, in
    float64; how far that is from softmax is reported. Methods that are approximations (``sparq``
    and other decoding methods in a decoding step) have their error reported and need only be
    finite.

    Args:
        model: A transformers model, with its ``attn_implementation`` set; wrappers such as PEFT's
            may be around it. Its mode (training or not) stays as it is.
        batch: What the model is called with; a tensor is taken for ``input_ids``. None makes
            batches of random tokens: unpadded, padded on either side, packed, and a decoding step.
        gradients: Compare the gradients of queries, keys and values too, for random gradients of
            the output.
        length: Tokens per row of batches made here (default: 128, or what the model takes).
        seed: Of these tokens.

    Returns:
        The report; ``report.raise_if_different()`` raises where a layer is out of its budget, which
        is twice the error of eager attention in the same dtype, and a floor for rounding.

    Raises:
        ValueError: The model's attention does not go through transformers' interface, or the batch
            is none. What the method itself refuses is raised as in any forward pass; of batches
            made here it becomes a note, unless none of them could run.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"verify() takes a transformers model; got a {type(model).__name__}.")
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if batch is None:
        batches, notes = example_batches(model, length=length, seed=seed)
        return verify_batches(model, batches, gradients=gradients, notes=notes, note_refusals=True)
    if not isinstance(batch, Mapping) or not batch:
        raise ValueError(
            "verify() takes a batch as the model's forward does, a dictionary of tensors such as "
            f"{{'input_ids': ...}}, or a tensor of input_ids; got {type(batch).__name__}."
        )
    if length is not None:
        raise ValueError("verify(): length is for batches made here; it does not cut yours.")
    return verify_batches(model, {"batch": batch}, gradients=gradients)


def verify_batches(
    model: nn.Module,
    batches: Mapping[str, Mapping[str, Any] | DecodingBatch],
    *,
    gradients: bool = False,
    notes: tuple[str, ...] = (),
    note_refusals: bool = False,
) -> VerifyReport:
    """`verify` on several batches, in one report.

    Args:
        model: As in `verify`.
        batches: Names and batches; `DecodingBatch` judges a step over the cache of a prompt.
        gradients: As in `verify`.
        notes: What the report is to say besides.
        note_refusals: Let a batch that the model refuses become a note, as for `example_batches`:
            whoever calls did not ask for just this one (packed documents, which models with
            recurrent layers refuse).

    Returns:
        The report over all batches.

    Raises:
        ValueError: As `verify`; with ``note_refusals`` only where no batch could run.
    """
    checks: list[LayerCheck] = []
    called: set[str] = set()
    refusals: dict[str, ValueError] = {}
    sparse: dict[str, bool] = {}  # method: whether it left out any pair so far
    for name, batch in batches.items():
        run = _Verification(model, name, batch, gradients)
        try:
            checks += run.checks()
        except ValueError as error:
            if not note_refusals:
                raise
            refusals[name] = error
            continue
        called |= run.called
        notes += run.notes
        for method, left_out in run.left_out.items():
            sparse[method] = sparse.get(method, False) or left_out
    if refusals and not checks:
        raise next(iter(refusals.values()))
    notes += tuple(f"{name}: refused: {error}" for name, error in refusals.items())
    notes += tuple(
        f"{method} left out no pair in these batches: its window reaches over all of them, so its "
        "pattern was not put to the test; give longer ones"
        for method, left_out in sparse.items()
        if not left_out
    )
    idle = [name for name, module in _attention_modules(model).items() if name not in called]
    if idle:
        notes += (
            f"{len(idle)} attention modules were not called by these batches "
            f"({', '.join(idle[:3])}{', …' if len(idle) > 3 else ''}): nothing is known of them",
        )
    return VerifyReport(tuple(checks), notes)


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that look like attention."""
    marked = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_causal") and hasattr(module, "config")
    }
    return {
        name: module
        for name, module in marked.items()
        if not any(other.startswith(f"{name}.") for other in marked)
    }


_SPARSE = ("sliding_window", "longformer", "strided")
# Made from the labels where a batch has none of its own, so that these must stay.
_NOT_NEEDED = ("labels", "num_items_in_batch", "shift_labels")


class _Verification:
    """One batch: a pass that collects eager's masks, and one in which every call is judged.

    A third, between them, asks transformers' own masks of training which of the layers that look
    both ways keep packed documents apart.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        batch: Mapping[str, Any] | DecodingBatch,
        gradients: bool,
    ) -> None:
        self.model, self.name, self.gradients = model, name, gradients
        self.device = next(model.parameters()).device
        config: Any = model.config
        self.seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        self.prompt: dict[str, Any] | None = None
        past = 0
        if isinstance(batch, DecodingBatch):
            self.prompt = self._moved(batch.prompt)
            past, batch = self.prompt["input_ids"].shape[1], batch.step
        self.batch = self._moved(batch)
        cache = self.batch.get("past_key_values")
        past = past if cache is None else int(cache.get_seq_length())
        self.tokens: Tokens | None = None if self.seq2seq else read_tokens(self.batch, past)
        self.names = {id(module): path for path, module in model.named_modules()}
        self.called: set[str] = set()
        self.notes: tuple[str, ...] = ()
        self.left_out: dict[str, bool] = {}
        self._masks: dict[int, list[tuple[Any, int]]] = collections.defaultdict(list)
        self._apart: dict[int, list[bool]] = collections.defaultdict(list)
        self._two_ways = self._untold = False
        self._prompt_keys: dict[int, list[tuple[Tensor, Tensor]]] = collections.defaultdict(list)
        self._seen: collections.Counter[int] = collections.Counter()
        self._found: list[LayerCheck] = []

    def checks(self) -> list[LayerCheck]:
        """Run both passes."""
        documents = jumps_cut_nothing() if self._has_our_names() else contextlib.nullcontext()
        try:
            with documents, eager_names(self.model):
                with self._reading_inside():
                    self._forward(self._collect_mask, _compute_nothing)
                if self._two_ways and self._told_by_positions():
                    self._forward(self._collect_apart, _compute_nothing, self._as_in_training())
        except ValueError as error:
            if self.batch.get("past_key_values") is None:
                raise
            raise ValueError(
                f"verify(): eager attention cannot go on with the cache in the batch ({error}) "
                "Fill a cache that keeps all tokens, past_key_values=DynamicCache(), or let "
                "verify(model) make a decoding step of its own."
            ) from error
        self._forward(self._judge, self._keep_prompt)
        if not self._found:
            raise ValueError(
                f"{type(self.model).__name__} made no attention call through transformers' "
                "interface, so there is no eager attention to compare with: its family computes "
                "attention by itself and ignores attn_implementation. Nothing of this package "
                "takes part in it; use a family that goes through the interface (Llama, Mistral, "
                "Qwen, Gemma, BERT, ...)."
            )
        return self._found

    def _has_our_names(self) -> bool:
        configs: list[Any] = [getattr(module, "config", None) for module in self.model.modules()]
        return any(getattr(config, "_attn_implementation", None) in METHODS for config in configs)

    def _moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in batch.items() if self.seq2seq or k not in _NOT_NEEDED}
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in kept.items()}

    def _told_by_positions(self) -> bool:
        tokens = self.tokens
        return tokens is not None and not tokens.told and bool(tokens.document.any())

    def _as_in_training(self) -> dict[str, Any]:
        """The batch without what lets transformers' own masks overlook packed documents."""
        batch = {name: value for name, value in self.batch.items() if name != "attention_mask"}
        if "use_cache" in inspect.signature(inner_model(self.model).forward).parameters:
            batch["use_cache"] = False
        return batch

    @contextlib.contextmanager
    def _reading_inside(self) -> Iterator[None]:
        """Read the tokens that a wrapper calls the model inside with.

        PEFT's prompt tuning puts virtual tokens before those of the batch, and drops its positions.
        """
        inner, outside = inner_model(self.model), self.tokens
        if inner is self.model or outside is None:
            yield
            return
        names = list(inspect.signature(inner.forward).parameters)

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            told = {**dict(zip(names, args, strict=False)), **kwargs}
            cache = told.get("past_key_values")
            self.tokens = read_tokens(told, 0 if cache is None else int(cache.get_seq_length()))

        handle = inner.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        told = self.tokens is not None and bool(self.tokens.document.any())
        self._untold = bool(outside.document.any()) and not told

    def _forward(
        self, handler: Handler, prompt_handler: Handler, batch: dict[str, Any] | None = None
    ) -> None:
        """Run a batch, this one unless another is given, after its prompt if there is one."""
        batch, modules = dict(batch or self.batch), list(self.model.modules())
        if batch.get("past_key_values") is not None:
            batch["past_key_values"] = _copied(batch["past_key_values"])
        with (
            torch.no_grad(),
            _random_state(self.device),
            torch.compiler.set_stance("force_eager"),
        ):
            if self.prompt is not None:
                with intercept_attention(modules, prompt_handler):
                    output = self.model(**self.prompt, use_cache=True)
                batch["past_key_values"] = output.past_key_values
            with intercept_attention(modules, handler):
                self.model(**batch)

    def _collect_mask(self, call: InterfaceCall) -> tuple[Tensor, None]:
        self._masks[id(call.module)].append((call.mask, call.query.shape[2]))
        self._two_ways = self._two_ways or not _is_causal(call)
        return _compute_nothing(call)

    def _collect_apart(self, call: InterfaceCall) -> tuple[Tensor, None]:
        apart, mask = False, call.mask
        assert self.tokens is not None
        if mask is not None and describes(self.tokens, call.query.shape[2]):
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            document = self.tokens.document.to(mask.device)
            others = (document[:, :, None] != document[:, None])[:, None]
            apart = seen.shape[-2:] == others.shape[-2:] and not bool((seen & others).any())
        self._apart[id(call.module)].append(apart)
        return _compute_nothing(call)

    def _tokens_for(self, call: InterfaceCall, index: int) -> Tokens | None:
        """The tokens as this layer is to see them: both ways, documents are often none of it."""
        tokens, apart = self.tokens, self._apart[id(call.module)]
        if tokens is None or tokens.told or _is_causal(call):
            return tokens
        return tokens if index < len(apart) and apart[index] else tokens.as_one_document()

    def _not_judged(self, call: InterfaceCall) -> str:
        """What the batch tells of this call's tokens and the model's inside is not told."""
        tokens = self.tokens
        if tokens is None or not _is_causal(call):
            return ""
        known = describes(tokens, call.query.shape[2])
        if not (self._untold if known else bool(tokens.document.any())):
            return ""
        if not self.notes:
            self.notes = (
                f"{self.name}: not judged: packed documents. {type(self.model).__name__} does not "
                "hand their positions on to the model inside, which then takes a row for one "
                "document: pass each document as a batch row of its own",
            )
        return "packed documents"

    def _keep_prompt(self, call: InterfaceCall) -> tuple[Tensor, Any]:
        """All keys and values of the prompt: the method's cache may drop some of them."""
        self._prompt_keys[id(call.module)].append((call.key, call.value))
        return call.run()

    def _with_all_keys(self, call: InterfaceCall, kv_len: int, index: int) -> InterfaceCall:
        """The module's ``index``-th call with the ``kv_len`` keys that eager would have."""
        if call.key.shape[2] == kv_len:
            return call
        prompt = self._prompt_keys[id(call.module)]
        if index >= len(prompt):
            raise ValueError(
                f"verify(): the cache in the batch holds {call.key.shape[2]} of {kv_len} tokens at "
                f"{self.names[id(call.module)]}, so eager attention cannot be computed over it. "
                "Fill it from the start: verify(model) makes a decoding step of its own."
            )
        kept, new = prompt[index], call.query.shape[2]
        first = kept[0].shape[2] + new - kv_len
        key, value = (
            torch.cat([old[:, :, first:], held[:, :, -new:]], 2)
            for old, held in zip(kept, (call.key, call.value), strict=True)
        )
        return dataclasses.replace(call, key=key, value=value)

    def _judge(self, call: InterfaceCall) -> tuple[Tensor, Any]:
        if call.implementation not in METHODS and call.kwargs.get("dropout"):
            call = dataclasses.replace(call, kwargs={**call.kwargs, "dropout": 0.0})
        result = call.run()
        path = self.names[id(call.module)]
        self.called.add(path)
        if call.eager is None:
            raise ValueError(
                f"{type(call.module).__name__} names no eager attention beside "
                f"attn_implementation={call.implementation!r}, so there is nothing to compare with."
            )
        q_len, kv_len = call.query.shape[2], call.key.shape[2]
        index = self._seen[id(call.module)]  # some modules attend several times
        self._seen[id(call.module)] += 1
        mask = self._eager_mask(call, index)
        if self.prompt is not None and mask is not None:
            kv_len = mask.shape[-1]
        reference = self._with_all_keys(call, kv_len, index)
        pairs = expected_pairs(
            call.implementation,
            call.module,
            mask,
            self._tokens_for(call, index),
            q_len,
            kv_len,
            call.query.device,
            _is_causal(call),
        )
        if call.implementation in _SPARSE:
            before = self.left_out.get(call.implementation, False)
            self.left_out[call.implementation] = before or pairs.left_out
        approximate = is_approximate(call.implementation, q_len, kv_len)
        linear = is_linear(call.implementation, call.module, call.kwargs.get("sliding_window"))
        tokens = self.tokens
        if (
            linear
            and self.prompt is None
            and tokens is not None
            and tokens.past
            and kv_len < tokens.valid.shape[1]  # prefixes of PEFT's are keys, and all are there
        ):
            raise ValueError(
                "verify(): under 'linear' the cache in the batch holds a sum in place of its "
                f"{tokens.past} tokens, so nothing can be computed over them again. "
                "verify(model) makes a decoding step of its own."
            )
        definition = linear_definition if linear else softmax_definition
        output = compare_output(call, reference, result[0], pairs, approximate, definition)
        comparisons = [("output", output)]
        if self.gradients and q_len > 1 and reference is call:
            comparisons += compare_gradients(call, pairs, approximate, definition)
        for quantity, comparison in comparisons:
            self._found.append(
                LayerCheck(
                    batch=self.name,
                    name=path,
                    layer_idx=getattr(call.module, "layer_idx", None),
                    method=call.implementation,
                    quantity=quantity,
                    not_judged=self._not_judged(call),
                    **dataclasses.asdict(comparison),
                )
            )
        return result

    def _eager_mask(self, call: InterfaceCall, index: int) -> Tensor | None:
        """The mask of the same call, the module's ``index``-th, in the eager pass."""
        key = id(call.module)
        masks = self._masks[key]
        q_len = call.query.shape[2]
        if index < len(masks) and masks[index][1] == q_len:
            mask: Tensor | None = masks[index][0]
            return mask
        lengths = [length for _, length in masks]
        if all(mask is None for mask, _ in masks) and sum(lengths) == q_len == call.key.shape[2]:
            # Image by image under eager, all at once under names with "flash" in them.
            number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            same: Tensor = number[:, None] == number[None, :]
            return same[None, None].to(call.query.device)
        raise ValueError(
            f"{self.names[key]} attends from {q_len} queries under {call.implementation!r} and "
            f"from {lengths} under eager attention: the two cannot be compared call by call."
        )


def _compute_nothing(call: InterfaceCall) -> tuple[Tensor, None]:
    # Masks do not depend on what attention returns.
    batch, heads, q_len, _ = call.query.shape
    return call.query.new_zeros(batch, q_len, heads, call.value.shape[-1]), None


def _copied(cache: Any) -> Any:
    try:
        return copy.deepcopy(cache)
    except RuntimeError as error:
        raise ValueError(
            "verify: the cache in the batch belongs to a graph for gradients and cannot be copied. "
            "Fill it under torch.no_grad()."
        ) from error


def _is_causal(call: InterfaceCall) -> bool:
    causal = call.kwargs.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if causal is None else causal)


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside (dropout in training mode) are not missing afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
