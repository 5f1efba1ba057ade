"""Many texts at once must be what each of them is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lolcats
from decode_cases import with_stand_in
from lolcats.errors import LolcatsError
from lolcats.evaluation.store import AnswerStore
from lolcats.serving.offline import generate_batch
from lolcats.serving.requests import Defaults, Request, read_requests
from lolcats.serving.writing import Answer, group

Students = Callable[..., Any]
LENGTHS = [1, 40, 3, 17, 2, 90, 5, 9, 1, 30, 12]
KEPT = {"mixer": "blend", "window": 6, "sinks": 2, "kept": {"pairs": 4}, "bits": 8}
LAYERS = [
    pytest.param({"mixer": "hybrid", "window": 6, "sinks": 2, "fold": 4}, id="hybrid"),
    pytest.param({"mixer": "hybrid", "window": 4, "window_kind": "terraced", "decay": "gate"}, id="terraced-gate"),
    pytest.param(KEPT | {"far": "linear"}, id="blend"),
    pytest.param(KEPT | {"split": [[[4, 2], [8, 6]]] * 3}, id="split"),
    pytest.param({"mixer": "hybrid", "window": 6, "layers": [0, 2]}, id="softmax in the middle"),
]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Token n is the word "wn", so that a text tells its tokens."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.chat_template = "{% for m in messages %}{{ m['content'] }} w3 {% endfor %}"
    return made


def text(ids: Tensor) -> str:
    """[1, N] tokens as words."""
    return " ".join(f"w{token}" for token in ids[0].tolist())


@pytest.fixture
def prompts(tokens: Callable[..., Tensor]) -> list[str]:
    """Of very different lengths, from one token to many windows."""
    return [text(tokens(1, length, seed)) for seed, length in enumerate(LENGTHS)]


def alone(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int, **options: Any) -> str:
    """What `generate` writes for one prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return text(model.generate(ids, do_sample=False, max_new_tokens=count, **options)[:, ids.shape[1] :])


def shapes(model: PreTrainedModel, found: list[tuple[int, ...]]) -> Any:
    """Note the shape of each call's tokens."""
    return model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", LAYERS)
def test_every_row_is_what_generate_writes_for_it_alone(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str], settings: dict[str, Any]
) -> None:
    student, counts = make_student(**settings), [3 + 5 * (row % 3) for row in range(len(LENGTHS))]
    rows = [{"prompt": prompt, "max_new_tokens": count} for prompt, count in zip(prompts, counts, strict=True)]
    answers = generate_batch(student, words, rows, batch_size=3, chunk=32)
    assert [a.text for a in answers] == [alone(student, words, *one) for one in zip(prompts, counts, strict=True)]
    assert [(a.index, a.prompt_tokens, a.new_tokens) for a in answers] == list(
        zip(range(len(rows)), LENGTHS, counts, strict=True)
    )
    assert {a.finish_reason for a in answers} == {"length"}


@pytest.mark.parametrize("settings", [LAYERS[0], LAYERS[3]])
def test_rows_change_their_texts_in_the_buffers_of_a_recording(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str], settings: dict[str, Any]
) -> None:
    student = make_student(**settings)
    want = generate_batch(student, words, prompts, batch_size=3, max_new_tokens=6)
    graphs = with_stand_in(student)
    assert generate_batch(student, words, prompts, batch_size=3, max_new_tokens=6) == want
    assert graphs.replays >= 18


def test_steps_have_one_shape_and_prompts_come_in_pieces(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    student, found = make_student(window=6), []
    hook = shapes(student, found)
    answers = lolcats.generate_batch(student, words, prompts, batch_size=3, chunk=20, max_new_tokens=4)
    hook.remove()
    steps, read = [s for s in found if s == (3, 1)], [s for s in found if s != (3, 1)]
    assert len(steps) == 12  # four rounds of three steps: eleven texts of which the first token is the prompt's
    assert max(rows * count for rows, count in read) == 20 and (1, 90 % 20) in read
    assert any(rows > 1 for rows, _ in read), "short prompts are read together"
    whole = generate_batch(student, words, prompts, batch_size=3, max_new_tokens=4)
    assert whole == answers


@pytest.mark.slow
def test_draws_belong_to_the_row(make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str]) -> None:
    """Not to its place in the pool or to its neighbours; a row's own seed holds wherever the row is."""
    student, options = make_student(window=6), {"max_new_tokens": 6, "temperature": 1.5, "top_p": 0.9}
    first = generate_batch(student, words, prompts, batch_size=3, **options)
    assert generate_batch(student, words, prompts, batch_size=5, **options) == first
    mixed = [{"prompt": p, "temperature": t} for p, t in zip(prompts, [1.5, 0, 1.5] * 4, strict=False)]
    second = generate_batch(student, words, mixed, batch_size=2, **options)
    assert [a.text for a in second[::3]] == [a.text for a in first[::3]]
    assert second[1].text == alone(student, words, prompts[1], 6) != first[1].text
    assert generate_batch(student, words, prompts, batch_size=3, seed=1, **options) != first
    seeded = {"prompt": prompts[3], "seed": 7}
    texts = [a.text for a in generate_batch(student, words, [prompts[0], seeded, seeded], **options)]
    assert texts[1] == texts[2] == generate_batch(student, words, [seeded], **options)[0].text


def test_a_text_ends_at_a_token_that_ends_texts(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    """Which is counted and not shown; it may be the first of a text."""
    student = make_student(window=6)
    free = generate_batch(student, words, prompts[:4], max_new_tokens=8)
    written = [str(answer.text).split() for answer in free]
    student.generation_config.eos_token_id = [int(written[0][0][1:]), int(written[1][4][1:])]
    ends = {written[0][0], written[1][4]}
    for answer, tokens in zip(
        generate_batch(student, words, prompts[:4], max_new_tokens=8, batch_size=2), written, strict=True
    ):
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        assert answer.text == " ".join(tokens[:end])
        assert answer.finish_reason == ("length" if end is None else "stop")
        assert answer.new_tokens == (8 if end is None else end + 1)


def test_a_text_ends_before_a_text_of_stop(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    """The earliest of several, also where it takes several tokens."""
    student = make_student(window=6)
    (free,) = generate_batch(student, words, prompts[1:2], max_new_tokens=12)
    tokens = str(free.text).split()
    stops = [" ".join(tokens[6:8]), "nowhere"]
    row = {"prompt": prompts[1], "stop": stops, "max_new_tokens": 12}
    (answer,) = generate_batch(student, words, [row])
    assert answer.text == str(free.text)[: str(free.text).index(stops[0])]
    assert answer.finish_reason == "stop" and answer.new_tokens <= 8


def test_a_bad_row_does_not_end_the_others(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    student = make_student(window=6)
    rows: list[Any] = [prompts[0], {"prompt": "", "id": "b", "metadata": {"x": 1}}, prompts[2]]
    good, bad, other = generate_batch(student, words, rows, max_new_tokens=3)
    assert [good.text, other.text] == [alone(student, words, rows[row], 3) for row in (0, 2)]
    assert bad == Answer(1, "b", None, 0, 0, "error", bad.error, {"x": 1}) and "no token" in str(bad.error)
    assert generate_batch(student, words, [""])[0].finish_reason == "error"
    assert generate_batch(student, words, []) == []


def test_predictions_that_are_no_numbers_are_an_error_of_the_row(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    student = make_student(window=6)
    with torch.no_grad():
        student.get_input_embeddings().weight[5] = torch.nan
    rows = ["w5 w6", "w6 w7", {"prompt": "w5", "temperature": 1.0}]
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.nan_to_num().detach().clone())
    bad, good, worse = generate_batch(student, words, rows, max_new_tokens=3)
    assert good.error is None and good.text == alone(student, words, "w6 w7", 3)
    for answer in (bad, worse):
        assert (answer.finish_reason, answer.text) == ("error", None) and "NaN" in str(answer.error)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 5])
def test_a_run_that_was_interrupted_goes_on(
    make_student: Students, words: PreTrainedTokenizerFast, prompts: list[str], tmp_path: Path, after: int
) -> None:
    """With the rows that it has, and to the same answers; another model or setting finds nothing."""
    student, options = make_student(window=6), {"batch_size": 3, "max_new_tokens": 4, "temperature": 1.0}
    expected = generate_batch(student, words, prompts, **options)

    def interrupt(done: int, count: int, tokens: int) -> None:
        assert count == len(prompts)
        if done > after:
            raise KeyboardInterrupt

    told: list[tuple[int, int]] = []

    def report(done: int, count: int, tokens: int) -> None:
        told.append((done, tokens))

    file = tmp_path / "x.progress"
    with pytest.raises(KeyboardInterrupt), AnswerStore(file) as store:
        generate_batch(student, words, prompts, store=store, report=interrupt, **options)
    with pytest.raises(RuntimeError), AnswerStore(file) as store:
        generate_batch(student, words, prompts, store=store, report=report, **(options | {"seed": 1}))
        assert told[0] == (0, 0)
        told.clear()
        assert generate_batch(student, words, prompts, store=store, report=report, **options) == expected
        raise RuntimeError("keep the file")
    kept = told[0][0]
    assert kept > after and told[0] == (kept, 0) and told[-1] == (11, 4 * (11 - kept))
    told.clear()
    with torch.no_grad():
        student.lm_head.weight.add_(0.1)
    with AnswerStore(file) as store:
        generate_batch(student, words, prompts, store=store, report=report, **options)
    assert told[0] == (0, 0) and not file.exists()


def test_too_little_memory_says_what_to_do(make_student: Students, words: PreTrainedTokenizerFast) -> None:
    def report(done: int, count: int, tokens: int) -> None:
        if tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(LolcatsError, match="out of memory with 16 texts at once; take a smaller batch size"):
        generate_batch(make_student(window=6), words, ["w5"], report=report)


def test_texts_whose_length_would_turn_the_angles_of_others(
    make_teacher: Students, make_student: Students, words: PreTrainedTokenizerFast
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    student = make_student(make_teacher(max_position_embeddings=16, rope_parameters=rope), window=6)
    long, short = " ".join(["w7"] * 14), "w8 w9"
    answers = generate_batch(student, words, [long, short], max_new_tokens=3)
    assert "beyond 16 tokens" in str(answers[0].error) and answers[1].text == alone(student, words, short, 3)
    assert generate_batch(student, words, [long], max_new_tokens=3, batch_size=1)[0].text == (
        alone(student, words, long, 3)
    )


def read(student: Any, words: PreTrainedTokenizerFast, row: Any) -> Request:
    """One row, with the defaults."""
    return read_requests(student, words, [row], Defaults(), 16)[0]


def test_rows_in_the_forms_that_people_have(make_student: Students, words: PreTrainedTokenizerFast) -> None:
    student, messages = make_student(window=6), [{"role": "user", "content": "w7 w8"}]
    for row in (
        messages,
        {"messages": messages},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "w7 w8"}]}]},
        {
            "custom_id": "x",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": messages},
        },
    ):
        request = read(student, words, row)
        assert request.error is None and request.ids is not None
        assert request.ids.tolist() == [[7, 8, 3]]
    body = {
        "prompt": "w7",
        "max_tokens": 5,
        "temperature": 1,
        "top_p": 0.5,
        "seed": -3,
        "stop": "a",
        "n": 1,
        "top_k": -1,
    }
    request = read(student, words, {"custom_id": "x", "body": body})
    found = (request.id, request.max_new_tokens, request.temperature, request.top_p, request.seed, request.stop)
    assert found == ("x", 5, 1.0, 0.5, -3, ("a",)) and request.error is None
    nothing = read(student, words, {"prompt": "w7", "seed": None, "stop": None, "max_tokens": None, "logprobs": None})
    assert nothing == read(student, words, "w7")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, 'either "prompt", a text, or "messages"'),
        ({"prompt": "w5", "messages": []}, 'either "prompt", a text, or "messages"'),
        ({"prompt": 5}, '"prompt" must be a text; got 5'),
        ({"prompt": "\ud800"}, "not UTF-8"),
        ({"messages": []}, '"messages" must be a list'),
        ({"messages": "w5"}, '"messages" must be a list'),
        ({"messages": [{"role": "user"}]}, '"content" must be text'),
        ({"prompt": "w5", "temprature": 1}, '"temprature" is not known here; did you mean temperature'),
        ({"prompt": "w5", "answer": 1}, '"answer" is not known here; expected prompt, .*"metadata"'),
        ({"prompt": "w5", "top_k": 5}, '"top_k" cannot be 5 here, only -1'),
        ({"prompt": "w5", "max_tokens": 5, "max_new_tokens": 5}, '"max_new_tokens" is given twice'),
        ({"prompt": "w5", "max_new_tokens": 0}, "whole number from 1 on; got 0"),
        ({"prompt": "w5", "max_new_tokens": True}, "whole number from 1 on; got True"),
        ({"prompt": "w5", "temperature": "hot"}, "\"temperature\" must be a number; got 'hot'"),
        ({"prompt": "w5", "temperature": -1}, '"temperature" must be 0, or 0.01 to 100; got -1'),
        ({"prompt": "w5", "temperature": float("nan")}, '"temperature" must be a number'),
        ({"prompt": "w5", "top_p": 0}, '"top_p" must be above 0'),
        ({"prompt": "w5", "seed": 1.5}, '"seed" must be a whole number'),
        ({"prompt": "w5", "stop": ["a", ""]}, '"stop" must be'),
        ({"prompt": "w5", "stop": 3}, '"stop" must be'),
    ],
)
def test_rows_that_cannot_be_done(
    make_student: Students, words: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    request = read(make_student(window=6), words, row)
    with pytest.raises(LolcatsError, match=message):
        raise LolcatsError(request.error or "")


def test_messages_need_a_template(make_student: Students, words: PreTrainedTokenizerFast) -> None:
    student, messages = make_student(window=6), [{"role": "user", "content": "w7"}]
    broken, none = (PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer) for _ in range(2))
    broken.chat_template = "{{ raise_exception('no') }}"
    assert "has no chat template" in str(read(student, none, messages).error)
    assert "chat template of this model failed" in str(read(student, broken, messages).error)


def test_tokens_that_the_model_does_not_know(make_teacher: Students, make_student: Students, words: Any) -> None:
    student = make_student(make_teacher(vocab_size=50), window=6)
    assert "token 60" in str(read(student, words, "w60").error)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1, 1, 1, 1], [3, 2]),
        ([8, 9, 9, 40, 2], [2, 1, 1, 1]),  # 27 are more than 20; 80 too; and 20 are read in pieces alone
        ([1, 9, 1, 2], [2, 2]),  # 27 are more than twice 11
        ([], []),
    ],
)
def test_prompts_are_read_in_groups(lengths: list[int], expected: list[int]) -> None:
    requests = [Request(row, ids=torch.ones(1, n, dtype=torch.long)) for row, n in enumerate(lengths)]
    found = list(group(requests, 3, 20))
    assert [len(g) for g in found] == expected
    assert [request for g in found for request in g] == requests
