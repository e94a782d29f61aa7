"""One architecture, `flash` beside eager attention: everything that a user may do with it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from families.catalogue import (
    CannotBuildError,
    forward_arguments,
    model_classes,
    one_line,
)
from families.inputs import LENGTH, is_text, model_inputs
from families.odd import MIXED_DOCUMENTS, PADDING_IS_CONTENT, TEXT_TOWERS
from families.result import (
    ABSENT,
    AS_EAGER,
    AS_SDPA,
    BROKEN,
    BY_LENGTHS,
    BYPASSING,
    EMPTY,
    EQUAL,
    NOT_BUILT,
    PART_EQUAL,
    REFUSED,
    WHOLE_REFUSED,
    Result,
)
from families.running import (
    Differs,
    build,
    double_precision,
    eager_model,
    errors,
    outputs_and_gradients,
    run,
)
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_attn_plugin.integrations.flash_name import refuse_bypassing
from hf_attn_plugin.integrations.model_source import holds_attention
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.methods.call import attend, read_call
from hf_attn_plugin.patterns import Pattern

METHOD = "flash"
# Relative to the largest value: a computation in float64 that differs by rounding only stays far
# below, a mask that is wrong in one pair per query far above (the control is held to that).
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
CONTROL = 1e-4
DOCUMENTS = [5, 3, 4]


def sweep(architecture: str) -> Result:
    """Compare one architecture, from its construction on."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    result = Result(architecture, versions=versions)
    if _settled_by_source(architecture, result):
        return result
    try:
        with double_precision(torch.float64):
            eager = eager_model(architecture)
        dtype = torch.float64
        result.model_class = type(eager).__name__
        with double_precision(dtype):
            _compare(eager, result, dtype)
        if architecture in TEXT_TOWERS:
            _of_the_part_alone(architecture, result)
    except CannotBuildError as error:
        _without_a_model(architecture, result, error)
    except Differs as error:
        result.outcome, result.message = BROKEN, one_line(str(error), 400)
    return result


def _of_the_part_alone(architecture: str, result: Result) -> None:
    """What the comparison of a part says of the whole, which is not made."""
    whole = model_classes(architecture)[0]
    part = f"its part that reads text, {result.model_class}"
    if result.outcome == EMPTY:  # says nothing of the parts beside it
        result.outcome, result.message = NOT_BUILT, f"{part}, holds no attention"
    elif result.outcome == EQUAL:
        result.outcome = PART_EQUAL
        result.message = f"only {part}, is compared"
        try:
            refuse_bypassing(whole, METHOD)
        except ValueError as refusal:
            result.outcome = WHOLE_REFUSED
            result.message += f"; the whole: {one_line(str(refusal), 300)}"


def _settled_by_source(architecture: str, result: Result) -> bool:
    """Whether the class alone tells what becomes of the name, so that no model needs to run."""
    try:
        cls = model_classes(architecture)[0]
        if holds_attention(cls):
            return False
    except (AttributeError, IndexError):  # a package is missing, or the mapping names no class
        return False
    result.model_class, result.outcome = cls.__name__, EMPTY
    try:
        refuse_bypassing(cls, METHOD)
    except ValueError as error:
        result.message = one_line(str(error), 400)
    return True


def _without_a_model(architecture: str, result: Result, error: CannotBuildError) -> None:
    """What the class says of the name, where no tiny model could be made."""
    result.outcome, result.message = NOT_BUILT, one_line(str(error), 300)
    for cls in model_classes(architecture)[:1]:
        try:
            refuse_bypassing(cls, METHOD)
        except AttributeError:  # a stand-in for a class whose package is missing
            continue
        except ValueError as refusal:
            result.model_class, result.outcome = cls.__name__, BYPASSING
            result.note, result.message = f"not run: {result.message}", one_line(str(refusal), 400)


# -- the comparison --------------------------------------------------------------------------------


def _compare(eager: Any, result: Result, dtype: torch.dtype) -> None:
    architecture = result.architecture
    result.precision = str(dtype).removeprefix("torch.")
    agreed = EQUAL
    try:
        ours = build(type(eager), eager.config, METHOD)
    except ValueError as error:
        message = one_line(str(error), 400)
        if "holds no attention" in message:
            result.outcome, result.message = EMPTY, message
            return
        if "computes attention by itself" not in message:
            result.outcome, result.message = REFUSED, message
            return
        result.outcome, result.message = BYPASSING, message
        if _reaches_interface(eager):
            result.note = "its attention does reach the interface in part"
        ours = _text_part_only(eager)
        if ours is None:
            return
        agreed, result.outcome, result.note = WHOLE_REFUSED, "", ""
        result.message = (
            f"compared with the name for its text part ({_text_class(eager)}) alone, "
            f"attn_implementation={{'text_config': {METHOD!r}}}; for the whole: {message}"
        )
    except Exception as error:
        raise Differs(f"construction: {one_line(error)}") from error
    ours.load_state_dict(eager.state_dict())
    inputs = model_inputs(eager)
    with _spy() as calls:
        try:
            tried = outputs_and_gradients(ours, inputs)
        except ValueError as error:
            result.outcome, result.message = REFUSED, one_line(str(error), 400)
            _check_our_words(error)
            return
        except Exception as error:
            raise Differs(f"forward: {one_line(error)}") from error
    expected = outputs_and_gradients(eager, inputs)
    if sum(bool(value.isnan().any()) for value in expected.values()) > len(expected) // 2:
        raise CannotBuildError("eager attention gives NaN gradients")
    result.outputs, result.gradients = errors(tried, expected)
    if not calls:
        if _has_attention(eager):
            raise Differs("accepts the name, and never calls the interface")
        result.outcome = EMPTY
        return
    _judge("outputs and gradients", max(result.outputs, result.gradients), dtype)
    result.control = _control(ours, inputs, expected)
    if result.control < CONTROL:
        raise Differs(f"the control changes the outputs by {result.control:.2g} only")
    result.note = "; ".join(filter(None, [result.note, _not_called(eager, inputs, calls)]))
    if is_text(eager) and "input_ids" in inputs:
        padded = eager
        if architecture in PADDING_IS_CONTENT:
            padded = build(type(eager), eager.config, "sdpa")
            padded.load_state_dict(eager.state_dict())
            result.note = PADDING_IS_CONTENT[architecture]
        for side in ("left", "right"):
            outcome = _padding(padded, ours, inputs, side, dtype)
            result.checks[side] = AS_SDPA if padded is not eager and outcome == EQUAL else outcome
        result.checks["packed"] = _packed(architecture, eager, ours, inputs, dtype)
        result.checks["dynamic"] = _generation(padded, ours, inputs, None, dtype)
        result.checks["static"] = _generation(padded, ours, inputs, "static", dtype)
        if result.checks["packed"] == AS_EAGER:
            result.note = MIXED_DOCUMENTS[architecture]
    result.checks["checkpointing"] = _checkpointing(eager, ours, inputs, dtype)
    result.outcome = agreed


def _judge(what: str, error: float, dtype: torch.dtype) -> None:
    if not error <= TOLERANCE[dtype]:
        raise Differs(f"{what} differ by {error:.2g}")


def _check_our_words(error: BaseException) -> None:
    if not str(error):
        raise Differs("a refusal without a reason")


def _try(run: Callable[[], Any], what: str) -> Any:
    """A run of ours: its result, or the text of its refusal."""
    try:
        return run()
    except ValueError as error:
        return f"{REFUSED}: {one_line(str(error), 160)}"
    except Differs:
        raise
    except Exception as error:
        raise Differs(f"{what}: {one_line(error)}") from error


def _padding(
    eager: Any, ours: Any, inputs: dict[str, Tensor], side: str, dtype: torch.dtype
) -> str:
    if "attention_mask" not in forward_arguments(eager):
        return ABSENT
    index = torch.arange(LENGTH)
    pads = torch.tensor([[0], [4]])
    valid = (index >= pads if side == "left" else index < LENGTH - pads).long()
    padded = {**inputs, "attention_mask": valid}
    encoder_only = None if "decoder_input_ids" in inputs else valid
    try:
        expected = outputs_and_gradients(eager, padded, encoder_only)
    except Exception:
        return ABSENT
    tried = _try(lambda: outputs_and_gradients(ours, padded, encoder_only), f"{side} padding")
    if isinstance(tried, str):
        return tried
    _judge(f"{side} padding", max(errors(tried, expected)), dtype)
    return EQUAL


def _takes_positions(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    passed_on = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    return passed_on or "position_ids" in parameters


def _looks_back(model: nn.Module) -> bool:
    """Whether any part of a model is causal: there, restarting positions mean documents."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _packed(
    architecture: str, eager: Any, ours: Any, inputs: dict[str, Tensor], dtype: torch.dtype
) -> str:
    """Documents in one row against each of them alone in eager."""
    if "decoder_input_ids" in inputs or not _takes_positions(eager):
        return ABSENT
    ids = inputs["input_ids"][:1]
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    try:
        name = "logits" if "logits" in run(eager, {"input_ids": ids}) else "last_hidden_state"
        alone = []
        for part, place in zip(ids.split(DOCUMENTS, 1), positions.split(DOCUMENTS, 1), strict=True):
            alone.append(run(eager, {"input_ids": part, "position_ids": place})[name])
        packed = {"input_ids": ids, "position_ids": positions}
        whole = {name: run(eager, packed)[name]}
    except Exception:
        return ABSENT
    exact = {name: torch.cat(alone, 1)}
    outcome = EQUAL
    for extra in ({}, {"use_cache": False}):
        tried = _try(lambda: run(ours, {**packed, **extra}), "packed documents")  # noqa: B023
        if isinstance(tried, str):
            return tried
        if errors({name: tried[name]}, exact)[0] <= TOLERANCE[dtype]:
            continue
        with contextlib.suppress(Exception):
            whole = {name: run(eager, {**packed, **extra})[name]}
        _judge("packed documents", errors({name: tried[name]}, whole)[0], dtype)
        outcome = AS_EAGER
    if outcome == AS_EAGER and architecture not in MIXED_DOCUMENTS:
        if _looks_back(ours):
            raise Differs("packed documents attend to each other")
        _judge("packed by cu_seq_lens", _packed_by_lengths(ours, packed, exact), dtype)
        return BY_LENGTHS  # encoders take position_ids for no more than positions
    return outcome


def _packed_by_lengths(ours: Any, packed: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The error of documents that cumulative lengths tell too."""
    ends = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
               "max_length_q": max(DOCUMENTS), "max_length_k": max(DOCUMENTS)}  # fmt: skip
    try:
        found = run(ours, {**packed, **lengths})
    except Exception as error:
        raise Differs(f"packed documents by cu_seq_lens: {one_line(error)}") from error
    return errors({name: found[name] for name in exact}, exact)[0]


def _generation(
    eager: Any, ours: Any, inputs: dict[str, Tensor], cache: str | None, dtype: torch.dtype
) -> str:
    if not eager.can_generate():
        return ABSENT
    prompt = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    prompt["attention_mask"] = (torch.arange(LENGTH) >= torch.tensor([[0], [4]])).long()
    options: dict[str, Any] = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1,
        "return_dict_in_generate": True, "output_scores": True, "cache_implementation": cache,
    }  # fmt: skip

    def generate(model: Any) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return model.generate(**prompt, **options)

    try:
        expected = generate(eager)
        scores = torch.stack(list(expected.scores))
    except Exception:
        return ABSENT
    tried = _try(lambda: generate(ours), f"generation, {cache or 'dynamic'} cache")
    if isinstance(tried, str):
        return tried
    error, _ = errors({"scores": torch.stack(list(tried.scores))}, {"scores": scores})
    _judge(f"generation, {cache or 'dynamic'} cache", error, dtype)
    if not torch.equal(tried.sequences, expected.sequences):
        raise Differs(f"generation, {cache or 'dynamic'} cache: other tokens")
    return EQUAL


def _checkpointing(eager: Any, ours: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> str:
    if not getattr(eager, "supports_gradient_checkpointing", False):
        return ABSENT
    plain, own = copy.deepcopy(eager).train(), copy.deepcopy(ours).train()
    try:
        expected = outputs_and_gradients(plain, inputs)
    except Exception:
        return ABSENT
    for reentrant in (False, True):
        options = {"use_reentrant": reentrant}
        try:  # what eager can checkpoint
            _enable_checkpointing(plain, options, dtype)
            recomputed = outputs_and_gradients(plain, inputs)
        except Exception:
            return ABSENT

        def run(options: dict[str, bool] = options) -> dict[str, Tensor]:
            _enable_checkpointing(own, options, dtype)
            return outputs_and_gradients(own, inputs)

        tried = _try(run, "gradient checkpointing")
        if isinstance(tried, str):
            return tried
        reference = recomputed if reentrant else expected
        _judge("gradient checkpointing", max(errors(tried, reference)), dtype)
    return EQUAL


def _enable_checkpointing(model: Any, options: dict[str, bool], dtype: torch.dtype) -> None:
    """Gradient checkpointing whose second forward pass, inside backward, is in float64 again."""
    model.gradient_checkpointing_enable(options)
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            module._gradient_checkpointing_func = functools.partial(_checkpoint, checkpoint, dtype)


def _checkpoint(checkpoint: Any, dtype: torch.dtype, function: Any, *args: Any, **kw: Any) -> Any:
    def again(*inner: Any, **named: Any) -> Any:
        with double_precision(dtype):
            return function(*inner, **named)

    return checkpoint(again, *args, **kw)


# -- spies -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _registered(name: str, function: Any) -> Iterator[None]:
    table = AttentionInterface._global_mapping
    before = table.get(name)
    table[name] = function
    try:
        yield
    finally:
        if before is None:
            del table[name]
        else:
            table[name] = before


@contextlib.contextmanager
def _spy() -> Iterator[list[nn.Module]]:
    """The modules that call the method."""
    calls: list[nn.Module] = []

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return METHODS[METHOD](module, *args, **kwargs)

    with _registered(METHOD, spy):
        yield calls


def _control(ours: Any, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far the outputs go when every query misses the first key that it should see."""

    def wrong(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = read_call(METHOD, module, *args, **kwargs)
        seen = call.pattern.visible(call.query.device)
        first = seen & (seen.cumsum(-1) == 1)
        missing = seen & ~(first & (seen.sum(-1, keepdim=True) > 1))
        pattern = Pattern(q_len=seen.shape[2], kv_len=seen.shape[3], causal=False, dense=missing)
        return attend(call, pattern)

    outputs = {k: v for k, v in expected.items() if not k.startswith("grad ")}
    with _registered(METHOD, wrong), torch.no_grad():
        return errors(run(ours, inputs), outputs)[0]


def _has_attention(model: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def _not_called(model: nn.Module, inputs: dict[str, Tensor], calls: list[nn.Module]) -> str:
    """Attention modules that ran, and of which neither they nor their parts called the method."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.add(type(module).__name__))
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    with torch.no_grad():
        run(model, inputs)
    for hook in hooks:
        hook.remove()
    called = {type(module).__name__ for module in calls}
    around = {
        type(module).__name__
        for module in model.modules()
        if called & {type(part).__name__ for part in module.modules()}
    }
    silent = sorted(ran - around - called)
    return f"computed by the model itself: {', '.join(silent)}" if silent else ""


def _reaches_interface(eager: Any) -> bool:
    """Whether a class that our check refuses would have called the interface after all."""
    calls = []
    plain = AttentionInterface._global_mapping["sdpa"]

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    masks = AttentionMaskInterface._global_mapping
    masks["plain_spy"] = masks["sdpa"]
    try:
        with _registered("plain_spy", spy), torch.no_grad():
            model = build(type(eager), eager.config, "plain_spy")
            run(model, model_inputs(model))
    except Exception:
        return bool(calls)
    finally:
        del masks["plain_spy"]
    return bool(calls)


def _text_part_only(eager: Any) -> Any:
    """The composite with our attention in its text part, or None."""
    if "text_config" not in getattr(eager.config, "sub_configs", {}):
        return None
    with contextlib.suppress(Exception):
        return build(type(eager), eager.config, {"": "eager", "text_config": METHOD})
    return None


def _text_class(model: Any) -> str:
    """The class of the part of a composite that has its text config."""
    text = model.config.get_text_config()
    parts = [m for m in model.modules() if getattr(m, "config", None) is text]
    return type(parts[0]).__name__ if parts else "its language model"
