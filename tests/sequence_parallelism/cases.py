"""Models and batches that are computed by one process and by several, and the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

import hf_attn_plugin
from hf_attn_plugin import configure
from hf_attn_plugin.config import METHOD_CONFIGS
from tests.tiny import VOCABULARY, pack_positions, padding_mask, random_ids, tiny_model

LENGTH = 50  # divides by no number of ranks


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and one batch.

    Attributes:
        name: Of the case.
        family: As in `tiny`, whose overrides follow.
        batch: A name of `make_batch`.
        attn: The method inside, "ring" standing for "flash" outside.
        overrides: Of the model's config.
        parameters: Of the method.
        schedule: Asked for.
        layout: Asked for.
        checkpointing: Gradient checkpointing, "reentrant" or "new".
    """

    name: str
    family: str
    batch: str = "plain"
    attn: str = "ring"
    overrides: tuple[tuple[str, Any], ...] = ()
    parameters: tuple[tuple[str, Any], ...] = ()
    schedule: str | None = None
    layout: str | None = None
    checkpointing: str | None = None


# Shapes of families that `tiny` has no entry for.
_OWN: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "phi3": {
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 40,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "original_max_position_embeddings": 40,
        },
    },
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def make_batch(name: str, family: str) -> dict[str, Tensor]:
    """Batches with labels; a name's parts say what is in them."""
    parts = name.split("-")
    rows = 1 if "lengths" in parts else 2
    ids = random_ids(rows, LENGTH)
    batch: dict[str, Tensor] = {"input_ids": ids}
    labels = ids.clone()
    if "masked" in parts:  # a few tokens are predicted, as in masked language modelling
        chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)) < 0.2
        labels = torch.where(chosen, ids, -100)
        batch["input_ids"] = torch.where(chosen, VOCABULARY - 1, ids)
    if "left" in parts or "right" in parts:
        side = "left" if "left" in parts else "right"
        mask = padding_mask(LENGTH, [11, 3], side)
        batch["attention_mask"] = mask
        batch["input_ids"] = torch.where(mask.bool(), batch["input_ids"], 0)
        labels = torch.where(mask.bool(), labels, -100)
    if "packed" in parts:
        batch["position_ids"] = pack_positions([[7, 23, 1, 19], [31, 10, 9]])
    if "lengths" in parts:
        cumulative = torch.tensor([0, 9, 30, 31, 50], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative}
        batch["position_ids"] = pack_positions([[9, 21, 1, 19]])
    if "few" in parts:  # all labels lie on one rank
        labels = torch.full_like(labels, -100)
        labels[:, 5:8] = ids[:, 5:8]
    if "globals" in parts:
        batch["global_attention_mask"] = torch.zeros_like(ids)
        batch["global_attention_mask"][0, [17, 40]] = 1
    batch["labels"] = labels
    if "embeds" in parts:
        generator = torch.Generator().manual_seed(9)
        del batch["input_ids"]
        batch["inputs_embeds"] = torch.randn(*ids.shape, 32, generator=generator)
    return batch


def make_model(case: Case, attn: str) -> Any:
    """The case's model, the same in every process."""
    model = tiny_model(case.family, attn, **_OWN.get(case.family, {}), **dict(case.overrides))
    if attn in METHOD_CONFIGS and case.parameters:
        configure(model, METHOD_CONFIGS[attn](**dict(case.parameters)))
    if case.checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    return model


def _results(model: Any, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
    found = {"loss": loss.detach(), "logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
    return found


def alone(case: Case) -> dict[str, Tensor]:
    """What one process computes."""
    model = make_model(case, "flash" if case.attn == "ring" else case.attn)
    batch = make_batch(case.batch, case.family)
    output = model(**batch, use_cache=False)
    output.loss.backward()
    assert output.loss.isfinite()
    return _results(model, output.loss, output.logits)


def together(rank: int, cases: list[Case], fault: str | None = None) -> dict[str, Any]:
    """What several compute, by case; an exception's text in place of a result."""
    found: dict[str, Any] = {}
    for case in cases:
        model = make_model(case, case.attn)
        batch = make_batch(case.batch, case.family)
        before = {name: tensor.clone() for name, tensor in batch.items()}
        with hf_attn_plugin.sequence_parallel(
            None, model, batch, schedule=case.schedule, layout=case.layout
        ) as shard:
            with injected(fault, rank):
                output = model(**shard.batch)
                output.loss.backward()
            shard.average_gradients(model)
            logits = shard.gather(output.logits)
        assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())
        assert not any("_hf_attn_rows" in vars(module) for module in model.modules())
        found[case.name] = _results(model, output.loss, logits)
    return found


@contextlib.contextmanager
def injected(fault: str | None, rank: int) -> Any:
    """An error in one rank's part, for the control."""
    from hf_attn_plugin.methods import sharding

    original = sharding.sharded_attention

    def wrong(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fault == "gradient of keys stays away" and rank == 1:
            key = key.detach() + 0 * key  # its backward pass still runs: others wait for it
        if fault == "a key is lost" and rank == 1:
            key = key.clone()
            key[:, :, 0] = 0
        return original(query, key, value, *args, **kwargs)

    sharding.sharded_attention = wrong if fault else original
    try:
        yield
    finally:
        sharding.sharded_attention = original


def difference(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The largest difference beyond rounding, in words; None if there is none."""
    if found.keys() != expected.keys():
        return f"{sorted(found.keys() ^ expected.keys())} are on one side only"
    valid = make_batch(case.batch, case.family).get("attention_mask")
    scale = max(float(t.norm()) for n, t in expected.items() if n not in ("loss", "logits"))
    worst, name = 0.0, ""
    for key, exact in expected.items():
        ours = found[key]
        if key == "logits" and valid is not None:
            ours, exact = ours[valid.bool()], exact[valid.bool()]
        floor = 0.0 if key in ("loss", "logits") else 0.01 * scale
        error = float((ours - exact).norm() / max(float(exact.norm()), floor))
        if not error <= worst:
            worst, name = error, key
    return f"{name} differs by {worst:.2g}" if not worst <= 1e-5 else None
