"""`hf-attn eval` and `python -m hf_attn_plugin.lm_eval run`, end to end as processes."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_attn_plugin
from hf_attn_plugin import SparQConfig
from hf_attn_plugin.cli import eval as command
from hf_attn_plugin.cli.main import main

OPTIONS = {
    "niah": {"lengths": [160, 224], "depths": [0, 1], "samples": 2},
    "long_bpb": {"context": 120, "scored": 12, "samples": 5},
}


@pytest.fixture(scope="module")
def metadata(text_file):
    return json.dumps({task: {**values, "files": [text_file]} for task, values in OPTIONS.items()})


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(arguments, cwd):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(hf_attn_plugin.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    process = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def saved_results(folder):
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def test_one_process_and_two_give_the_same(folder, metadata, tmp_path):
    shared = ["--tasks", "niah,long_bpb", "--batch_size", "2", "--metadata", metadata]
    one = run(
        [
            *("hf_attn_plugin.cli", "eval", str(folder), "--attn", "sparq", "--rank", "4"),
            *("--top-k", "16", "--heatmap", str(tmp_path / "needles.png")),
            *(*shared, "--output_path", str(tmp_path / "one")),
        ],
        tmp_path,
    )
    results = saved_results(tmp_path / "one")
    reads = results["config"]["kv_reads"]
    bits = results["results"]["long_bpb"]["bits_per_byte,none"]
    table, _, summary = one.stdout.partition("niah: needles found")
    assert "|bits_per_byte|" in table
    assert f"{bits:.4f}" in table
    assert "depth  160  224" in summary
    # niah: 8 cases in batches of 2, 8 tokens each; long_bpb: 5 in batches of 2, 12 tokens each.
    assert reads["decode_steps"] == 4 * 8 + 3 * 12
    assert f"KV cache read in {reads['decode_steps']} decoding steps" in summary
    assert 0 < reads["kv_bytes_read"] < 0.5 * reads["kv_bytes_dense"]
    assert results["config"]["attn_params"]["sparq"]["top_k"] == 16
    assert (tmp_path / "needles.png").stat().st_size > 5_000

    model_args = {
        "pretrained": str(folder),
        "attn_implementation": "sparq",
        "attn_params": {"sparq": {"rank": 4, "top_k": 16}},
    }
    two = run(
        [
            *("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "hf_attn_plugin.lm_eval", "run", "--model_args", json.dumps(model_args)),
            *(*shared, "--output_path", str(tmp_path / "two"), "--log_samples"),
        ],
        tmp_path,
    )
    assert "Building contexts for niah on rank 1" in two.stderr
    both = saved_results(tmp_path / "two")
    assert both["results"]["long_bpb"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-5)
    # Padding requests, so that all processes run as many, are decoded and counted as well.
    assert both["config"]["kv_reads"]["kv_bytes_dense"] >= reads["kv_bytes_dense"]
    (samples,) = (tmp_path / "two").rglob("samples_long_bpb_*.jsonl")
    assert len(samples.read_text().splitlines()) == 5


def parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_known_args(arguments)


def test_options_are_the_fields_of_the_dataclasses():
    arguments, rest = parse(
        *("model", "--attn", "sparq", "--rank", "32", "--top-k", "128", "--local-window", "8"),
        *("--mean-value-reallocation", "--tasks", "niah", "long_bpb", "--limit", "4"),
    )
    assert command.method_parameters(arguments) == SparQConfig(32, 128, 8, True)
    assert rest == ["--tasks", "niah", "long_bpb", "--limit", "4"]


@pytest.mark.parametrize("tasks", ["niah", "niah_all", "niah*", "long_bpb,niah"])
def test_a_heatmap_goes_with_everything_that_runs_niah(tasks):
    command._check_heatmap(Path("grid.png"), ["--tasks", tasks])
    with pytest.raises(ValueError, match="add niah to --tasks"):
        command._check_heatmap(Path("grid.png"), ["--tasks", "niah_multikey"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--attn sparq --window 4", "--window: not a parameter of sparq .*--rank, --top-k"),
        ("--attn sdpa --rank 4", r"--rank: not a parameter of sdpa \(its parameters: none\)"),
        ("--rank 4", "--rank: not a parameter of the model as it is.*Choose the method"),
        ("--attn sparkle", "'sparkle' is not registered; registered are .*sparq"),
        ("--attn sliding_window --window 0", "window must be an integer >= 1"),
        ("--attn sparq --model vllm", "python -m hf_attn_plugin.lm_eval run"),
        ('--metadata {"niahh":{"lengths":[256]}}', "no task reads the metadata 'niahh'"),
        ('--metadata {"lengths":[256]}', "no task reads the metadata 'lengths'"),
    ],
)
def test_wrong_lines_are_refused_at_once(capsys, line, message):
    assert main(["eval", "nowhere", *line.split(), "--tasks", "niah"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-attn: error: ")
    assert re.search(message, error)
