"""Every block of docs/habits.md, run as it stands: a linearized model does what a transformers model does."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats.modeling import linearized_layers

pytestmark = [
    # torch's compiler imports modules of its own that still use this.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    # torch's compiler makes an instance of an autograd function to trace it.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    # The old name is what people write, and the only one that older releases have.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "habits.md"
REQUIRES = {16: ["peft"], 17: ["accelerate"], 18: ["lm_eval"]}
FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.M | re.S)


def read_page() -> tuple[str, dict[int, str], dict[int, str]]:
    """The setup block, the title of each habit and the code of each habit (its python blocks, in order)."""
    parts = re.split(r"^## (\d+)\. (.*)$", PAGE.read_text(), flags=re.M)
    setup = next(code for language, kind, code in FENCE.findall(parts[0]) if (language, kind) == ("python", "setup"))
    titles = {int(n): title for n, title in zip(parts[1::3], parts[2::3], strict=True)}
    code: dict[int, str] = defaultdict(str)
    for number, text in zip(parts[1::3], parts[3::3], strict=True):
        for language, kind, block in FENCE.findall(text):
            if language == "python" and not kind:
                code[int(number)] += block
    return setup, titles, dict(code)


SETUP, TITLES, CODE = read_page()


def run(code: str, namespace: dict[str, Any]) -> None:
    """Run code of the page; error messages show its lines."""
    skipped = PAGE.read_text().partition(code.partition("\n\n")[0])[0].count("\n")
    exec(compile("\n" * skipped + code, str(PAGE), "exec"), namespace)


@pytest.fixture
def prepared(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page says are there, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"folder": folder, "__name__": "habits"}
    run(SETUP, namespace)
    return namespace


def test_the_page_is_complete() -> None:
    assert list(TITLES) == list(range(1, len(TITLES) + 1))
    assert len(TITLES) >= 20
    assert set(TITLES) - set(CODE) == {14}  # the server has a test of its own
    assert not [number for number, code in CODE.items() if "assert" not in code.lower()]


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces and differentiates, but no C++ is compiled, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("number", [pytest.param(n, id=f"{n}-{TITLES[n]}") for n in CODE])
def test_habit(number: int, prepared: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for module in REQUIRES.get(number, []):
        pytest.importorskip(module)
    assert len(linearized_layers(prepared["model"])) == 3
    assert prepared["inputs"]["input_ids"].shape[1] > 8  # more than window and sinks
    run(CODE[number], prepared)
    capture = capsys.readouterr()
    if check := CHECKS.get(number):
        check(prepared, capture.out)


def all_linearized(names: dict[str, Any], out: str) -> None:
    assert type(names["again"]) is type(names["model"])
    assert len(linearized_layers(names["again"])) == 3


def printed_as_made(names: dict[str, Any], out: str) -> None:
    text = names["tokenizer"].decode(names["inputs"]["input_ids"][0]) + "".join(names["pieces"])
    assert text in out


def trained_feature_maps(names: dict[str, Any], out: str) -> None:
    fresh = names["AutoModelForCausalLM"].from_pretrained(names["folder"])
    for before, after in zip(linearized_layers(fresh), linearized_layers(names["model"]), strict=True):
        for name, parameter in after.mixer.named_parameters():
            assert not torch.equal(parameter, before.mixer.get_parameter(name)), name


def float32_additions(names: dict[str, Any], out: str) -> None:
    loaded = names["AutoModelForCausalLM"].from_pretrained(names["folder"], dtype=torch.float16)
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in names["low"].parameters()]
    for layer in linearized_layers(names["low"]):
        assert {p.dtype for p in layer.inner.parameters()} == {torch.float16}
    moved = loaded.to("cpu", torch.float64)
    assert {p.dtype for p in moved.parameters()} == {torch.float64}


def lm_eval_scores(names: dict[str, Any], out: str) -> None:
    for (context, continuation), (score, _) in zip(names["requests"], names["scores"], strict=True):
        ids = names["tokenizer"](context + continuation, return_tensors="pt")["input_ids"]
        start = len(names["tokenizer"](context)["input_ids"])
        with torch.no_grad():
            logp = names["model"](ids).logits.log_softmax(-1)[0, start - 1 : -1]
        assert score == pytest.approx(float(logp.gather(-1, ids[0, start:, None]).sum()), abs=1e-3)


def refused_in_words(names: dict[str, Any], out: str) -> None:
    assert len(out.splitlines()) >= 2
    for word in ("forget", "crop"):
        assert word in out


def batching_refused_in_words(names: dict[str, Any], out: str) -> None:
    assert "left padding" in out
    assert not hasattr(names["model"], "init_continuous_batching")  # what `transformers serve` asks


CHECKS: dict[int, Callable[[dict[str, Any], str], None]] = {
    1: all_linearized,
    7: printed_as_made,
    10: trained_feature_maps,
    11: float32_additions,
    18: lm_eval_scores,
    20: refused_in_words,
    31: batching_refused_in_words,
}
"""What the page leaves unsaid, by number: (names after the block, what it printed)."""
