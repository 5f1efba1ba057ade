"""Benchmarks: tasks of lm-evaluation-harness on a model, its controls and its teacher.

lm-eval itself is imported when something runs.
"""

from lolcats.evaluation.harness.run import HarnessSettings, Show, library_versions, run_benchmarks
from lolcats.evaluation.harness.scores import Row, Score, Scores

__all__ = ["HarnessSettings", "Row", "Score", "Scores", "Show", "library_versions", "run_benchmarks"]
