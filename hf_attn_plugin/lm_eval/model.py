"""The lm-eval model `hf-attn`: lm-eval's own `hf`, with the attention chosen by name.

Importing this module registers it; it needs lm-eval.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

# The concrete `hf` model has to be imported before another one is registered: lm-eval fills its
# registry with its own models only as long as it is empty.
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_attn_plugin
from hf_attn_plugin.config import METHOD_CONFIGS, parse_parameters, validate_attn_params
from hf_attn_plugin.lm_eval.always import choose_always
from hf_attn_plugin.lm_eval.names import check_implementation
from hf_attn_plugin.lm_eval.reads import KVReads


def _text_attention(model: PreTrainedModel) -> str:
    config: Any = model.config
    return str(config.get_text_config()._attn_implementation)


def _decode_only(name: str | None) -> bool:
    method = METHOD_CONFIGS.get(name or "")
    return method is not None and method.decode_only


@register_model("hf-attn")
class AttentionLM(HFLM):
    """lm-eval's Hugging Face model under any registered attention implementation.

    Besides the arguments of lm-eval's `hf` (``--model_args``) it takes those below; it counts the
    KV cache that is read; and it refuses prompts that are too long, where `hf` cuts them from the
    left.

    Args:
        pretrained: Model name, folder, or a model in memory.
        attn_implementation: For example "sparq"; None leaves it to transformers. Not with a model
            in memory: set it there.
        attn_params: ``{method: {parameter: value}}``, as kept in the model's config.
        decode_continuation: Measure the decoding path: everything up to the last token of the
            context is prefilled, then one token at a time is fed, for log-likelihoods and
            generation alike. None does so for methods that act in decoding only
            (`MethodConfig.decode_only`, for example `sparq`), of which a single forward pass would
            measure dense attention: False is refused there.
        device: None takes CUDA when there is some, else the CPU.
        progress: Show lm-eval's progress bars.
        **kwargs: Everything else that lm-eval's `hf` takes.

    Raises:
        ValueError: A name that is not registered, or parameters the method or model cannot take.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        attn_implementation: str | None = None,
        attn_params: dict[str, dict[str, Any]] | None = None,
        decode_continuation: bool | None = None,
        device: str | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {"attn_implementation": attn_implementation, "attn_params": attn_params}
        given = {name: value for name, value in given.items() if value is not None}
        if given and not isinstance(pretrained, str):
            raise ValueError(
                f"{', '.join(given)} cannot be passed with a model in memory: use "
                "model.set_attn_implementation() and hf_attn_plugin.configure()."
            )
        check_implementation(attn_implementation)
        named = attn_implementation
        if named is None and not isinstance(pretrained, str):
            named = _text_attention(pretrained)
        if decode_continuation is False and _decode_only(named):
            raise ValueError(
                f"attn_implementation={named!r} acts in decoding only, and without "
                "decode_continuation texts are scored in one forward pass: the result would be "
                "dense attention's. Leave --no-decode-continuation (decode_continuation=False) "
                "out, or evaluate 'flash'."
            )
        self._attn_params = validate_attn_params(attn_params or {})
        self._progress = progress
        self.reads = KVReads()
        self._own_reads = KVReads()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, device=device, **given, **kwargs)
        if isinstance(pretrained, str):  # of a model in memory its owner decides
            choose_always(self.model)
        if hasattr(self, "accelerator") and self.world_size == 1 and "tp_plan" not in kwargs:
            # lm-eval shares the requests out among GPUs only; CPU processes would each do all.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        if decode_continuation is None:
            decode_continuation = _decode_only(self.attn_implementation)
        if decode_continuation and self.backend != "causal":
            raise ValueError("decode_continuation needs a decoder-only model.")
        self.decode_continuation = decode_continuation

    @property
    def attn_implementation(self) -> str:
        """The attention implementation that the (text) model runs with."""
        return _text_attention(self.model)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's own facts about the model, and ours; they are saved with the results."""
        return {
            **super().get_model_info(),
            "attn_implementation": self.attn_implementation,
            "attn_params": getattr(self.model.config, "attn_params", None),
            "decode_continuation": self.decode_continuation,
            "kv_reads": self.reads.to_dict(),
        }

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """As lm-eval's, counting KV reads."""
        with self._counting():
            return super().loglikelihood(requests, disable_tqdm or not self._progress)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's, counting KV reads."""
        with self._counting():
            return super().loglikelihood_rolling(requests, disable_tqdm or not self._progress)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's, counting KV reads; a prompt that is too long is an error."""
        with self._counting():
            return super().generate_until(requests, disable_tqdm or not self._progress)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As lm-eval's, but without silent truncation."""
        if truncation:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        ids, mask = super().tok_batch_encode(strings, padding_side)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self._refuse_truncation(ids.shape[1], left_truncate_len)
        return ids, mask

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        # Before the weights are loaded, which can take minutes.
        for name, values in self._attn_params.items():
            parse_parameters(METHOD_CONFIGS[name], values).check_model(self._config)

    def _refuse_truncation(self, tokens: int, maximum: int) -> None:
        raise ValueError(
            f"a prompt of {tokens} tokens does not fit: the model takes {self.max_length}, and "
            f"{self.max_length - maximum} of them are kept for the answer. Pass max_length=... in "
            "--model_args to evaluate beyond the model's context, or truncation=True to cut the "
            "prompt from the left."
        )

    def barrier(self) -> None:
        """Wait for the other processes, as lm-eval does after each kind of request."""
        super().barrier()
        if self.world_size > 1:
            self._collect_reads()

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        with hf_attn_plugin.count_reads(self.model) as counter:
            yield
        self._own_reads += KVReads(
            counter.decode_steps, counter.kv_bytes_read, counter.kv_bytes_dense
        )
        # Several processes add theirs up at the barrier: with lm-eval's response cache, one of
        # them may have nothing to run and never come here.
        if self.world_size == 1:
            self._collect_reads()

    def _collect_reads(self) -> None:
        own = list(self._own_reads.to_dict().values())
        counts = self.all_gather(torch.tensor([own], dtype=torch.int64, device=self.device))
        self.reads += KVReads(*counts.sum(0).tolist())
        self._own_reads = KVReads()

    def _loglikelihood_tokens(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for index, (text, context, continuation) in enumerate(requests):
            # The last token is only predicted, never read.
            excess = len(context) + len(continuation) - 1 - self.max_length
            if excess > 0 and not self.truncation:
                self._refuse_truncation(len(context) + len(continuation) - 1, self.max_length)
            if excess > 0:
                requests[index] = (text, context[excess:], continuation)
        if not self.decode_continuation:
            return super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        batch_size = override_bs or self.batch_size
        if batch_size == "auto":
            batch_size = self._detect_batch_size()
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            groups[len(context), len(continuation)].append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Decoding continuations") as bar:
            for (context_length, _), group in sorted(groups.items(), reverse=True):
                for first in range(0, len(group), batch_size):
                    batch = group[first : first + batch_size]
                    ids = torch.tensor(
                        [requests[index][1] + requests[index][2] for index in batch],
                        device=self.device,
                    )
                    scores = self._decode(ids, context_length)
                    for index, answer in zip(batch, scores, strict=True):
                        answers[index] = answer
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    bar.update(len(batch))
        return answers

    @torch.no_grad()
    def _decode(self, ids: torch.Tensor, context_length: int) -> list[tuple[float, bool]]:
        """Teacher-force everything from the context's last token on, one token at a time.

        Args:
            ids: Contexts and continuations, (batch, tokens), int64, without padding.
            context_length: Tokens of the contexts, at least 1.

        Returns:
            Per row the log-likelihood of the continuation (nats), and whether it is the greedy one.
        """
        cache = self._prefill(ids[:, : context_length - 1]) if context_length > 1 else None
        total = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
        greedy = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        with self._autocast():
            for position in range(context_length - 1, ids.shape[1] - 1):
                output = self.model(
                    input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                target = ids[:, position + 1]
                scores = F.log_softmax(output.logits[:, -1], dim=-1, dtype=self.softmax_dtype)
                total += scores.gather(1, target[:, None])[:, 0]
                greedy &= scores.argmax(-1) == target
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        mask = kwargs.get("attention_mask")
        # generate() would take the first new token from the prefill. A row with nothing but
        # padding in front of its last token is left to it.
        if self.decode_continuation and context.shape[1] > 1 and mask is not None:
            before = mask[:, :-1]
            if bool(before.any(-1).all()):
                cache = self._prefill(context[:, :-1], before)
                # generate() repeats its inputs for beams, but not a cache that it is given.
                defaults = self.model.generation_config
                copies = [
                    kwargs.get(name) or getattr(defaults, name, None) or 1
                    for name in ("num_beams", "num_return_sequences")
                ]
                if max(copies) > 1:
                    cache.batch_repeat_interleave(max(copies))
                kwargs["past_key_values"] = cache
        return super()._model_generate(context, max_length, stop, **kwargs)

    @torch.no_grad()
    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        """The cache after reading `ids` (batch, tokens); `mask` is 0 on left padding."""
        inputs: dict[str, Any] = {}
        if mask is not None and not bool(mask.all()):
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs = {"attention_mask": mask, "position_ids": positions}
        with self._autocast():
            # The base model alone, since no logits are wanted here.
            return self.model.base_model(input_ids=ids, use_cache=True, **inputs).past_key_values

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
