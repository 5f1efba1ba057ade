"""Models, recipes and results from elsewhere: shown, never obeyed; refused in one line."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lolcats.cli.terminal import SafeConsole
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE
from tiny import chat_tokenizer

from .conftest import Run

ESCAPES = "\x1b]52;c;eA==\x07\x9b31m[/red]\u202e"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "model", tmp_path / "copied"))


@pytest.fixture
def teacher(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "teacher", tmp_path / "t"))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def harmless(text: str) -> bool:
    return text.isprintable() or set(c for c in text if not c.isprintable()) <= {"\n", "\t"}


def test_results_and_recipes_are_shown_not_obeyed(cli: Run, copied: Path) -> None:
    """Escapes, markup and marks that turn text round, in every place that inspect shows."""

    def change(results: dict[str, Any]) -> None:
        results["date"] = results["device"] = results["dtype"] = ESCAPES
        results["perplexity"][ESCAPES] = 3.0

    edit(copied / RESULTS_FILE, change)
    recipe = copied / RECIPE_FILE
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("model: ")]
    recipe.write_text("\n".join([*lines, 'model: "models/[v2]/[/red]\\e]0;x\\a"']))
    answer = cli("inspect", copied)
    assert answer.code == 0 and answer.err == ""
    assert harmless(answer.out)
    assert "models/[v2]/[/red]\\x1b" in answer.out and "\\x1b]52;c" in answer.out


@pytest.mark.parametrize(
    "content", ["[", "[]", "[" * 9999, '{"perplexity": 3}', '{"perplexity": {"a": "x"}}', '{"evaluation": 3}', "\xff"]
)
def test_broken_results(cli: Run, copied: Path, content: str) -> None:
    (copied / RESULTS_FILE).write_text(content, encoding="latin-1")
    cli("inspect", copied).refused(RESULTS_FILE, "delete it")


def test_messages_are_printable_and_bounded(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"data: {{template: {'x' * 100_000}}}")
    answer = cli("linearize", "m.yaml")
    answer.refused("data.template")
    assert len(answer.err) < 2100
    answer = cli("generate", f"./{ESCAPES}", "hello")
    answer.refused("no such folder")
    assert harmless(answer.err)


def test_chat_templates_that_fail(cli: Run, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for template in ("{{ raise_exception('\x1b[31mno') }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{% if %}"):
        (teacher / "chat_template.jinja").write_text(template)
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        answer = cli("chat", teacher)
        answer.refused("the chat template of this model failed")
        assert harmless(answer.err)


@pytest.mark.parametrize("words", [["generate", "-"], ["chat"]])
def test_input_that_is_not_utf8(cli: Run, teacher: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the \xff\n"), encoding="utf-8"))
    cli(words[0], teacher, *words[1:]).refused("not utf-8", "convert it")


def test_a_prompt_that_is_not_utf8(cli: Run, teacher: Path) -> None:
    cli("generate", teacher, "the \udcff").refused("not UTF-8")


@pytest.mark.slow
def test_what_a_model_writes_is_not_obeyed(cli: Run, teacher: Path) -> None:
    """All bytes are tokens of this tokenizer; hot sampling writes many of them."""
    words = ["--temperature", "100", "--max-new-tokens", "200", "--device", "cpu"]
    for stream in ("--stream", "--no-stream"):
        answer = cli("generate", teacher, "the cat", *words, stream)
        assert answer.code == 0 and len(answer.out) > 50
        assert not set(answer.out) & {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))}


def test_tokens_that_the_model_does_not_know(cli: Run, teacher: Path, arguments: list[str], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(teacher)
    (tmp_path / "new.txt").write_text("<new> the cat sat on the mat " * 300)
    source = f"data.sources=['{tmp_path / 'new.txt'}']"
    cli("generate", teacher, "<new> cat").refused("the prompt holds token", "resize_token_embeddings")
    cli("linearize", teacher, *arguments[2:], source).refused("holds token 300")
    cli("evaluate", teacher, "--sources", "new.txt", "--length", "16").refused("holds token 300")
    assert cli("generate", teacher, "the cat", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--temperature", "1e-40"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "nan"], "--top-p"),
        (["--seed", "4294967296"], "--seed"),
        (["--max-new-tokens", "1000000000000"], "--max-new-tokens"),
    ],
)
def test_numbers_that_cannot_be(cli: Run, words: list[str], part: str) -> None:
    cli("generate", "m", "p", *words).refused(part)


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("seed=1e23", "seed"),
        ("seed=4294967296", "seed"),
        ("finetune.rank=100000", "finetune.rank"),
        ("finetune.alpha=1e39", "finetune.alpha"),
        ("linearization.window=10000000", "linearization.window"),
        ("linearization.sinks=10000000", "linearization.sinks"),
        ("transfer.batch_size=1000000000", "transfer.batch_size"),
        ("transfer.tokens=1e18", "transfer.tokens"),
        ("data.sequence_length=1000000000000", "data.sequence_length"),
        ("linearization.impl=triton", "linearization.impl is triton"),
    ],
)
def test_settings_that_cannot_be(
    cli: Run, arguments: list[str], setting: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cli(*arguments, "name=a", setting).refused(part)


def test_an_exported_adapter_says_what_it_is(cli: Run, finished: Path) -> None:
    assert cli("export", finished, "adapter", "--format", "adapter").code == 0
    for words in (["generate", "adapter", "x"], ["inspect", "adapter"], ["linearize", "adapter", "device=cpu"]):
        cli(*words).refused("it is an adapter for", "lolcats.load_adapter")


def test_home_in_every_path(cli: Run, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert cli("inspect", "~/teacher").code == 0
    assert cli("generate", "~/runs/tiny", "the cat", "--max-new-tokens", "2").code == 0
    words = ["--length", "16", "--max-segments", "1", "--sources", str(place / "text.txt")]
    assert cli("evaluate", "~/teacher", *words, "--json", "~/x.json").code == 0
    assert (place / "x.json").is_file()


def test_a_console_shows_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    SafeConsole(width=60).print(f"[bold]a[/bold] :smile: {ESCAPES}")
    assert capsys.readouterr().out.strip().startswith("[bold]a[/bold] :smile: \\x1b]52")
