"""Language models whose answers are known, and the runs that score them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM

from hf_attn_plugin.lm_eval import load_tasks

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared_file(name: str) -> str:
    """A file of real text beside the checkout; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return str(path)


class Reader(LM):
    """Answers a generation request with what `speak(prompt, document)` says."""

    def __init__(self, speak: Callable[[str, dict[str, Any]], str], nats: float = 1.0) -> None:
        super().__init__()
        self.speak, self.nats = speak, nats
        self.prompts: list[str] = []

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [self.speak(request.args[0], request.doc) for request in requests]

    def loglikelihood(self, requests):
        return [(-self.nats, False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def read(tokenizer, tasks, metadata, speak, **options) -> tuple[dict[str, Any], Reader]:
    """lm-eval's results for a `Reader`, and the reader."""
    reader = Reader(speak, **options)
    loaded = load_tasks(tokenizer, tasks, metadata)
    results = evaluator.evaluate(
        reader, {"tasks": {task.task_name: task for task in loaded}}, bootstrap_iters=0
    )
    return results, reader
