"""transformers' Trainer with every sequence spread over a ring of processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_attn_plugin.sequence_parallelism.context import SequenceParallel, sequence_parallel
from hf_attn_plugin.sequence_parallelism.faults import watch_processes
from hf_attn_plugin.sequence_parallelism.mesh import RING, ring_mesh

if TYPE_CHECKING:
    from accelerate.parallelism_config import ParallelismConfig
    from torch.distributed.device_mesh import DeviceMesh

    _Base = Trainer
else:
    _Base = object

# By which accelerate's launcher says that it hands on sizes for a ParallelismConfig.
FROM_LAUNCHER = "ACCELERATE_USE_PARALLELISM_CONFIG"


def parallelism_config(args: TrainingArguments) -> ParallelismConfig | None:
    """Find the `ParallelismConfig` of a job.

    Returns:
        That of the arguments, or else of accelerate's launcher; None without either.
    """
    from accelerate.parallelism_config import ParallelismConfig

    config = args.parallelism_config
    if config is None and os.environ.get(FROM_LAUNCHER, "false").lower() == "true":
        config = ParallelismConfig()
    return config


class SequenceParallelTrainerMixin(_Base):
    """Spreads every sequence over a ring of processes; the first base of a subclass of `Trainer`.

    All that Trainer does stays: batches, steps, losses, gradient norms, checkpoints and evaluation
    are those of a job with one process per ring. A batch is read whole by every process of its
    ring, and cut to what each computes just before the model is called::

        class Mine(SequenceParallelTrainerMixin, SFTTrainer): ...

        Mine(model, args, train_dataset=rows, sequence_parallel_size=4).train()

    Models are wrapped in DDP or FSDP2 over all processes, as accelerate is configured. If a process
    dies in training or evaluation, all end with an error that names it (`watch_processes`).

    Args:
        args: As the other base takes them, positional ones too.
        sequence_parallel_size: Processes per sequence; their number is a multiple of it. By
            default `cp_size` of the `ParallelismConfig` in `TrainingArguments` or of accelerate's
            launcher, and without one all processes. 1: as if the mixin were not there.
        sequence_parallel_options: Keyword arguments for `sequence_parallel`, such as `schedule`.
        kwargs: As the other base takes them.

    Attributes:
        ring_mesh: The processes; its dimension `cp` is this process's ring. None without rings.
        shard: What `sequence_parallel` made of the last batch, for losses of one's own: in an
            overridden `compute_loss`, `inputs["shift_labels"]` are the targets of this process's
            tokens, and `self.shard.mean(losses, valid)` is the mean over all processes of the ring.
            `model(**inputs).loss` is the mean over this batch, as in Trainer.

    Raises:
        ValueError: If the job's processes do not make up such rings, or an option of Trainer would
            compute another loss than one process does (label smoothing, NEFTune,
            `compute_loss_func`).
    """

    def __init__(
        self,
        *args: Any,
        sequence_parallel_size: int | None = None,
        sequence_parallel_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.ring_mesh: DeviceMesh | None = None
        self._ring_size = sequence_parallel_size
        self._ring_options = sequence_parallel_options or {}
        # What Trainer divides the loss of the present batches by, before any division for rings.
        self._targets: Tensor | int | None = None
        self.shard: SequenceParallel | None = None
        self._watching = False
        super().__init__(*args, **kwargs)
        if self.ring_mesh is not None:
            self._check_options()

    def _check_options(self) -> None:
        # By name: verification stands above this part of the package.
        if "VerifyCallback" in (type(item).__name__ for item in self.callback_handler.callbacks):
            raise ValueError(
                "VerifyCallback compares attention over whole rows, which no process has here: run "
                "it with sequence_parallel_size=1 first, on short rows"
            )
        if self.args.torch_compile:
            raise ValueError(
                "torch_compile: attention over sequences that are spread over processes does not "
                "run under torch.compile. Leave it out"
            )
        refused = {
            "label_smoothing_factor": self.label_smoother is not None,
            "neftune_noise_alpha": self.neftune_noise_alpha is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "eval_use_gather_object": self.args.eval_use_gather_object,
        }
        asked = [name for name, given in refused.items() if given]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: not over sequences that are spread over processes, since it "
                "would see each process's part alone. Leave it out, or override compute_loss and "
                'use inputs["shift_labels"] and self.shard.mean there'
            )

    # ---- the ring ----

    def create_accelerator_and_postprocess(self) -> None:
        """Group the processes, and let data loaders give each group one batch."""
        if self._ring_size == 1:
            super().create_accelerator_and_postprocess()
            return
        config = parallelism_config(self.args)
        if config is not None:
            self._take_size_of(config)
        # accelerate must not see the ring in either place: it would want FSDP2, and SDPA alone.
        given, self.args.parallelism_config = self.args.parallelism_config, _without_ring(config)
        try:
            with _without(FROM_LAUNCHER):
                super().create_accelerator_and_postprocess()
        finally:
            self.args.parallelism_config = given
        found = self.accelerator.parallelism_config
        if found is not None and found.cp_size > 1:
            raise ValueError(
                "an Accelerator with ParallelismConfig(cp_size=...) was made before the Trainer, "
                "which makes its own: leave that out, and give the config to TrainingArguments"
            )
        if config is not None and config.dp_shard_size > 1 and not self.is_fsdp_enabled:
            raise ValueError(
                f"the ParallelismConfig says dp_shard_size={config.dp_shard_size}, but weights are "
                "sharded by FSDP2 alone: configure it (recipes/accelerate/ring_fsdp2.yaml), or "
                "leave dp_shard_size out for DDP"
            )
        processes = self.accelerator.num_processes
        size = processes if self._ring_size is None else self._ring_size
        self.ring_mesh = ring_mesh(self.accelerator, size)

    def _take_size_of(self, config: ParallelismConfig) -> None:
        if config.tp_size > 1 or config.sp_size > 1:
            raise ValueError(
                "sequences cannot be spread over processes beside tensor parallelism or "
                f"DeepSpeed's sequence parallelism (tp_size={config.tp_size}, "
                f"sp_size={config.sp_size}): use cp_size with DDP or FSDP2"
            )
        if config.cp_size > 1 and self._ring_size not in (None, config.cp_size):
            raise ValueError(
                f"sequence_parallel_size={self._ring_size}, but the ParallelismConfig says "
                f"cp_size={config.cp_size}: give one of the two, or both alike"
            )
        if config.cp_size > 1:
            self._ring_size = config.cp_size

    def get_cp_size(self) -> int:
        """Processes per sequence."""
        return 1 if self.ring_mesh is None else self.ring_mesh[RING].size()

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], contextlib.AbstractContextManager[Any]], dict[str, Any]]:
        """Cut a batch to what this process computes; called for training and for evaluation."""
        if self.ring_mesh is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        inputs = self._prepare_inputs(inputs)
        whole = self.accelerator.unwrap_model(model)
        shard = sequence_parallel(self.ring_mesh[RING], whole, inputs, **self._ring_options)
        self.shard = shard
        # Trainer's own compute_loss passes its count, and multiplies the loss afterwards. Another
        # that calls the model with its inputs passes none: it gets the mean over this batch.
        shard.items_of_caller = self._targets
        local = {name: v for name, v in shard.batch.items() if name != "num_items_in_batch"}
        return lambda: shard, local

    # ---- counts ----

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        """Count targets once per process: the loss is multiplied by all processes, too."""
        mesh, self.ring_mesh = self.ring_mesh, None  # transformers >= 5.19 divides by get_cp_size
        try:
            self._targets = super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.ring_mesh = mesh
        return self._targets

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """This process's part of a batch's."""
        return super().floating_point_ops(inputs) // self.get_cp_size()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens once, though every process of a ring has read them."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self.get_cp_size()

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's, with what the model returns for every token put together from the ring."""
        if self.ring_mesh is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._targets = None
        labelled = self.label_names and all(inputs.get(k) is not None for k in self.label_names)
        if labelled:
            loss, logits, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
        else:
            context, local = self._prepare_context_parallel_inputs(model, inputs)
            with context():
                loss, logits, labels = super().prediction_step(
                    model, local, prediction_loss_only, ignore_keys
                )
        if logits is not None and self.shard is not None:
            logits = _together(logits, self.shard.shard.layout.share, self.shard.gather)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with one process per ring taking part in the metrics."""
        if self.ring_mesh is None:
            return super().evaluation_loop(*args, **kwargs)
        loader = args[0] if args else kwargs["dataloader"]
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            raise ValueError(
                "evaluation over an iterable data set: its last batch would be filled up with rows "
                "that count twice. Give a data set with a length, such as datasets.Dataset"
            )
        keep_all = self.gather_function == self.accelerator.gather
        self.gather_function = self._gather_all if keep_all else self._gather_for_metrics
        with self._watched():
            return super().evaluation_loop(*args, **kwargs)

    def _gather_all(self, data: Any) -> Any:
        """Results of one process per ring, in the order of the rings."""
        from accelerate.utils import recursively_apply

        rings = self.accelerator.num_processes // self.get_cp_size()

        def first(gathered: Tensor) -> Tensor:
            by_process = gathered.unflatten(0, (rings, self.get_cp_size(), -1))
            return by_process[:, 0].flatten(0, 1)

        return recursively_apply(first, self.accelerator.gather(data))

    def _gather_for_metrics(self, data: Any) -> Any:
        """The same without the rows that fill up the last batch of a data loader."""
        from accelerate.utils import recursively_apply

        gathered = self._gather_all(data)
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return gathered
        return recursively_apply(lambda rows: rows[: state.remainder], gathered)

    # ---- faults ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; if a process dies, the others end with an error that names it."""
        with self._watched():
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        if self.ring_mesh is None or self._watching:
            yield
            return
        self._watching = True
        try:
            with watch_processes():
                yield
        finally:
            self._watching = False


class SequenceParallelTrainer(SequenceParallelTrainerMixin, Trainer):
    """transformers' `Trainer`, with every sequence spread over a ring of processes.

    See `SequenceParallelTrainerMixin` for `sequence_parallel_size` and
    `sequence_parallel_options`; all other arguments are Trainer's.
    """


def _without_ring(config: ParallelismConfig | None) -> ParallelismConfig | None:
    """What accelerate is told of a job's processes: for FSDP2 a ring shards as any others do.

    Returns:
        None, for DDP and for FSDP2 over all processes; a config where there are replicas of what
        FSDP2 shards.
    """
    from accelerate.parallelism_config import ParallelismConfig

    if config is None or config.dp_replicate_size == 1:
        return None
    sharded = config.dp_shard_size * config.cp_size
    replicated = config.dp_replicate_size
    return ParallelismConfig(replicated, sharded, tp_size=1, cp_size=1, sp_size=1)


def _together(data: Any, length: int, gather: Callable[[Tensor], Tensor]) -> Any:
    """Tensors with one entry per token of this process, whole; all others as they are."""
    if isinstance(data, tuple | list):
        return type(data)(_together(item, length, gather) for item in data)
    if isinstance(data, dict):
        return type(data)({k: _together(item, length, gather) for k, item in data.items()})
    per_token = isinstance(data, Tensor) and data.ndim > 1 and data.shape[1] == length
    return gather(data) if per_token else data


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Without an environment variable."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
