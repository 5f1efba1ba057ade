"""Recall by generation: passkeys, needles and chains of variables hidden in long texts."""

from lolcats.evaluation.recall.run import Cell, RecallSettings, check_haystack, check_recall, recall
from lolcats.evaluation.recall.tasks import TASKS, check_tasks, make_prompts

__all__ = [
    "TASKS",
    "Cell",
    "RecallSettings",
    "check_haystack",
    "check_recall",
    "check_tasks",
    "make_prompts",
    "recall",
]
