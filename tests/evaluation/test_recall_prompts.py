"""Prompts of the recall tasks: what is hidden, where, in how many tokens; and how answers are scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lolcats.errors import DataError, LolcatsError
from lolcats.evaluation.recall import TASKS, check_tasks, make_prompts
from lolcats.evaluation.recall.haystack import NOISE, encode, essay, hide
from lolcats.evaluation.recall.needles import Prompt
from lolcats.evaluation.recall.tasks import depth_range, first_number, share_found

LENGTH = 1600  # the tiny tokenizer takes about one token for two characters
PROSE = tuple(f"The miller counted {number} stones in the old wall." for number in range(1, 40))
LONGEST = 60  # tokens of the longest sentence, generously
NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for ([a-z]+-[a-z]+) is: (\S+)\.")


def prompts(tokenizer: PreTrainedTokenizerFast, name: str, length: int = LENGTH, **changes: Any) -> list[Prompt]:
    settings: dict[str, Any] = {"samples": 6, "depths": 3, "seed": 0, "essay": PROSE}
    return make_prompts(name, tokenizer, length, **(settings | changes))


def text(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
    return str(tokenizer.decode(prompt.ids))


def solve(name: str, prompt: str) -> list[str]:
    """The answers, read out of the text by rules of the task."""
    if name == "passkey":
        return re.findall(r"The pass key is (\d+)\.", prompt)
    if name == "vt":
        body = prompt.split("\n\n")[-1]
        value = re.findall(r"hold the value (\d+)", body)[0]
        holders = {value: None}
        for variable, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", body):
            if source in holders:
                holders[variable] = None
        return [name for name in holders if name != value]
    hay, question = prompt.split("\nWhat ")
    known = dict(NEEDLE.findall(hay))
    return [value for key, value in known.items() if key in question]


@pytest.mark.parametrize("name", TASKS)
def test_the_answers_are_what_the_text_says(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    for prompt in prompts(tiny_tokenizer, name):
        assert sorted(solve(name, text(tiny_tokenizer, prompt))) == sorted(prompt.answers)
        assert len(prompt.answers) == len(prompt.depths) == {"vt": 5, "niah_multiquery": 4}.get(name, 1)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_depend_on_seed_and_number_alone(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    first = prompts(tiny_tokenizer, name)
    assert first == prompts(tiny_tokenizer, name)
    others = prompts(tiny_tokenizer, name, seed=1)
    assert not {p.answers for p in first} & {p.answers for p in others}
    assert len({p.answers for p in first}) == len(first)


@pytest.mark.parametrize("length", [1100, 1101, LENGTH])
@pytest.mark.parametrize("name", [name for name in TASKS if name != "passkey"])
def test_prompt_and_room_for_the_answer_are_the_length(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, length: int
) -> None:
    made = prompts(tiny_tokenizer, name, length)
    assert {len(prompt.ids) for prompt in made} == {length - TASKS[name].new_tokens}
    for prompt in made:  # cut in the hay, not elsewhere
        opening, hay, question = text(tiny_tokenizer, prompt).split("\n\n")[-1].split("\n")
        assert opening.endswith(".") and question.endswith((" is", " are", "are:"))
        whole = NEEDLE.sub("", re.sub(r"VAR \w+ = (VAR )?\w+\.", "", hay))
        *_, last = re.split(r"(?<=\.) +", whole.strip())
        assert any(sentence.startswith(last) for sentence in (*PROSE, *NOISE))


def test_passkey_and_answer_fill_the_length(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in prompts(tiny_tokenizer, "passkey"):
        whole = encode(tiny_tokenizer, f"{text(tiny_tokenizer, prompt)} {prompt.answers[0]}")
        assert LENGTH - LONGEST < len(whole) <= LENGTH


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].by_depth])
def test_the_needle_lies_in_its_range_of_depth(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    for index, prompt in enumerate(prompts(tiny_tokenizer, name, 2400, samples=8, depths=4)):
        whole = text(tiny_tokenizer, prompt)
        needle = f" {prompt.answers[0]}."
        filler = [whole[: whole.index(needle)], whole[whole.index(needle) :]]
        sentences = PROSE if TASKS[name].prose else NOISE
        before, after = (sum(part.count(sentence) for sentence in sentences) for part in filler)
        assert prompt.depths[0] == before / (before + after)
        low = depth_range(index, 8, 4) / 4
        assert low - 0.5 / (before + after) <= prompt.depths[0] <= low + 0.25 + 0.5 / (before + after)


def test_distractors_have_keys_of_their_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in prompts(tiny_tokenizer, "niah_multikey"):
        found = NEEDLE.findall(text(tiny_tokenizer, prompt))
        assert len({key for key, _ in found}) == len({value for _, value in found}) == 4


def test_links_of_a_chain_come_in_order(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in prompts(tiny_tokenizer, "vt"):
        body = text(tiny_tokenizer, prompt).split("\n\n")[-1]
        assert re.findall(r"VAR ([A-Z]+) =", body) == list(prompt.answers)
        assert list(prompt.depths) == sorted(prompt.depths)


def test_needles_stand_after_their_share_of_the_sentences() -> None:
    assert hide(["a.", "b."], 5, ["X", "Y", "Z"], [0, 0.4, 1]) == "X a. b. Y a. b. a. Z"
    assert hide(["a."], 2, ["one", "two", "three"], [0.5, 0.5, 0.5]) == "a. one two three a."


def test_prose_of_the_python_docs_and_of_a_file(tmp_path: Any) -> None:
    sentences = essay("python-docs")
    assert len(sentences) > 500 and all(s[0].isupper() and s[-1] in ".!?" for s in sentences)
    (tmp_path / "short.txt").write_text("No prose\n\n| a | table |\n")
    with pytest.raises(DataError, match=r"short.txt.* no sentences"):
        essay(str(tmp_path / "short.txt"))


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(LolcatsError, match=rf"{name} cannot be asked in 60 tokens: .*give more"):
        prompts(tiny_tokenizer, name, 60)


def test_names_of_tasks() -> None:
    assert check_tasks(["vt", "passkey", "vt"]) == ["vt", "passkey"]
    assert check_tasks(["passkey", "all"]) == list(TASKS)
    with pytest.raises(LolcatsError, match=r"'niah_single1'; did you mean niah_single_1\?"):
        check_tasks(["passkey", "niah_single1"])


@pytest.mark.parametrize(
    ("output", "answers", "share"),
    [
        (" 123 and 456", ["123", "456"], 1),
        (" 456", ["123", "456"], 0.5),
        ("12 3", ["123"], 0),
        ("id ABC", ["abc"], 1),
        ("", ["1"], 0),
    ],
)
def test_share_of_answers_found(output: str, answers: Sequence[str], share: float) -> None:
    assert share_found(output, answers) == share


@pytest.mark.parametrize(
    ("output", "score"),
    [(" 12345. It", 1), (" 12345", 1), ("the key 12345", 1), (" 123456", 0), (" 1234", 0), (" 1 12345", 0), ("no", 0)],
)
def test_first_number_is_the_passkey(output: str, score: float) -> None:
    assert first_number(output, ["12345"]) == score


@pytest.mark.parametrize("output", [" 12345.", " 123456", " 12345", " 12345\nThe 9", " x", "", " 7 12345 "])
@pytest.mark.parametrize("name", ["passkey", "niah_single_1"])
def test_what_is_settled_stays_so_with_more_output(name: str, output: str) -> None:
    task, answers = TASKS[name], ["12345"]
    if task.settled(output, answers):
        scores = {task.score(output + more, answers) for more in ("", "9", " 9", " 12345")}
        assert scores == {task.score(output, answers)}
    assert task.settled(" 12345 ", answers) and not task.settled(" 1234", answers)


def test_prompts_are_spread_evenly_over_depths() -> None:
    assert [depth_range(index, 7, 3) for index in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [depth_range(index, 2, 10) for index in range(2)] == [0, 5]
