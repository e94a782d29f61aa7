"""``sequence_parallel``: one batch, forward and backward, over GPUs that share its sequences."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import types
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.methods.sharding import ShardedRows
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.sequence_parallelism.agreement import agree, join_all, least
from hf_attn_plugin.sequence_parallelism.batch import (
    IGNORED,
    WholeBatch,
    appended,
    read_batch,
    spread,
)
from hf_attn_plugin.sequence_parallelism.checks import (
    check_model,
    computes_anew,
    fingerprint,
    loss_function,
    numbers_of,
    reference,
    signature_of,
    transformers_model,
    unwrapped,
)
from hf_attn_plugin.sequence_parallelism.gradients import average_gradients
from hf_attn_plugin.sequence_parallelism.groups import find_group
from hf_attn_plugin.sequence_parallelism.hanging import hung, whole_rotary
from hf_attn_plugin.sequence_parallelism.losses import mean_of_ranks, sum_of_losses
from hf_attn_plugin.sequence_parallelism.planning import (
    Settings,
    gpu_bytes,
    plan_shard,
    whole_rows,
)
from hf_attn_plugin.sequence_parallelism.rehearsal import Rehearsal, number, rehearse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TIMEOUT = datetime.timedelta(minutes=10)
# What was found of models, which does not change from batch to batch.
_REHEARSALS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Found]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Found:
    """What is known of a model that was spread before.

    Attributes:
        rehearsal: What it does to tokens.
        memory: Bytes of the smallest GPU among the ranks.
        loss: Its loss function, as it was then; None for batches without labels.
    """

    rehearsal: Rehearsal
    memory: int
    loss: Callable[[], Any] | None

    def holds(self, loss: Any) -> bool:
        """Whether the loss function is still that one."""
        return loss is None if self.loss is None else self.loss() == loss


def sequence_parallel(
    where: Any,
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    schedule: str | None = None,
    layout: str | None = None,
    ulysses: int | None = None,
    timeout: datetime.timedelta = _TIMEOUT,
) -> SequenceParallel:
    """Spread the sequences of a batch over several GPUs, which compute what one would.

    Every process of the group calls it with the *same whole batch* and then its model with its
    own part::

        with hf_attn_plugin.sequence_parallel(accelerator, model, batch) as shard:
            outputs = model(**shard.batch)
            accelerator.backward(outputs.loss)

    Attention runs over all tokens of all ranks: keys and values travel between them (ring
    attention, arXiv 2310.01889; all-gather as in Llama 3's training, arXiv 2407.21783; heads
    exchanged for tokens, DeepSpeed-Ulysses, arXiv 2309.14509). Everything else of the model sees
    one token at a time. ``outputs.loss`` is the loss over the valid tokens of all ranks, and its
    gradients are right when they are averaged over the ranks, as DistributedDataParallel and FSDP
    do; for plain models there is `SequenceParallel.average_gradients`. Dropout, where the model has
    any outside of attention, is drawn by each rank for its own tokens.

    Before any tensor travels, all ranks tell each other what they were given; where they differ, or
    one of them has to refuse, all raise the same error.

    Args:
        where: The processes that share each sequence: an ``Accelerator`` (the dimension ``cp`` of
            its mesh; all its processes without one), a ``DeviceMesh`` (of one dimension, or with
            one named ``cp``), a ``ProcessGroup``, or None for all processes.
        model: A transformers model whose ``attn_implementation`` is ``ring``, ``flash``,
            ``sliding_window``, ``longformer``, ``strided`` or ``linear``; PEFT, DDP and FSDP2 may
            be around it.
        batch: Its arguments for whole rows: ``input_ids`` or ``inputs_embeds``, and any of a 2D
            ``attention_mask``, ``position_ids`` (packed documents start again at 0),
            ``cu_seq_lens_q`` and ``cu_seq_lens_k``, ``labels`` or ``shift_labels``,
            ``token_type_ids``, ``global_attention_mask`` and ``num_items_in_batch`` (what the sum
            of the losses is divided by; the number of valid labels if it is not given). It is not
            changed.
        schedule: ``"ring"``, ``"gather"`` or ``"ulysses"``; None chooses for every layer.
        layout: ``"zigzag"`` or ``"contiguous"``; None chooses by the layers' balance.
        ulysses: How many neighbouring ranks exchange heads for tokens; None chooses.
        timeout: How long to wait for the other ranks to arrive.

    Returns:
        The shard, a context manager: forward *and* backward belong inside.

    Raises:
        ValueError: The model or the batch cannot be spread, or ranks differ: the same on all.
        TimeoutError: A rank did not arrive; it is named.
    """
    group = find_group(where)
    settings = Settings(schedule, layout, ulysses)
    return SequenceParallel(group, model, batch, settings, timeout)


class SequenceParallel:
    """One rank's part of a batch; made by `sequence_parallel`.

    Attributes:
        batch: What this rank's model call gets.
        shard: Which tokens every rank holds, and how attention is computed.
        reason: Why so, in a sentence.
        group: The ranks; None for one process without a group.
        ranks: How many they are.
        rank: This one.
        num_items: What the sum of all tokens' losses is divided by, 0-d; None without labels.
        items_of_caller: The same where whoever calls the model passes a ``num_items_in_batch``,
            as Trainer's own ``compute_loss`` does, which multiplies the loss by something in turn.
    """

    batch: dict[str, Any]
    shard: Shard
    reason: str
    group: ProcessGroup | None
    ranks: int
    rank: int
    num_items: Tensor | None
    items_of_caller: Tensor | int | None = None

    def __init__(
        self,
        group: ProcessGroup | None,
        model: nn.Module,
        batch: Mapping[str, Any],
        settings: Settings,
        timeout: datetime.timedelta,
    ) -> None:
        import torch.distributed as dist

        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._stack = contextlib.ExitStack()
        self._unfinished: list[weakref.ref[Tensor]] = []

        def look() -> tuple[tuple[WholeBatch, Any, nn.Module], dict[str, Any]]:
            settings.check(self.ranks)
            base = transformers_model(model)
            whole = read_batch(batch)
            inner = unwrapped(model)
            check_model(inner, base, whole.length)
            said = {
                "the model (its class, method and parameters)": fingerprint(base),
                "whether the model is in training mode": base.training,
                "whether gradients are wanted": torch.is_grad_enabled(),
                **numbers_of(base, whole.tokens.device.type),
                **settings.statement(),
                **whole.statement(),
            }
            return (whole, base, inner), said

        whole, base, inner = agree(group, look, timeout)
        key = (fingerprint(base), *sorted(whole.tensors))
        known = _REHEARSALS.setdefault(inner, {})
        loss = loss_function(base) if whole.has_labels else None
        same = key in known and known[key].holds(loss)
        # One rank may know more than the others: it may have been alone with the model.
        if not least(group, int(same), timeout):

            def try_out() -> tuple[Rehearsal, dict[str, Any]]:
                found = rehearse(inner, base.config, signature_of(base), whole)
                return found, {"what a rehearsal of the model shows": repr(found)}

            found = agree(group, try_out, timeout)
            memory = least(group, gpu_bytes(whole.tokens.device), timeout)
            known[key] = Found(found, memory, None if loss is None else reference(loss))
        self._rehearsal, memory = known[key].rehearsal, known[key].memory
        join_all(group, whole.tokens.device)
        self._model, self._base, self._print = inner, base, fingerprint(base)
        self._length = whole.length
        self._spread(whole, base, settings, memory)

    def _spread(self, whole: WholeBatch, base: Any, settings: Settings, memory: int) -> None:
        found, config = self._rehearsal, base.config
        rows = whole_rows(whole, config, self.ranks)
        choice = plan_shard(whole, rows, found, self.ranks, settings, memory)
        layout = choice.layout
        self.reason = choice.reason
        self.shard = Shard(
            layout,
            self.rank,
            self.group,
            ulysses=choice.ulysses,
            schedule=choice.schedule,
            memory=memory,
        )
        self._rows = ShardedRows(self.shard, rows)
        count = rows.appended
        positions = whole.tensors.get("position_ids")
        if positions is None and found.positions is not None:
            positions = number(found.positions, whole.tensors, config)
        self._last_position = None if positions is None else positions.max()
        pad = getattr(config.get_text_config(), "pad_token_id", None)
        self.batch = spread(whole, layout, self.rank, positions, 0 if pad is None else int(pad))
        if "use_cache" in found.options:
            self.batch["use_cache"] = False
        self._set_labels(whole, count)

    def _set_labels(self, whole: WholeBatch, count: int) -> None:
        loss = self._rehearsal.loss
        targets = whole.targets(shifted=loss != "same") if loss else None
        self._targets: Tensor | None = None
        self._items: Tensor | int | None = None
        self.num_items = None
        if targets is None:
            return
        self.num_items = whole.num_items
        if self.num_items is None:
            self.num_items = (targets != IGNORED).sum()
        targets = appended(targets, count, IGNORED)
        self._targets = self.shard.layout.take(targets, self.rank).contiguous()
        if loss == "own":
            self.batch["labels"] = self.batch["shift_labels"] = self._targets
            self.batch["num_items_in_batch"] = float(self.num_items) / self.ranks

    def __enter__(self) -> SequenceParallel:
        stack = contextlib.ExitStack()
        with stack:
            stack.enter_context(hung(self._model, self._rows))
            if self._last_position is not None:
                stack.enter_context(whole_rotary(self._model, self._last_position))
            for handle in (
                self._model.register_forward_pre_hook(self._before, with_kwargs=True),
                self._model.register_forward_hook(self._after),
            ):
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._stack.close()
        waiting = any(result() is not None for result in self._unfinished)
        if kind is None and waiting and computes_anew(self._model):
            raise ValueError(
                "sequence_parallel: the block ends after a forward pass whose backward pass has "
                "not run, and with gradient checkpointing the latter computes attention anew, "
                "which then knows nothing of the other ranks. Call backward() inside the block, or "
                "run forward under torch.no_grad()."
            )

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Refuse a call of anything but the batch.

        The number of items that a caller adds (Trainer does) is one rank's, or nobody's.
        """
        self._check_call(args, kwargs)
        kwargs = dict(kwargs)
        given = kwargs.pop("num_items_in_batch", None) is not None
        self._items = self.items_of_caller if given else None
        if self._items is None:
            self._items = self.num_items
        if self._items is not None and "num_items_in_batch" in self.batch:
            # A plain number: FSDP would cast a tensor to the model's 16 bits.
            kwargs["num_items_in_batch"] = float(self._items) / self.ranks
        return args, kwargs

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Without these the model would compute something else, and say nothing."""
        own = " Call the model with the shard's batch: model(**shard.batch)."
        if len(args) > 1:
            raise ValueError("Inside sequence_parallel arguments go by name." + own)
        if fingerprint(self._base) != self._print:
            raise ValueError(
                "The model's attention was changed inside sequence_parallel: it was "
                f"{self._print!r} and is {fingerprint(self._base)!r}. Change it before the block."
            )
        if kwargs.get("return_dict") is False:
            raise ValueError(
                "Inside sequence_parallel the loss is put into the model's output by name, and "
                "return_dict=False makes it a tuple. Leave that out."
            )
        if "position_ids" in self.batch and kwargs.get("position_ids") is None:
            raise ValueError(
                "Inside sequence_parallel a model that is given no position_ids would number the "
                "tokens of this rank as if they were a sequence." + own
            )
        late = [n for n in ("attention_mask", "labels") if kwargs.get(n) is not None]
        for name in late:
            if name == "attention_mask" or self._targets is None:
                raise ValueError(
                    f"Inside sequence_parallel the model is given {name} for this rank's tokens, "
                    f"of which the other ranks know nothing. Put {name} of the whole rows into the "
                    "batch that sequence_parallel gets." + own
                )

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The loss of all ranks in the place of this rank's."""
        if getattr(output, "pooler_output", None) is not None:
            output = _replaced(output, pooler_output=None)  # of a token that one rank holds
        first = next(t for t in output.values() if isinstance(t, Tensor))
        if self._targets is None or self._items is None:
            self._watch(first)
            return output
        loss = getattr(output, "loss", None)
        if self._rehearsal.loss != "own":
            total = sum_of_losses(output.logits, self._targets)
            loss = total / (self._items / self.ranks)
        if loss is None:  # the loop left the labels out, and computes a loss by itself
            self._watch(first)
            return output
        loss = mean_of_ranks(loss, self.group)
        self._watch(loss, output.logits)  # a loop may compute a loss by itself all the same
        return _replaced(output, loss=loss)

    def _watch(self, *results: Tensor) -> None:
        """Remember what backward begins with, until it does."""
        wanted = [result for result in results if result.requires_grad]
        self._unfinished = [weakref.ref(result) for result in wanted]
        for result in wanted:
            result.register_hook(self._finish)

    def _finish(self, grad: Tensor) -> None:
        self._unfinished = []

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """The mean of a number per token over all tokens of all ranks, for a loss of one's own.

        Its gradient is right when gradients are averaged over the ranks. A collective call.

        Args:
            values: ``[batch, tokens of this rank]``.
            valid: bool of the same shape, False at tokens that do not count. Tokens that were
                appended to make the length divide never do.

        Returns:
            0-d, the same number on every rank.
        """
        import torch.distributed as dist

        counted = self._real(values.device).expand_as(values)
        counted = counted if valid is None else counted & valid.to(values.device)
        count = counted.sum()
        if self.group is not None:
            dist.all_reduce(count, group=self.group)
        total = torch.where(counted, values, 0).sum()
        return mean_of_ranks(total * self.ranks / count, self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """Put what the ranks have per token together, in order and without what was appended.

        A collective call. No gradient goes through it.

        Args:
            tensor: ``[batch, tokens of this rank, ...]``, such as logits.

        Returns:
            ``[batch, tokens, ...]``.
        """
        import torch.distributed as dist

        own = tensor.detach().contiguous()
        parts = [own]
        if self.group is not None:
            parts = [torch.empty_like(own) for _ in range(self.ranks)]
            dist.all_gather(parts, own, group=self.group)
        return self.shard.layout.join(parts)[:, : self._length]

    def average_gradients(self, model: nn.Module) -> None:
        """Average the gradients over the ranks, for a model that neither DDP nor FSDP averages.

        Call it after the last backward pass and before the optimizer's step. A collective call.
        """
        average_gradients(model, self.group)

    def _real(self, device: torch.device) -> Tensor:
        """Bool ``[1, tokens of this rank]``, False at appended tokens."""
        layout = self.shard.layout
        index = torch.arange(layout.length, device=device)[None]
        return layout.take(index, self.rank) < self._length


def _replaced(output: Any, **changes: Any) -> Any:
    """A model's output with some entries changed, in their usual order."""
    return type(output)(**{**dict(output), **changes})
