"""`lolcats evaluate`, `generate`, `chat`, `inspect`, and the command itself, in this process."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lolcats.cli.load import load_model
from lolcats.cli.tables import show_layers
from lolcats.evaluation import compare
from lolcats.evaluation.facts import read_facts
from lolcats.modeling.cache_contents import cache_bytes
from lolcats.models.conversation import Conversation
from lolcats.printable import show_bytes, show_number
from lolcats.runs.artefact import RECIPE_FILE

from .conftest import Run


def test_version_and_help(cli: Run) -> None:
    """Both without a verb; no verb at all is help."""
    assert cli("--version").out.startswith("lolcats 0.")
    assert cli("--help").out == cli().out
    assert all(verb in cli().out for verb in ("linearize", "evaluate", "benchmark", "recall", "inspect", "export"))


def test_evaluate_gives_the_numbers_of_the_run(cli: Run, place: Path, finished: Path) -> None:
    """Teacher and student of a saved model score what they scored when it was made, on the same text."""
    answer = cli("evaluate", finished, "--sources", place / "text.txt", "--json", "x.json", "--by-position")
    assert answer.code == 0 and answer.err == ""
    assert "after LoRA (student)" in answer.out and "perplexity by place" in answer.out
    assert "trained on text of" in answer.out
    content = json.loads(Path("x.json").read_text())
    assert content["length"] == 32 and content["teacher"].endswith("teacher")
    assert list(content["scores"]) == [
        "teacher", "training_free", "equal_window", "trained_window",
        "student", "window_only", "linear_only", "no_attention",
    ]  # fmt: skip
    assert content["scores"]["teacher"]["kl"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [["evaluation.max_segments=3", "evaluation.last=5"], ["evaluation.sources=[text.txt]"]]
)
def test_evaluate_of_a_run_measures_what_the_run_measured(
    cli: Run, place: Path, arguments: list[str], extra: list[str]
) -> None:
    """By its recipe alone, without a cap of ours: to the last digit."""
    shutil.copy(place / "text.txt", "text.txt")
    assert cli(*arguments, "name=own", "data.validation_sequences=40", *extra, "evaluation.batch_size=3").code == 0
    answer = cli("evaluate", "runs/own", "--json", "x.json")
    assert answer.code == 0, answer.err
    results, found = (json.loads(Path(name).read_text()) for name in ("runs/own/results.json", "x.json"))
    count = results["evaluation"]["segments"]
    assert count == 3 if "max_segments" in extra[0] else count > 32
    free = found["scores"]["training_free"]["perplexity"]  # its gate, which cancels, has another start here
    assert free == pytest.approx(results["perplexity"]["training_free"], rel=1e-6)
    for name in ("teacher", "student"):
        score = found["scores"][name]
        assert (score["perplexity"], score["by_position"]) == (
            results["perplexity"][name],
            results["by_position"][name],
        )
        assert score["tokens"] == results["evaluation"]["tokens"]
    if "max_segments" in extra[0]:
        assert "of the text of" in answer.out and "that was held out from training" in answer.out
        short = cli("evaluate", "runs/own", "--max-segments", "1", "--json", "x.json")
        assert short.code == 0 and json.loads(Path("x.json").read_text())["scores"]["teacher"]["tokens"] == 5
        cli("evaluate", "runs/own", "--length", "4000").refused("held out", "4000", "--sources")


def test_evaluate_says_that_the_text_is_gone(cli: Run, place: Path, finished: Path) -> None:
    """Of a run whose text was moved away: its name, and the way round it."""
    model = shutil.copytree(finished / "model", Path("copied"))
    recipe = model / RECIPE_FILE
    recipe.write_text(recipe.read_text().replace("text.txt", "gone.txt"))
    cli("evaluate", model).refused("held out", "gone.txt", "--sources")


@pytest.mark.slow
def test_runs_say_that_there_is_little_text(cli: Run, arguments: list[str]) -> None:
    """In the output and in the results; the default data say so too."""
    answer = cli(*arguments, "name=little", "data.max_tokens=160", "transfer.tokens=640", "finetune.enabled=false")
    notes = json.loads(Path("runs/little/results.json").read_text())["data_notes"]
    assert answer.code == 0 and answer.err == ""
    assert len(notes) == 1 and notes[0] in answer.out
    assert "transfer reads them" in notes[0] and "transfer.tokens" in notes[0]


@pytest.mark.slow
def test_evaluate_reads_copies_of_data_sets(cli: Run, place: Path, finished: Path) -> None:
    """Named by the option, or by the recipe of the model; the numbers are those of the file."""
    source, words = "hf:some/text", ["--teacher", "none", "--control", "none", "--json", "x.json"]
    copy = f"some/text={place / 'text.txt'}"
    assert cli("evaluate", finished, "--sources", place / "text.txt", *words).code == 0
    wanted = json.loads(Path("x.json").read_text())["scores"]
    answer = cli("evaluate", finished, "--sources", source, "--local", copy, *words)
    assert answer.code == 0 and json.loads(Path("x.json").read_text())["scores"] == wanted
    model = shutil.copytree(finished / "model", Path("copied"))
    recipe = model / RECIPE_FILE
    recipe.write_text(recipe.read_text().replace("local: {}", f"local: {{some/text: {place / 'text.txt'}}}"))
    assert cli("evaluate", model, "--sources", source, *words).code == 0
    assert json.loads(Path("x.json").read_text())["scores"] == wanted
    cli("evaluate", finished, "--sources", source, "--local", "other/text=x.txt").refused("--local other/text: none of")
    cli("evaluate", finished, "--sources", source, "--local", "x.txt").refused("expected NAME=PATH")


def test_compare_agrees_with_measuring_inside_the_run(place: Path, finished: Path, tmp_path: Path) -> None:
    """The held-out text written to a file: the same perplexities as in results.json."""
    import numpy as np

    from lolcats import load_config
    from lolcats.data import build_datasets

    config = load_config(finished / "config.yaml")
    _, tokenizer = load_model(str(finished), "cpu", "auto")
    _, held = build_datasets(config.data, tokenizer, config.seed)
    held.ids.astype("<u2").tofile(tmp_path / "held.u16")
    assert np.prod(held.ids.shape) == 64
    scores = compare(
        finished / "model", teacher=place / "teacher", sources=[str(tmp_path / "held.u16")], length=32, device="cpu"
    )
    kept = json.loads((finished / "results.json").read_text())["perplexity"]
    for name in ("teacher", "training_free", "student", "window_only"):
        assert scores[name].perplexity == pytest.approx(kept[name], rel=1e-5)


def test_evaluate_without_a_teacher(cli: Run, place: Path, finished: Path) -> None:
    """Nothing to compare with: no ratio, no distance, no training-free control."""
    words = ["--sources", place / "text.txt", "--control", "none", "--teacher", "none", "--max-segments", "2"]
    answer = cli("evaluate", finished, *words, "--length", "16")
    assert answer.code == 0 and "teacher (softmax)" not in answer.out and "nothing trained" not in answer.out
    assert "30 tokens" in answer.out


@pytest.mark.slow
def test_evaluate_of_a_teacher(cli: Run, place: Path) -> None:
    """Any model has a perplexity."""
    answer = cli("evaluate", place / "teacher", "--length", "16", "--max-segments", "2")
    assert answer.code == 0 and "teacher (softmax)" in answer.out and "30 tokens of python-docs" in answer.out


def test_evaluate_refuses_the_teacher_of_another_model(cli: Run, finished: Path) -> None:
    """And one that is gone, with the way round it."""
    cli("evaluate", finished, "--teacher", "./gone", "--max-segments", "1").refused("./gone", "none")
    cli("evaluate", finished, "--teacher", finished / "model", "--max-segments", "1").refused("already linearized")


def test_evaluate_refuses_short_text(cli: Run, finished: Path, tmp_path: Path) -> None:
    """Less than one segment; and --last as long as a segment."""
    (tmp_path / "short.txt").write_text("the cat")
    cli("evaluate", finished, "--sources", "short.txt").refused("short.txt", "shorter length")
    cli("evaluate", finished, "--length", "8", "--last", "8").refused("last=8")


def test_generate_streams_what_it_would_print(cli: Run, finished: Path) -> None:
    """Streamed or not, from an argument or from standard input, greedy is greedy."""
    words = ["--max-new-tokens", "12"]
    streamed, whole = (
        cli("generate", finished, "the cat", *words),
        cli("generate", finished, "the cat", *words, "--no-stream"),
    )
    assert streamed.code == whole.code == 0
    assert streamed.out.strip() == whole.out.strip() != ""
    assert cli("generate", finished, "the cat", *words, "--no-graphs").out == streamed.out
    assert "12 tokens, " in whole.err and "tokens/s" in whole.err and "of state" in whole.err


def test_generate_reads_standard_input(cli: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PROMPT is -."""
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
    assert cli("generate", finished, "-", "--max-new-tokens", "4").out == (
        cli("generate", finished, "the cat", "--max-new-tokens", "4").out
    )


@pytest.mark.slow
def test_generate_samples_by_seed(cli: Run, finished: Path) -> None:
    """The same seed, the same text; another seed, another text."""
    texts = [
        cli("generate", finished, "the", "--temperature", "1.5", "--top-p", "0.9", "--seed", str(seed)).out
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generate_takes_any_model(cli: Run, place: Path) -> None:
    """A softmax teacher too."""
    assert cli("generate", place / "teacher", "the cat", "--max-new-tokens", "4", "--dtype", "bfloat16").code == 0


def test_chat_answers_until_exit(cli: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question after /reset has the same answer; blank lines are passed over; nothing follows /exit."""
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nthe moon\n/reset\nthe cat\n/exit\nthe end\n"))
    answer = cli("chat", finished, "--max-new-tokens", "5")
    assert answer.code == 0 and answer.err == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert answer.out.startswith(once := cli("chat", finished, "--max-new-tokens", "5").out.rstrip("\n"))
    assert answer.out.rstrip("\n").endswith(once)


def test_chat_leaves_at_an_interruption(cli: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is how many people leave."""

    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    answer = cli("chat", finished)
    assert answer.code == 0 and answer.err == ""


@pytest.mark.slow
def test_chat_keeps_the_state_and_changes_no_answer(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns on the kept state equal turns that read everything again."""
    model, tokenizer = load_model(str(finished), "cpu", "auto")
    kept, fresh = (Conversation(model, tokenizer, max_new_tokens=6, do_sample=False) for _ in range(2))
    for text in ("the cat", "the moon", "a river"):
        fresh.forget_state()
        assert kept.reply(text) == fresh.reply(text)
    assert kept.seen[: len(fresh.seen)] == fresh.seen


def test_chat_reuses_the_state(place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn reads only what is new, where the template repeats the first one token by token."""
    model, tokenizer = load_model(str(finished), "cpu", "auto")
    talk = Conversation(model, tokenizer, max_new_tokens=1, do_sample=False)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    talk.reply("the cat")
    first = len(talk.seen)
    talk.reply("the moon")
    assert lengths[0] == first and lengths[1] < len(talk.seen)


def test_chat_needs_a_template(cli: Run, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model has none."""
    model, tokenizer = load_model(str(finished), "cpu", "auto")
    tokenizer.chat_template = None
    monkeypatch.setattr("lolcats.cli.generate.load_model", lambda *_: (model, tokenizer))
    cli("chat", finished).refused("no chat template", "lolcats generate")


def test_inspect_of_a_linearized_model(cli: Run, finished: Path) -> None:
    """Layers, settings, memory and what was measured; the run's folder will do."""
    answer = cli("inspect", finished)
    assert answer.code == 0 and answer.err == ""
    for part in ("LinearizedLlamaForCausalLM", "0-1 (2 layers)", "auto", "hedgehog", "8 tokens, sliding", "4 sinks"):
        assert part in answer.out
    assert "after LoRA (student)" in answer.out and "128k" in answer.out
    assert "in 2 linearized layers, as much as" in answer.out and "KV token of the teacher" in answer.out
    assert cli("inspect", finished / "model").out == answer.out


def test_inspect_of_a_teacher(cli: Run, place: Path) -> None:
    """It can be linearized, and how."""
    answer = cli("inspect", place / "teacher")
    assert answer.code == 0 and "can be linearized" in answer.out and "lolcats linearize" in answer.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["linearization.window_kind=terraced", "linearization.sinks=0", "linearization.state_heads=kv"],
        ["linearization.decay=gate", "linearization.layers=[1]", "dtype=bfloat16"],
        ["linearization.feature_map=elu", "finetune.train_feature_maps=false", "transfer.enabled=false"],
    ],
)
def test_facts_are_those_of_the_running_model(cli: Run, arguments: list[str], settings: list[str]) -> None:
    """Bytes and parameters told without reading the weights equal those of the model at work, at any length."""
    assert cli(*arguments, "finetune.enabled=false", "name=a", *settings).code == 0
    facts = read_facts("runs/a/model")
    model, _ = load_model("runs/a/model", "cpu", "auto")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    for length in (1, 40):
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.ones(1, length, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert cache_bytes(cache) == facts.own_bytes(length)


def test_numbers_as_people_read_them() -> None:
    """Units, powers of ten and runs of layers."""
    assert [show_bytes(n) for n in (12, 2048, 3 * 2**20, 5 * 2**40)] == [
        "12 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5,120.0 GiB",
    ]
    assert [show_number(x) for x in (3.14159, 1234.5, 1e9)] == ["3.14", "1,234.50", "1.00e+09"]
    assert [show_layers(x) for x in ([], [3], [0, 1, 2, 5])] == ["none", "3", "0-2, 5"]
