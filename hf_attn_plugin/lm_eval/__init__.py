"""lm-eval with attention by name: tasks, a model, and ``python -m hf_attn_plugin.lm_eval run …``.

Importing this imports neither lm-eval nor transformers' models.
"""

from hf_attn_plugin.lm_eval.needle import KEYS, NeedleCase, NeedleTemplate, make_needle_case
from hf_attn_plugin.lm_eval.reads import KVReads
from hf_attn_plugin.lm_eval.run import EvalRun, NeedleGrid, evaluate, load_tasks
from hf_attn_plugin.lm_eval.tasks import LongBpbOptions, NiahOptions, tasks_dir

__all__ = [
    "KEYS",
    "EvalRun",
    "KVReads",
    "LongBpbOptions",
    "NeedleCase",
    "NeedleGrid",
    "NeedleTemplate",
    "NiahOptions",
    "evaluate",
    "load_tasks",
    "make_needle_case",
    "tasks_dir",
]
