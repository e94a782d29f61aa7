"""All tasks: found wherever they are installed, said once, their prompts built once."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hf_attn_plugin
from hf_attn_plugin.lm_eval import load_tasks, niah, our_tasks, repetition, tasks, tasks_dir
from hf_attn_plugin.lm_eval.harness import run_harness

ROOM = {
    "niah": niah.ANSWER_ROOM,
    "niah_multikey": niah.ANSWER_ROOM,
    "niah_multivalue": niah.ANSWERS_ROOM,
    "niah_multiquery": niah.ANSWERS_ROOM,
    "repetition": repetition.CONTINUATION,
}
OPTIONS = {"lengths": [200], "depths": [0.5], "samples": 2}


class _Loader(yaml.SafeLoader):
    """lm-eval's own tag is read as the name that it is followed by."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_files():
    return {path.stem: path for path in tasks_dir().glob("*/*.yaml")}


def read_yaml(name):
    return yaml.load(task_files()[name].read_text(), Loader=_Loader)


def test_the_names_are_those_of_the_files():
    assert set(our_tasks()) == {
        *("niah", "niah_multikey", "niah_multivalue", "niah_multiquery", "niah_all"),
        *("long_bpb", "wikitext_bpc", "repetition"),
        *("sparq_squad", "sparq_triviaqa", "cnn_dailymail"),
    }
    for name in our_tasks():
        content = read_yaml(name)
        assert content.get("task") == name or content.get("group") == name
    assert set(read_yaml("niah_all")["task"]) == set(niah.TASKS)


@pytest.mark.parametrize("name", sorted({*our_tasks()} - {"niah_all"}))
def test_every_task_names_functions_that_exist_and_makes_its_own_documents(name):
    content = read_yaml(name)
    for field in ("custom_dataset", "process_results"):
        module, _, function = content[field].rpartition(".")
        path = task_files()[name].parent / f"{module}.py"
        spec = importlib.util.spec_from_file_location(module, path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        assert callable(getattr(loaded, function))
    assert content["num_fewshot"] == 0
    if name in ROOM:
        assert content["generation_kwargs"]["max_gen_toks"] == ROOM[name]


def test_the_tasks_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tasks_dir().is_absolute()
    assert "niah" in our_tasks()


def test_an_installed_wheel_holds_the_same_tasks(tmp_path):
    """A copy laid out as the wheel is finds all of them; without them the error says so."""
    package = Path(hf_attn_plugin.__file__).parent
    pyproject = package.parent / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("not a checkout")
    wheel = tomllib.loads(pyproject.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    shutil.copytree(package, site / "hf_attn_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        shutil.copytree(package.parent / source, site / target)
    line = "from hf_attn_plugin.lm_eval.tasks import our_tasks, tasks_dir; "
    line += "print(tasks_dir(), *our_tasks(), sep='\\n')"

    def run():
        return subprocess.run(
            [sys.executable, "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    folder, *names = run().stdout.split()
    assert folder == str(site / "hf_attn_plugin" / "eval_tasks")
    assert tuple(names) == our_tasks()
    shutil.rmtree(folder)
    assert "the evaluation tasks are in neither" in run().stderr


@pytest.fixture
def counted(monkeypatch):
    """How often documents of `niah` were made."""
    made = []

    def count(*arguments, **options):
        made.append(1)
        return real(*arguments, **options)

    real = niah.make_needle_case
    monkeypatch.setattr(niah, "make_needle_case", count)
    tasks._built.clear()
    return made


def prompts(tokenizer, options, **metadata):
    (task,) = load_tasks(tokenizer, "niah", {"niah": options, **metadata})
    return list(task.test_docs())


def test_prompts_are_built_once_and_twice_the_same(
    tokenizer, any_tokenizer, text, tmp_path, counted
):
    path = tmp_path / "text.txt"
    path.write_text(text[:30_000])
    options = {**OPTIONS, "files": [str(path)]}
    first = prompts(tokenizer, options)
    assert len(counted) == 2
    assert prompts(tokenizer, dict(reversed(options.items()))) == first
    assert len(counted) == 2
    tasks._built.clear()
    assert prompts(tokenizer, options) == first
    assert len(counted) == 4
    # Whatever prompts depend on makes new ones.
    assert prompts(tokenizer, {**options, "seed": 1}) != first
    assert len(counted) == 6
    assert prompts(tokenizer, options, add_bos_token=False) != first
    assert len(counted) == 8
    path.write_text(text[30_000:70_000])
    assert prompts(tokenizer, options) != first
    assert len(counted) == 10
    prompts(any_tokenizer, options)
    assert len(counted) == 12


def test_kept_prompts_are_checked_against_another_maximum(tokenizer, text_file):
    options = {**OPTIONS, "files": [text_file]}
    assert prompts(tokenizer, options)
    with pytest.raises(ValueError, match="niah asks for 200 tokens, but the model takes 128"):
        prompts(tokenizer, options, max_length=128)


@pytest.mark.parametrize("named", ["niah", "hellaswag,niah_*", "repetition,long_bpb"])
def test_lm_evals_cache_of_prompts_is_refused(named):
    line = ["run", "--model", "hf-attn", "--model_args", "pretrained=nowhere", "--tasks", named]
    with pytest.raises(ValueError, match="--cache_requests keeps prompts by the name of the task"):
        run_harness([*line, "--cache_requests", "true"])


def test_a_tokenizer_that_was_changed_gets_new_prompts(any_tokenizer, text_file, counted):
    tokenizer = copy.deepcopy(any_tokenizer)
    options = {**OPTIONS, "files": [text_file]}
    prompts(tokenizer, options)
    tokenizer.add_tokens(["number of"])
    for document in prompts(tokenizer, options):
        ids = tokenizer(document["context"] + document["question"])["input_ids"]
        assert len(ids) == document["prompt_tokens"]
    assert len(counted) == 4


def test_a_tokenizer_that_cannot_be_a_key_is_served_all_the_same(tokenizer, text_file, counted):
    class Comparable(type(tokenizer)):
        __hash__ = None

    other = copy.deepcopy(tokenizer)
    other.__class__ = Comparable
    options = {**OPTIONS, "files": [text_file]}
    assert prompts(other, options) == prompts(tokenizer, options)
    assert len(counted) == 4
