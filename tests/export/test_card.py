"""The model card: true to recipe and results, whatever is missing."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lolcats import RunConfig, load_config
from lolcats.config import SourceConfig
from lolcats.export import FORMATS, model_card
from lolcats.export.source import without_paths
from lolcats.runs.results import Results

RESULTS = Results.model_validate({
    "date": "2026-01-02",
    "device": "cpu, 2 threads",
    "dtype": "float32",
    "evaluation": {"segments": 3, "length": 256, "last": 128, "tokens": 384},
    "perplexity": {"student": 11.0, "teacher": 10.0, "training_free": 15.5, "linear_only": 1e7, "transfer": 12.345},
    "kl": {"teacher": 0.0, "student": 0.0512, "training_free": 0.4},
    "tokens": {"transfer": 12_288, "finetune": 4096},
    "memory": {"bytes": 4096, "kv_tokens": 32.0, "layers": []},
})  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return load_config("hybrid", ["model=someone/teacher-1b", "data.sources=[mine/a.txt, 'hf:x/y']", *overrides])


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("format", FORMATS)
def test_front_matter(format: Any) -> None:
    data = front_matter(model_card(config(), RESULTS, format))
    assert data["base_model"] == "someone/teacher-1b"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"lolcats", "linear-attention"} <= set(data["tags"])
    assert ("peft" in data["tags"]) == (format == "adapter")
    assert ("custom_code" in data["tags"]) == (format == "remote-code")
    assert "license" not in data  # the base model's applies, which is not known here


def test_a_local_base_is_told_by_its_last_name() -> None:
    """The hub refuses cards whose base_model is no name of a model there."""
    card = model_card(
        config("model=/home/someone/secret/teacher", "data.sources=[/home/someone/a.txt]"), Results(), "merged"
    )
    assert "base_model" not in front_matter(card)
    assert "# teacher, linearized" in card and "`a.txt`" in card and "/home" not in card
    assert (
        front_matter(model_card(RunConfig(), Results(), "merged"))["base_model"]
        == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_sources_with_settings_are_told_by_name_and_copies_not_at_all() -> None:
    sources = "data.sources=[{name: /home/someone/a.txt, weight: 2}, alpaca-cleaned]"
    given = config(sources, "data.local.alpaca-cleaned=/home/someone/alpaca")
    card = model_card(given, Results(), "merged")
    assert "`a.txt`, `alpaca-cleaned`" in card and "/home" not in card
    shared = without_paths(given, "someone/teacher-1b").data
    assert shared.source_names == ["a.txt", "alpaca-cleaned"]
    assert isinstance(shared.sources[0], SourceConfig) and shared.sources[0].weight == 2
    assert shared.local == {}


def test_the_measured_table() -> None:
    card = model_card(config(), RESULTS, "merged")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "perplexity", "ratio to teacher", "KL to teacher"]
    assert [row[1:] for row in rows[2:]] == [
        ["10.00", "1.000", "-"],
        ["15.50", "1.550", "0.4000"],
        ["12.35", "1.235", "-"],
        ["11.00", "1.100", "0.0512"],
        ["1.00e+07", "1.00e+06", "-"],
    ]
    assert rows[5][0] == "**this model**" and "nothing trained" in rows[3][0]
    assert "Its memory of a text: 4.0 KiB in 0 linearized layers, as much as 32.0 KV tokens of the teacher." in card
    assert "3 segments of 256 tokens, the last 128 tokens of each counted" in card


def test_the_recipe_in_words() -> None:
    card = model_card(config("linearization.layers=[0, 2]", "linearization.decay=gate"), RESULTS, "merged")
    for part in (
        "layers [0, 2]", "Window of 64 tokens (sliding), 4 sinks", "hedgehog", "a learned decay",
        "`mine/a.txt`, `hf:x/y`", "12,288 tokens", "4,096 tokens", "LoRA of rank 32", "1 x divergence",
        "Seed 0; cpu, 2 threads, float32, 2026-01-02",
        "license of the base model `someone/teacher-1b` applies", "exact recall",
    ):  # fmt: skip
        assert part in card, part


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["finetune.enabled=false"], "Stage 2, fine-tuning: left out"),
        (["transfer.enabled=false"], "Stage 1, attention transfer: left out"),
        (["finetune.method=full"], "all weights"),
        (["finetune.error_factor=1000"], "divergence from the teacher + 1000 x squared error of attention outputs."),
        (["finetune.targets=[q_proj, v_proj]"], "linear layers: q_proj, v_proj"),
        (["linearization.layers=0.5"], "50% of the global attention layers"),
        (["linearization.feature_size=16"], "of size 16"),
    ],
    ids=str,
)
def test_other_recipes(overrides: list[str], part: str) -> None:
    assert part in model_card(config(*overrides), RESULTS, "merged")


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"perplexity": {}},
        {"perplexity": {"student": 5.0}},
        {"perplexity": {"student": 5.0, "mine": float("inf"), "teacher": None}, "kl": None, "evaluation": None},
        {"perplexity": {"teacher": 0.0, "student": float("nan")}, "tokens": {"transfer": None}},
    ],
    ids=str,
)
@pytest.mark.parametrize("format", FORMATS)
def test_partial_results_reject_nothing(results: dict[str, Any], format: Any) -> None:
    card = model_card(config(), Results.model_validate(results), format)
    assert "nan" not in card and "inf |" not in card and "None" not in card
    assert ("Nothing was measured." in card) == (not results.get("perplexity"))
    assert "10,000,000 tokens" in card  # what the recipe planned, where what was done is not known


@pytest.mark.parametrize(
    ("format", "call"),
    [
        ("merged", 'from_pretrained("me/mine")'),
        ("adapter", 'lolcats.load_adapter("me/mine")'),
        ("remote-code", 'from_pretrained("me/mine", trust_remote_code=True)'),
    ],
)
def test_how_to_load(format: Any, call: str) -> None:
    card = model_card(config(), RESULTS, format, name="me/mine")
    code = card.split("```python\n")[1].split("```")[0]
    assert call in code
    assert ("import lolcats" in code) == (format != "remote-code")
    compile(code, "card", "exec")
