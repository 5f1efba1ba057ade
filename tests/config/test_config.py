import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from lolcats.config import (
    DataConfig,
    HybridConfig,
    LinearizationConfig,
    RunConfig,
    TransferConfig,
    dump_config,
    load_config,
    parse_overrides,
)
from lolcats.config.mixers import BlendConfig
from lolcats.errors import ConfigError, LolcatsError
from lolcats.mixers import Sizes, build_mixer

EXAMPLE = Path(__file__).parents[2] / "configs" / "smollm2_135m.yaml"


@pytest.fixture
def load_text(tmp_path: Path):
    def load(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.mark.parametrize("source", [None, "recommended", "small", "recall", "hybrid", "paper", EXAMPLE])
def test_dump_then_load_is_equal(source, load_text):
    config = load_config(source)
    assert load_text(dump_config(config)) == config


@pytest.mark.parametrize("name", ["1e4", "123", "true", "2e-5"])
def test_names_that_look_like_numbers_survive_a_dump(name, load_text):
    config = RunConfig(name=name)
    assert load_text(dump_config(config)).name == name


def test_paper_recipe_is_the_papers():
    config = load_config("paper")
    layer = config.linearization
    assert isinstance(layer, HybridConfig)
    assert (layer.window_kind, layer.window, layer.sinks, layer.feature_size, layer.start) == (
        "terraced", 64, 0, 32, "paper"
    )  # fmt: skip
    assert (config.transfer.lr, config.finetune.lr) == (1e-2, 1e-4)
    for stage in (config.transfer, config.finetune):
        assert (stage.tokens, stage.batch_size, stage.schedule, stage.warmup_steps) == (20_000_000, 8, "plateau", 0)
    assert (config.finetune.rank, config.finetune.alpha, config.finetune.kl_factor) == (8, 16.0, 0.0)
    assert (config.data.template, config.data.sequence_length) == ("alpaca", 1024)


@pytest.mark.parametrize(
    ("name", "window", "pairs"), [("small", 64, 168), ("recommended", 128, 340), ("recall", 256, 684)]
)
def test_recipes_by_memory(name, window, pairs):
    """Alike but for their sizes, which are what they say in tokens of a teacher with heads of 64 numbers."""
    config = load_config(name)
    layer = config.linearization
    assert isinstance(layer, BlendConfig)
    assert layer == load_config("recommended").linearization.model_copy(
        update={"window": window, "kept": layer.kept.model_copy(update={"pairs": pairs})}
    )
    assert (layer.mixer, layer.sinks, layer.far, layer.bits, layer.budget) == ("blend", 4, "none", 8, "heads")
    assert (layer.kept.score, layer.kept.fade, layer.start) == ("learned", 2000, "matched")
    mixer = build_mixer("blend", Sizes(9, 3, 64, 64, 576), **layer.values())
    kv_tokens = mixer.state_spec(torch.bfloat16).nbytes / (2 * 3 * 64 * 2)
    assert 0.98 < kv_tokens / {"small": 128, "recommended": 256, "recall": 512}[name] <= 1.001
    first, second = config.transfer, config.finetune
    assert (first.tokens, first.batch_size, first.lr, first.recall.share) == (3_000_000, 4, 1e-2, 0.2)
    assert (second.tokens, second.batch_size, second.lr, second.rank, second.alpha) == (4_000_000, 4, 6e-4, 32, 64.0)
    assert (second.targets, second.train_feature_maps) == ("all", True)
    assert (second.kl_factor, second.cross_entropy_factor) == (1.0, 0.0)
    assert (second.recall.share, second.recall.gap, config.data.sequence_length) == (0.15, 2048, 2048)


def test_hybrid_recipe_follows_the_teacher():
    config = load_config("hybrid")
    assert (config.finetune.kl_factor, config.finetune.cross_entropy_factor, config.finetune.lr) == (1.0, 0.0, 6e-4)
    assert (config.linearization.sinks, config.linearization.start, config.data.sequence_length) == (4, "matched", 2048)
    assert config.finetune.train_feature_maps


def all_keys(settings: dict[str, Any], prefix: str = "") -> set[str]:
    keys = {prefix + key for key in settings}
    return keys.union(*(all_keys(v, f"{prefix}{k}.") for k, v in settings.items() if isinstance(v, dict)))


def test_the_example_file_shows_every_key():
    """Of `blend`, and in a comment those of `hybrid`."""
    text = EXAMPLE.read_text()
    run = RunConfig(linearization=BlendConfig())
    assert all_keys(yaml.safe_load(text)) == all_keys(run.model_dump())
    lines = text[text.index("# linearization:") : text.index("# The text to learn from")].splitlines()
    section = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    other = RunConfig.model_validate(section)
    assert other.linearization == load_config("hybrid").linearization


@pytest.mark.parametrize(
    ("text", "got"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("6.5e-4", 6.5e-4), ("2", 2.0), ("0.5", 0.5)],
)
def test_numbers_may_be_written_as_people_write_them(text, got, load_text):
    assert load_text(f"finetune: {{lr: {text}}}").finetune.lr == got


@pytest.mark.parametrize(("text", "tokens"), [("1e6", 1_000_000), ("10_000", 10_000), ("7", 7)])
def test_token_counts(text, tokens, load_text):
    assert load_text(f"transfer: {{tokens: {text}}}").transfer.tokens == tokens


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("finetune: {rnk: 3}", "finetune.rnk", "finetune.rank"),
        ("windw: 3", "windw", "linearization.window"),
        ("linearisation: {window: 3}", "linearisation", "linearization"),
        ("transfer: {tokns: 3}", "transfer.tokns", "transfer.tokens"),
        ("finetune: {tokns: 3}", "finetune.tokns", "finetune.tokens"),
        ("data: {seq_length: 3}", "data.seq_length", "data.sequence_length"),
    ],
)
def test_unknown_key_names_the_nearest(text, key, meant, load_text):
    with pytest.raises(ConfigError, match=f"(?m)^  {key}: unknown key; did you mean {meant}\\?$"):
        load_text(text)


def test_all_problems_are_shown_together_one_a_line(load_text):
    with pytest.raises(ConfigError) as caught:
        load_text("finetune: {lr: -1, rnk: 8, compile: maybe}\ndata: {template: alpacca}\n", "seed=-1")
    keys = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(keys) == ["data.template", "finetune.compile", "finetune.lr", "finetune.rnk", "seed"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "duplicate key seed"),
        ("data:\n  packing: stream\n  packing: stream", "duplicate key packing"),
        ("- 1", "key: value"),
        ("data: [", "cannot read"),
        ("data: 5", "data: "),
        ("1: 2", "strings"),
        ("linearization: {window: true}", "linearization.window: .*integer.*True"),
        ("linearization: {window: '64'}", "linearization.window: .*integer.*'64'"),
        ("transfer: {tokens: 1.5}", "transfer.tokens"),
        ("transfer: {lr: .inf}", "transfer.lr"),
        ("finetune: {batch_size: 6, micro_batch_size: 4}", "finetune: micro_batch_size 4 must divide batch_size 6"),
        (
            "finetune: {kl_factor: 0, cross_entropy_factor: 0}",
            "finetune: cross_entropy_factor, kl_factor and error_factor",
        ),
        ("transfer: {mse_factor: 0}", "transfer: mse_factor and xent_factor"),
        ("evaluation: {controls: [window]}", "evaluation.controls.0"),
        ("name: ../elsewhere", "name: "),
        ("device: gpu", "device: "),
    ],
)
def test_refused(text, said, load_text):
    with pytest.raises(ConfigError, match=said):
        load_text(text)


def test_errors_are_value_errors():
    assert issubclass(ConfigError, LolcatsError)
    assert issubclass(LolcatsError, ValueError)


def test_missing_file_lists_the_recipes():
    with pytest.raises(
        ConfigError, match=r"no configuration file nowhere\.yaml.*hybrid, paper, recall, recommended, small"
    ):
        load_config("nowhere.yaml")


def test_empty_file_and_empty_section_are_defaults(load_text):
    assert load_text("") == load_text("data:\nfinetune:\n  # lr: 1\n") == RunConfig()


def test_overrides_win_and_leave_the_rest():
    config = load_config("recommended", ["finetune.lr=1e-3", "finetune.lr=2e-3", "linearization.layers=[0, -1]"])
    assert config.finetune.lr == 2e-3
    assert config.linearization.layers == [0, -1]
    assert config.finetune.targets == "all"


def test_override_of_a_shared_yaml_anchor_changes_one_section(load_text):
    config = load_text("transfer: &stage {batch_size: 2}\nfinetune: *stage\n", "finetune.batch_size=3")
    assert (config.transfer.batch_size, config.finetune.batch_size) == (2, 3)


@pytest.mark.parametrize(
    ("override", "settings"),
    [
        ("seed=3", {"seed": 3}),
        ("a.b.c=x=y", {"a": {"b": {"c": "x=y"}}}),
        ("data.sources=[a, b]", {"data": {"sources": ["a", "b"]}}),
        ("x=null", {"x": None}),
        ("x=", {"x": None}),
        ("device=cuda:0", {"device": "cuda:0"}),
    ],
)
def test_parse_overrides(override, settings):
    assert parse_overrides([override]) == settings


def test_broken_overrides_are_all_named():
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["seed", "seed=1", "data.=3", "x=["])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "override 'seed'", "override 'data.=3'", "override 'x=['"
    ]  # fmt: skip


@pytest.mark.parametrize("layers", ["all", [0], [-1, 3], 0.5, 1.0])
def test_layers_round_trip_through_json(layers):
    config = LinearizationConfig(layers=layers)
    again = LinearizationConfig(**json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert type(again.layers) is type(layers)


def test_layers_take_a_range():
    assert LinearizationConfig.model_validate({"layers": range(2, 5)}).layers == [2, 3, 4]


@pytest.mark.parametrize("layers", [[], [1, 1], [0.5], [True], 1, 0, True, 0.0, 1.5, -0.5, "none", None])
def test_layers_refused(layers):
    with pytest.raises(ValidationError, match="layers"):
        LinearizationConfig(layers=layers)


def test_terraced_needs_a_window():
    with pytest.raises(ValidationError, match="window >= 1"):
        LinearizationConfig(window=0, window_kind="terraced")
    assert HybridConfig(window=0).window == 0


def test_assignment_is_checked():
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.data.sequence_length = 1


@pytest.mark.parametrize(
    ("tokens", "batch", "length", "steps"), [(1, 8, 1024, 1), (8192, 8, 1024, 1), (8193, 8, 1024, 2), (100, 3, 10, 4)]
)
def test_steps_round_up(tokens, batch, length, steps):
    assert TransferConfig(tokens=tokens, batch_size=batch).steps(length) == steps


def test_sections_do_not_share_their_default_lists():
    DataConfig().sources.append("more.txt")
    assert DataConfig().sources == ["python-docs"]


def test_a_file_says_what_it_changes_in_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: small\nlinearization: {window: 32}\nfinetune: {rank: 4}\n")
    (tmp_path / "again.yaml").write_text("base: mine.yaml\nname: again\nlinearization: {kept: {pairs: 9}}\n")
    changes = ["name=again", "linearization.window=32", "linearization.kept.pairs=9", "finetune.rank=4"]
    assert load_config(tmp_path / "again.yaml") == load_config("small", changes)
    assert load_config(tmp_path / "again.yaml", ["finetune.rank=5"]).finetune.rank == 5
    (tmp_path / "other.yaml").write_text("base: recommended\nlinearization: {mixer: hybrid}\n")
    assert load_config(tmp_path / "other.yaml").linearization == HybridConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [small]", r"base: expected a recipe or a YAML file \(got \['small'\]\)"),
        ("base: absent.yaml", r"no configuration file .*absent\.yaml; give a YAML file or a shipped recipe: hybrid"),
        ("base: mine.yaml", r"mine\.yaml: base: it is the base of itself"),
    ],
)
def test_a_base_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "mine.yaml")
