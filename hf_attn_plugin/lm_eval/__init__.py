"""lm-eval with attention by name: tasks, a model, and ``python -m hf_attn_plugin.lm_eval run …``.

Importing this imports neither lm-eval nor transformers' models.
"""

from hf_attn_plugin.lm_eval.bits import LongBpbOptions, WikitextBpcOptions
from hf_attn_plugin.lm_eval.needle import KEYS, NeedleCase, NeedleTemplate, make_needle_case
from hf_attn_plugin.lm_eval.niah import NiahOptions
from hf_attn_plugin.lm_eval.question_answering import SquadOptions, TriviaqaOptions
from hf_attn_plugin.lm_eval.reads import KVReads
from hf_attn_plugin.lm_eval.repetition import RepetitionOptions
from hf_attn_plugin.lm_eval.run import EvalRun, NeedleGrid, evaluate, load_tasks
from hf_attn_plugin.lm_eval.summarization import CnnDailymailOptions
from hf_attn_plugin.lm_eval.tasks import our_tasks, tasks_dir

__all__ = [
    "KEYS",
    "CnnDailymailOptions",
    "EvalRun",
    "KVReads",
    "LongBpbOptions",
    "NeedleCase",
    "NeedleGrid",
    "NeedleTemplate",
    "NiahOptions",
    "RepetitionOptions",
    "SquadOptions",
    "TriviaqaOptions",
    "WikitextBpcOptions",
    "evaluate",
    "load_tasks",
    "make_needle_case",
    "our_tasks",
    "tasks_dir",
]
