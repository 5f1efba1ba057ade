"""The one table of variants, and that nobody keeps another."""

from __future__ import annotations

import re
from pathlib import Path

import lolcats
from lolcats.config import EvaluationConfig
from lolcats.variants import CONTROLS, NAMES, VARIANTS, label, ordered, short_label

ROOT = Path(lolcats.__file__).parent


def test_names_are_in_the_order_of_the_story() -> None:
    assert ordered({"mine": 1, "student": 2, "teacher": 3, "no_attention": 4}) == [
        "teacher", "student", "no_attention", "mine"
    ]  # fmt: skip
    assert len(set(NAMES)) == len(VARIANTS)


def test_controls_are_those_of_the_settings_and_of_earlier_versions() -> None:
    """In the order that config.yaml of version 0.1 has."""
    of_student = ("near_only", "window_only", "linear_only", "no_attention")
    assert (*of_student, "training_free", "equal_window", "trained_window") == CONTROLS
    assert EvaluationConfig().controls == list(CONTROLS)


def test_labels() -> None:
    assert label("window_only", "this model") == "this model, window and sinks alone"
    assert label("student") == "student" and label("mine") == "mine"
    assert short_label("transfer") == "after transfer" and short_label("training_free") == "training free"


def test_no_other_module_lists_the_controls() -> None:
    for file in ROOT.rglob("*.py"):
        named = [name for name in CONTROLS if re.search(rf'"{name}"', file.read_text(encoding="utf-8"))]
        known = {"variants.py", "plots.py", "theme.py"} | {"attention.py"}  # how it is drawn; modes of the layer itself
        assert len(named) < 2 or file.name in known or "mixers" in file.parts, file
