"""The section `linearization`: a class of settings for each mixer, chosen by `mixer`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from lolcats.config import HybridConfig, LinearizationConfig, RunConfig, load_config
from lolcats.config.changes import differences, known_settings, with_defaults, with_split
from lolcats.config.mixers import keyed_by_mixer
from lolcats.errors import ConfigError


class OtherConfig(LinearizationConfig):
    """Settings of a second mixer."""

    mixer: Literal["other"] = "other"  # type: ignore[assignment]
    depth: int = 3


class Run(BaseModel):
    """A section that is one or the other."""

    linearization: Annotated[Any, keyed_by_mixer({"hybrid": HybridConfig, "other": OtherConfig})]


def test_settings_without_a_mixer_are_the_papers() -> None:
    assert type(LinearizationConfig(window=5)) is HybridConfig
    assert load_config(None, ["linearization.window=7"]).linearization == HybridConfig(window=7)
    assert RunConfig(linearization=HybridConfig(sinks=2)).linearization.sinks == 2
    assert load_config(None, ["linearization.mixer=hybrid"]) == RunConfig()


def test_the_mixer_chooses_the_class() -> None:
    other = Run.model_validate({"linearization": {"mixer": "other", "depth": 4, "layers": [1]}}).linearization
    assert other == OtherConfig(depth=4, layers=[1])
    assert type(Run.model_validate({"linearization": {"window": 4}}).linearization) is HybridConfig
    assert Run(linearization=other).linearization is other
    assert Run(linearization=other).model_dump()["linearization"]["depth"] == 4
    assert Run.model_validate_json(Run(linearization=other).model_dump_json()).linearization == other
    with pytest.raises(ValidationError, match=r"linearization\.other\.window\n.*Extra inputs"):
        Run.model_validate({"linearization": {"mixer": "other", "window": 4}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixer=hybird", r"linearization.mixer: unknown mixer; expected .* one of: blend, hybrid \(got 'hybird'\)"),
        ("mixer=3", r"linearization.mixer: unknown mixer; expected .* one of: blend, hybrid \(got 3\)"),
        ("windw=4", r"linearization.windw: unknown key; did you mean linearization.window\?"),
        ("window=-1", r"linearization.window: Input should be greater than or equal to 0 \(got -1\)"),
    ],
)
def test_errors_name_the_key_and_not_the_class(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"linearization.{override}"])
    with pytest.raises(ValidationError, match=r"'hybrid'"):
        LinearizationConfig(mixer="hybird")


def test_the_layer_gets_its_own_settings_only() -> None:
    values = HybridConfig(start="matched", layers=[1], window=3).values()
    assert values["window"] == 3 and values["impl"] == "auto"
    assert not {"mixer", "layers", "start"} & values.keys()
    assert HybridConfig(start="matched").starts_from_text
    assert not HybridConfig(start="matched").without_text().starts_from_text


def test_settings_of_0_1_are_those_of_today() -> None:
    """They named no mixer."""
    today = {"linearization": HybridConfig(window=5).model_dump(mode="json")}
    old = {"linearization": {k: v for k, v in today["linearization"].items() if k != "mixer"}}
    assert differences(with_defaults(old), today) == {}
    known, unknown = known_settings({"linearization": {"window": 5, "later": 1}}, RunConfig)
    assert known == {"linearization": {"window": 5}} and unknown == ["linearization.later"]


def test_another_layer_begins_from_its_own_defaults() -> None:
    """Of the recipe's layer only what every layer has is left; what is given beside the mixer counts."""
    config = load_config("hybrid", ["linearization.mixer=blend", "linearization.kept.pairs=7"])
    assert config.linearization == LinearizationConfig(mixer="blend", kept={"pairs": 7})
    back = load_config("recommended", ["linearization.mixer=hybrid", "linearization.layers=[1]"])
    assert back.linearization == LinearizationConfig(layers=[1])
    same = load_config("recommended", ["linearization.mixer=blend"])
    assert same.linearization.model_dump()["kept"]["pairs"] == 340


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("kept.pair=3", r"linearization.kept.pair: unknown key; did you mean linearization.kept.pairs\?"),
        ("kept.score=best", r"linearization.kept.score: Input should be 'learned', .* \(got 'best'\)"),
        ("kept.score=self_recall", "kept.score self_recall is the error of the far half, and far is none"),
        ("window_kind=terraced", "linearization.window_kind: unknown key"),
        ("bits=5", r"linearization.bits: Input should be 16, 8 or 4 \(got 5\)"),
        ("window=0", "linearization.window: Input should be greater than or equal to 1"),
        ("budget=head", "linearization.budget: Input should be 'uniform', 'layers' or 'heads'"),
        ("split=[]", "linearization.split: expected an entry for each linearized layer, got none"),
        ("split=[[0, 4]]", r"linearization.split: entry 0: expected a window of 1 to .* got \[0, 4\]"),
        ("split=[[4, 1], [[4, 1], 3]]", r"linearization.split: entry 1: expected \[window, pairs\] for all key heads"),
        ("split=[[4, true]]", r"linearization.split: entry 0: expected \[window, pairs\] for all key heads"),
    ],
)
def test_settings_that_blend_cannot_have(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("recommended", [f"linearization.{word}"])


def test_a_sum_that_only_grows_is_not_kept_in_bfloat16() -> None:
    words = [f"linearization.{word}" for word in ("far=linear", "decay=none", "state_dtype=bfloat16")]
    with pytest.raises(ConfigError, match="without decay grows with the text, which bfloat16 cannot hold; set a decay"):
        load_config("recommended", words)
    assert (
        load_config("recommended", [words[0], words[2]])
        .linearization.facts()["far"]
        .endswith("one bfloat16 state per key head")
    )


def test_a_learned_score_needs_its_stage() -> None:
    with pytest.raises(ConfigError, match=r"kept.score learned is trained in the first stage, and transfer.enabled is"):
        load_config("recommended", ["transfer.enabled=false"])
    for words in (["linearization.kept.score=recency"], ["linearization.kept.pairs=0"]):
        load_config("recommended", ["transfer.enabled=false", *words])


def test_keys_are_measured_for_4_bits_alone() -> None:
    for bits in (16, 8, 4):
        words = [f"linearization.bits={bits}", "linearization.budget=uniform"]
        assert load_config("recommended", words).linearization.starts_from_text == (bits == 4)


def test_layers_have_their_entries_of_a_split() -> None:
    split = [[4, 1], [[2, 0], [8, 3]]]
    config = load_config(
        "recommended", [f"linearization.split={split}", "linearization.budget=heads", "linearization.start=plain"]
    ).linearization
    assert [config.values(place)["split"] for place in (0, 1)] == split and "budget" not in config.values()
    assert not config.starts_from_text and config.facts()["kept"].startswith("0 to 3 pairs per key head")
    assert "window of 2 to 8 tokens" in config.facts()["near"]
    searching = load_config("recommended", ["linearization.budget=layers"]).linearization
    assert searching.searches and searching.starts_from_text and not searching.without_text().starts_from_text
    assert searching.values()["split"] is None
    with pytest.raises(ConfigError, match=r"linearization.split: unknown key"):
        load_config(None, ["linearization.split=[[4, 1]]"])


def test_runs_of_before_had_no_budget() -> None:
    today = {"linearization": LinearizationConfig(mixer="blend").model_dump(mode="json")}
    old = {"linearization": {k: v for k, v in today["linearization"].items() if k not in ("budget", "split")}}
    assert differences(with_defaults(old), today) == {}


def test_a_split_that_was_found_is_no_change() -> None:
    asked = {"linearization": {"mixer": "blend", "budget": "heads", "split": None}}
    found = with_split(asked, [[4, 1]])
    assert found["linearization"]["split"] == [[4, 1]] and asked["linearization"]["split"] is None
    assert with_split(found, [[5, 1]]) is found and with_split(asked, None) is asked
    uniform = {"linearization": {"mixer": "blend", "budget": "uniform", "split": None}}
    assert with_split(uniform, [[4, 1]]) is uniform
