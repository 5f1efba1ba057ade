"""The store of answers: what is left of its file when an evaluation ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from lolcats.evaluation.store import AnswerStore


def test_answers_stay_until_all_are_there(tmp_path: Path) -> None:
    file = tmp_path / "x" / "answers"
    with pytest.raises(KeyError), AnswerStore(file) as store:
        store.put("key", [0.1, None])
        raise KeyError
    with AnswerStore(file) as store:
        assert store.get("key") == [0.1, None] and store.get("other") is None
    assert not file.exists()


def test_an_evaluation_that_failed_at_its_start_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyError), AnswerStore(tmp_path / "answers"):
        raise KeyError
    assert not list(tmp_path.iterdir())
