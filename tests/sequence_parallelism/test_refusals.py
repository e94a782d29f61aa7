"""What cannot be spread over ranks is refused before they wait for each other, on all alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import hf_attn_plugin
from hf_attn_plugin.sequence_parallelism.checks import reference
from tests.parallel.processes import run_processes
from tests.sequence_parallelism.cases import LENGTH, make_batch, make_model
from tests.sequence_parallelism.refusals import (
    LLAMA,
    REFUSED,
    known_to_one,
    late,
    other_loss_on_one,
    refuse,
)
from tests.tiny import random_ids, tiny_model


@pytest.fixture(scope="module")
def said() -> list[dict[str, str]]:
    return run_processes(refuse, 2, [function.__name__ for function in REFUSED], limit_s=240)


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_every_rank_says_the_same(function: Any, said: list[dict[str, str]]) -> None:
    first, second = (rank[function.__name__] for rank in said)
    assert re.search(REFUSED[function], first, re.DOTALL), first
    if function is late:
        assert re.search("refused on rank 0 of 2: it waited 1 s and gave up", second), second
    else:
        assert second == first


def test_a_model_that_one_rank_had_to_itself_is_tried_out_by_all() -> None:
    expected = make_model(LLAMA, "flash")(**make_batch("plain", "llama")).logits
    for logits in run_processes(known_to_one, 2):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_function_that_one_rank_replaced() -> None:
    first, second = run_processes(other_loss_on_one, 2)
    assert first == second
    assert re.search("refused on rank 1 of 2: .*its loss is no cross-entropy", first), first


def test_a_loss_function_that_was_replaced_is_tried_out() -> None:
    model, ids = tiny_model("llama", "ring"), random_ids(1, 8)
    batch = {"input_ids": ids, "labels": ids}

    def loss() -> torch.Tensor:
        with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
            return model(**shard.batch).loss

    usual, before = loss(), model.loss_function

    def like_it(*args: Any, **kwargs: Any) -> torch.Tensor:
        return before(*args, **kwargs)

    model.loss_function = like_it
    assert torch.equal(loss(), usual)
    model.loss_function = lambda logits, **kwargs: logits.mean()
    with pytest.raises(ValueError, match="its loss is no cross-entropy over tokens"):
        loss()
    with hf_attn_plugin.sequence_parallel(None, model, {"input_ids": ids}) as shard:
        model(**shard.batch)  # without labels there is none
    model.loss_function = before
    assert torch.equal(loss(), usual)


def test_outside_of_it_ring_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"outside of hf_attn_plugin\.sequence_parallel.*'flash'"):
        tiny_model("llama", "ring")(random_ids(1, 8))


def test_one_process_needs_no_group_and_is_left_clean_after_an_error() -> None:
    model = tiny_model("llama", "ring")
    ids = random_ids(2, LENGTH)
    plain = tiny_model("llama", "flash")(ids, labels=ids)
    with hf_attn_plugin.sequence_parallel(None, model, {"input_ids": ids, "labels": ids}) as shard:
        output = model(**shard.batch)
        mean = shard.mean(output.logits[..., 0])
    assert torch.equal(shard.gather(output.logits), plain.logits)
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(mean, plain.logits[..., 0].mean())
    hooks = len(model._forward_hooks)
    with pytest.raises(RuntimeError, match="of the loop's own"), shard:
        raise RuntimeError("of the loop's own")
    assert not any("_hf_attn_rows" in vars(module) for module in model.modules())
    assert len(model._forward_hooks) == hooks == 0


def test_a_backward_pass_outside_is_noticed_where_it_would_compute_anew() -> None:
    model = tiny_model("llama", "ring").train()
    model.gradient_checkpointing_enable()
    batch = {"input_ids": random_ids(1, 8), "labels": random_ids(1, 8)}
    with (
        pytest.raises(ValueError, match=r"Call backward\(\) inside the block"),
        hf_attn_plugin.sequence_parallel(None, model, batch) as shard,
    ):
        output = model(**shard.batch)
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard, torch.no_grad():
        output = model(**shard.batch)
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
        output = model(**shard.batch)
        output.loss.backward()
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
        output = model(**shard.batch)  # whose own loss lives on, and is not what is trained
        shard.mean(output.logits.logsumexp(-1)).backward()
    model.eval()  # nothing is computed anew
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
        output = model(**shard.batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call.pop("position_ids"), "given no position_ids"),
        (lambda call: call.update(attention_mask=torch.ones(1, 8)), "Put attention_mask of the"),
        (lambda call: call.update(labels=call["input_ids"]), "Put labels of the whole rows"),
        (lambda call: call.update(return_dict=False), "return_dict=False makes it a tuple"),
    ],
)
def test_a_call_of_something_else_than_the_batch(change: Any, message: str) -> None:
    model, batch = tiny_model("llama", "ring"), {"input_ids": random_ids(1, 8)}
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
        model(**shard.batch)
        call = dict(shard.batch)
        change(call)
        with pytest.raises(ValueError, match=message):
            model(**call)
        with pytest.raises(ValueError, match="arguments go by name"):
            model(call["input_ids"], None)


def test_attention_that_changes_inside() -> None:
    model, batch = tiny_model("llama", "ring"), {"input_ids": random_ids(1, 8)}
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="was changed inside sequence_parallel"):
            model(**shard.batch)


def test_virtual_tokens_are_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_model("llama", "ring"), config)
    with pytest.raises(ValueError, match="virtual tokens before every sequence"):
        hf_attn_plugin.sequence_parallel(None, model, {"input_ids": random_ids(1, 8)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "must hold input_ids or inputs_embeds"),
        ({"labels": torch.zeros(1, 7, dtype=torch.long)}, r"labels must be \[1, 8\]"),
        ({"labels": torch.zeros(1, dtype=torch.long)}, "sequence classification"),
        ({"position_ids": torch.zeros(3, 8, dtype=torch.long)}, r"position_ids must be \[1, 8\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, "belong together"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 7]), "cu_seq_lens_k": torch.tensor([0, 7])},
            "ascend from 0 to the batch's 8 tokens",
        ),
        ({"logits_to_keep": 1}, "does not know how to spread 'logits_to_keep'"),
        ({"past_key_values": object()}, "past_key_values=.*no cache holds them"),
        ({"labels": [1]}, "labels must be a tensor, got a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_batches_that_fit_nothing(changes: dict[str, Any], message: str) -> None:
    batch = {"input_ids": random_ids(1, 8), **changes}
    with pytest.raises(ValueError, match=message):
        hf_attn_plugin.sequence_parallel(None, tiny_model("llama", "ring"), batch)


@pytest.mark.parametrize("where", [3, "cuda", object()])
def test_what_is_no_group_of_processes(where: Any) -> None:
    with pytest.raises(ValueError, match="takes an Accelerator, a DeviceMesh, a ProcessGroup"):
        hf_attn_plugin.sequence_parallel(where, tiny_model("llama", "ring"), {})


def test_a_loss_that_takes_no_weak_reference() -> None:
    class Loss:
        __slots__ = ()

    loss = Loss()
    assert reference(loss)() is loss
