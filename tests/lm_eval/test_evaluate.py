"""`evaluate`: several configurations in a row on one model, which is left as it was."""

import logging

import pytest

from hf_attn_plugin import FlashConfig, SlidingWindowConfig, SparQConfig, configure
from hf_attn_plugin.lm_eval import evaluate, load_tasks

METADATA = {
    "niah": {"lengths": [160, 224], "depths": [0, 1], "samples": 2},
    "long_bpb": {"context": 120, "scored": 12, "samples": 4},
}


@pytest.fixture(scope="module")
def tasks(tokenizer, text_file):
    metadata = {task: {**options, "files": [text_file]} for task, options in METADATA.items()}
    return load_tasks(tokenizer, "niah,long_bpb", metadata, max_length=256)


def bits(run):
    return run.metric("long_bpb", "bits_per_byte")


def test_configurations_in_a_row(model, tokenizer, tasks):
    model.train()
    runs = {
        name: evaluate(model, tokenizer, tasks=tasks, decode_continuation=True, **options)
        for name, options in {
            "stock": {},
            "flash": {"attn": "flash"},
            "all keys": {"parameters": SparQConfig(rank=8, top_k=256)},
            "sparq": {"parameters": SparQConfig(rank=2, top_k=16)},
            "window": {"parameters": SlidingWindowConfig(window=32)},
            "stock again": {},
        }.items()
    }
    stock = runs["stock"]
    assert bits(stock) == bits(runs["stock again"]) > 0
    assert bits(runs["flash"]) == pytest.approx(bits(stock), abs=1e-5)
    assert bits(runs["all keys"]) == pytest.approx(bits(stock), abs=1e-5)
    assert abs(bits(runs["sparq"]) - bits(stock)) > 1e-3
    assert abs(bits(runs["window"]) - bits(stock)) > 1e-3
    assert [run.attn for run in runs.values()][2:5] == ["sparq", "sparq", "sliding_window"]
    assert runs["sparq"].attn_params["top_k"] == 16
    assert {run.kv_bytes_dense for run in runs.values()} == {stock.kv_bytes_read}
    assert runs["sparq"].kv_bytes_read < 0.5 * stock.kv_bytes_dense
    assert runs["window"].kv_bytes_read < 0.5 * stock.kv_bytes_dense
    grid = stock.needle_grid()
    assert (grid.lengths, grid.depths) == ((160, 224), (0.0, 1.0))
    assert len(stock.samples["niah"]) == 8
    assert model.config._attn_implementation == "sdpa"
    assert not getattr(model.config, "attn_params", None)
    assert model.training


def test_the_model_is_put_back_after_an_error(model, tokenizer):
    configure(model, SparQConfig(rank=3))
    with pytest.raises(ValueError, match="lm-eval would cut"):
        evaluate(
            model,
            tokenizer,
            tasks="niah",
            metadata={"niah": {"lengths": [512]}},
            parameters=SparQConfig(rank=5),
        )
    assert model.config._attn_implementation == "sdpa"
    assert model.config.attn_params["sparq"]["rank"] == 3


def test_lengths_beyond_the_config_can_be_asked_for(model, tokenizer, text_file):
    metadata = {"niah": {"lengths": [300], "depths": [0], "samples": 1, "files": [text_file]}}
    run = evaluate(model, tokenizer, tasks=["niah"], metadata=metadata, max_length=300)
    assert run.samples["niah"][0]["doc"]["prompt_tokens"] == 292


def test_limit(model, tokenizer, tasks):
    run = evaluate(model, tokenizer, tasks=tasks, limit=3)
    assert [len(run.samples[task]) for task in ("niah", "long_bpb")] == [3, 3]


def test_it_is_quiet_and_leaves_logging_alone(model, tokenizer, tasks, capfd):
    level = logging.getLogger("lm_eval").level
    evaluate(model, tokenizer, tasks=tasks, limit=1)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert logging.getLogger("lm_eval").level == level


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn": "sparkle"}, "'sparkle' is not registered"),
        ({"attn": "sparq", "parameters": FlashConfig()}, "parameters of 'flash', not of 'sparq'"),
        ({"parameters": SparQConfig(rank=999)}, "rank must be an integer from 1 to 8"),
    ],
)
def test_wrong_names_and_parameters_are_refused(model, tokenizer, tasks, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, tasks=tasks, **options)
    assert model.config._attn_implementation == "sdpa"
