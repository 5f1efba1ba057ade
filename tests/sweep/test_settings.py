"""The sweep file: which runs it stands for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lolcats import RunConfig, load_config
from lolcats.config import dump_config
from lolcats.errors import ConfigError
from lolcats.sweep import Sweep, load_sweep
from lolcats.sweep.settings import MAX_RUNS

GRID = "grid: {linearization.feature_map: [hedgehog, t2r], seed: [0, 1, 2]}\n"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    def load_text(text: str, *overrides: str) -> Sweep:
        (tmp_path / "study.yaml").write_text(text)
        return load_sweep(tmp_path / "study.yaml", overrides)

    return load_text


def test_a_grid_is_a_product(load: Callable[..., Sweep]) -> None:
    sweep = load(f"base: paper\nsettings: {{runs_dir: out}}\n{GRID}")
    points = [(run.config.linearization.feature_map, run.config.seed) for run in sweep.runs]
    assert points == [(name, seed) for name in ("hedgehog", "t2r") for seed in (0, 1, 2)]
    assert sweep.runs[4].name == "feature_map-t2r_seed-1" and sweep.folder == Path("out/study")
    same = load_config("paper", ["linearization.feature_map=t2r", "seed=1", "runs_dir=out/study"])
    assert same.evaluation.controls.pop() == "trained_window", "which a sweep trains where its file asks for it"
    assert sweep.runs[4].config == same.model_copy(update={"name": "feature_map-t2r_seed-1"})


def test_each_named_run_is_done_at_each_point_of_the_grid(load: Callable[..., Sweep]) -> None:
    runs = (
        "base: hybrid\nruns: [{name: a, finetune: {rank: 4}}, {name: b, finetune.rank: 8, transfer.enabled: false}]\n"
    )
    sweep = load(runs + "grid: {seed: [0, 1]}\n")
    assert [run.name for run in sweep.runs] == ["a_seed-0", "a_seed-1", "b_seed-0", "b_seed-1"]
    assert [run.config.finetune.rank for run in sweep.runs] == [4, 4, 8, 8]
    assert [run.config.transfer.enabled for run in sweep.runs] == [True, True, False, False]
    assert sweep.axes == {"run": ["a", "b"], "seed": [0, 1]}
    assert sweep.keys == ["finetune.rank", "transfer.enabled", "seed"]
    assert load("grid: {seed: [0]}").runs[0].config.linearization == load_config("recommended").linearization, (
        "the base is the recipe recommended unless given"
    )


def test_settings_overrides_and_a_base_file_beside_the_sweep(load: Callable[..., Sweep], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("finetune: {rank: 3, alpha: 5.0}\ntransfer: {lr: 0.5}\n")
    text = "name: x\nbase: mine.yaml\nsettings: {finetune: {alpha: 6.0}}\nruns: [{name: only}]\n"
    sweep = load(text, "transfer.lr=0.25", "name=other", "runs_dir=/somewhere")
    config = sweep.runs[0].config
    assert (config.finetune.rank, config.finetune.alpha, config.transfer.lr) == (3, 6.0, 0.25)
    assert (sweep.name, sweep.folder, config.name) == ("other", Path("/somewhere/other"), "only")


def test_a_sweep_trains_windows_where_its_file_says_so(load: Callable[..., Sweep]) -> None:
    asked = "evaluation.controls: [equal_window, trained_window]"
    for base in ("", "base: null\n", "base: paper\n"):
        plain = load(f"{base}grid: {{seed: [0]}}\n").runs[0].config
        assert not plain.trains_window and "equal_window" in plain.evaluation.controls
        assert load(f"{base}settings: {{{asked}}}\ngrid: {{seed: [0]}}\n").runs[0].config.trains_window


def test_the_sweep_as_text_needs_nothing_else(load: Callable[..., Sweep], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(dump_config(RunConfig(seed=5)))
    runs = "runs: [{name: a, linearization.window: 0}, {name: b, data.sources: [x.txt, y.txt]}]\n"
    sweep = load(f"base: mine.yaml\ngrid: {{transfer.tokens: [1e6, 2e6]}}\n{runs}", "finetune.lr=3e-3")
    again = load(sweep.text)
    assert again.runs == sweep.runs and again.axes == sweep.axes and again.text == sweep.text
    assert sweep.axes["transfer.tokens"] == [1_000_000, 2_000_000]
    assert sweep.runs[3].name == "b_tokens-2M" and sweep.runs[3].config.seed == 5


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ("finetune.targets: [[q_proj], [q_proj, v_proj]]", ["targets-q_proj", "targets-q_proj.v_proj"]),
        ("linearization.layers: [all, 0.5, [0, -1]]", ["layers-all", "layers-0.5", "layers-0.-1"]),
        ("evaluation.last: [null, 10]", ["last-none", "last-10"]),
        ("finetune.lr: [1e-4, 3e-4]", ["lr-0.0001", "lr-0.0003"]),
        ("{transfer: {tokens: [1e6]}, finetune: {tokens: [12_345]}}", ["transfer.tokens-1M_finetune.tokens-12345"]),
        ("finetune.method: [lora, full]", ["method-lora", "method-full"]),
    ],
)
def test_values_in_names(load: Callable[..., Sweep], values: str, names: list[str]) -> None:
    grid = values if values.startswith("{") else f"{{{values}}}"
    assert [run.name for run in load(f"grid: {grid}\n").runs] == names


def test_long_values_stay_apart_in_names(load: Callable[..., Sweep]) -> None:
    files = [f"/data/{'long/' * 20}{name}.jsonl" for name in "ab"]
    names = [run.name for run in load(f"grid: {{data.sources: [[{files[0]}], [{files[1]}]]}}\n").runs]
    assert len(set(names)) == 2 and all(len(name) < 60 for name in names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gird: {seed: [1]}", "gird: unknown key; did you mean grid?"),
        ("finetune: {rank: 3}\nruns: [{name: a}]", "finetune: is a key of a run; put it under settings"),
        ("seed: 3\nruns: [{name: a}]", "seed: is a key of a run; put it under settings"),
        ("settings: {seed: 1}", "nothing to run: give grid (key: [values]) or runs"),
        ("grid: {}", "nothing to run"),
        ("grid: {seed: []}", "grid.seed: no values; give at least one"),
        ("grid: {seed: 3}", "grid.seed: expected a list of values (got 3); one value: [3]"),
        ("grid: {finetune.rnk: [1, 2]}", "finetune.rnk: unknown key; did you mean finetune.rank?\n"),
        ("grid: {finetune: [1]}", "finetune: "),
        ("grid: {finetune.rank: [1, x, 3]}", "valid integer (got 'x') (in rank-x)"),
        ("settings: {finetune.lr: -1}\ngrid: {seed: [1, 2]}", "finetune.lr: Input should be greater than 0 (got -1)\n"),
        ("grid: {seed: [1, 1]}", "two runs are called seed-1"),
        ("grid: {transfer.tokens: [1e6, 1_000_000]}", "two runs are called tokens-1M"),
        ("runs: [{name: a}, {name: a, seed: 3}]", "runs, item 2: the name a is taken"),
        ("runs: [{seed: 3}]", "runs, item 1: expected a name and settings (got {'seed': 3})"),
        ("runs: [a]", "runs, item 1: expected a name"),
        ("runs: [{name: a/b}]", "expected a name of letters, digits"),
        ("runs: {a: {seed: 3}}", "runs: expected a list of settings"),
        ("runs: [{name: a, finetune.rank: 3}]\ngrid: {finetune.rank: [1]}", "finetune.rank: is in grid and in runs"),
        ("grid: {name: [a, b]}", "name: cannot be swept"),
        ("settings: {name: x}\ngrid: {seed: [1]}", "settings.name: a run gets its name from the sweep"),
        ("name: a b\ngrid: {seed: [1]}", "name: expected letters, digits"),
        ("base: [paper]\ngrid: {seed: [1]}", "base: expected a recipe, a YAML file or null"),
        ("base: nowhere\ngrid: {seed: [1]}", "no configuration file nowhere; give a YAML file or a shipped recipe"),
        ("base: nowhere.yaml\ngrid: {seed: [1]}", "no configuration file /"),
        ("settings: 3\ngrid: {seed: [1]}", "settings: expected `key: value` lines (got 3)"),
        ("grid: {seed: [1], seed: [2]}", "duplicate key seed"),
        ("[1, 2]", "must hold base, settings, grid and runs; got [1, 2]"),
        (": {", "cannot read the sweep"),
        (
            "base: hybrid\nruns: [{name: a, linearization: {window: 0, window_kind: terraced}}]",
            "window >= 1; for no window",
        ),
        ("grid: {seed: [1]}\nmeasure: {taks: [piqa]}", "measure.taks: unknown key; did you mean measure.tasks?"),
        ("grid: {seed: [1]}\nmeasure: {limit: x}", "measure.limit: Input should be a valid integer (got 'x')"),
        ("grid: {seed: [1]}\nmeasure: {limit: 0}", "measure.limit: Input should be greater than or equal to 1"),
        ("grid: {seed: [1]}\nmeasure: {num_fewshot: {mmlu: -1}}", "measure.num_fewshot: Input should be greater"),
        ("grid: {seed: [1]}\nmeasure: {lengths: []}", "measure.lengths: List should have at least 1 item"),
        (
            "grid: {seed: [1]}\nmeasure: {recall: [paskey]}",
            "measure.recall: unknown recall task 'paskey'; did you mean",
        ),
        ("grid: {seed: [1]}\nmeasure: [piqa]", "measure: expected `key: value` lines, such as tasks: [piqa] (got ['p"),
        ("measure: {recall: [passkey]}\nruns: [{name: teacher}]", "a run cannot be called teacher"),
    ],
)
def test_mistakes_are_explained(load: Callable[..., Sweep], text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert said in f"{caught.value}\n"


def test_all_mistakes_are_told_at_once(load: Callable[..., Sweep]) -> None:
    text = "bse: paper\ngrid: {finetune.rnk: [1, 2], seed: 3}\nruns: [{name: a}, {name: a}]\nsettings: {sed: 1}\n"
    with pytest.raises(ConfigError) as caught:
        load(text)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip().split(":")[0] for line in lines] == [
        "bse", "grid.seed", "runs, item 2", "finetune.rnk", "sed"
    ]  # fmt: skip


def test_a_grid_that_is_too_large(load: Callable[..., Sweep]) -> None:
    values = list(range(20))
    with pytest.raises(ConfigError, match=f"20 x 20 = 400 runs; a sweep has at most {MAX_RUNS}"):
        load(f"grid: {{seed: {values}, finetune.warmup_steps: {values}}}\n")


def test_an_override_of_a_swept_key(load: Callable[..., Sweep]) -> None:
    with pytest.raises(ConfigError, match="override seed: the sweep itself sets this key"):
        load(GRID, "seed=7")


def test_copies_of_data_sets_go_to_the_runs_that_read_them(load: Callable[..., Sweep]) -> None:
    runs = "runs: [{name: a, data.sources: [alpaca-cleaned]}, {name: b, data.sources: [redpajama-sample, x.txt]}]\n"
    sweep = load(runs, "data.local.alpaca-cleaned=a.json", "data.local.redpajama-sample=r/", "data.local.other=o")
    assert [run.config.data.local for run in sweep.runs] == [
        {"alpaca-cleaned": "a.json", "other": "o"}, {"redpajama-sample": "r/", "other": "o"}
    ]  # fmt: skip


def test_what_is_measured_can_be_changed(load: Callable[..., Sweep]) -> None:
    text = f"{GRID}measure: {{tasks: [piqa, mmlu], num_fewshot: {{mmlu: 5}}, recall: [passkey], samples: 3}}\n"
    sweep = load(text, "measure.tasks=piqa", "measure.num_fewshot.mmlu=0", "measure.limit=50", "measure.task_data=here")
    assert sweep.measure.model_dump(include={"tasks", "num_fewshot", "limit", "task_data", "recall", "samples"}) == {
        "tasks": ["piqa"], "num_fewshot": {"mmlu": 0}, "limit": 50, "task_data": "here", "recall": ["passkey"],
        "samples": 3,
    }  # fmt: skip
    assert all(run.measure is sweep.measure for run in sweep.runs)
    again = load(sweep.text)
    assert again.measure == sweep.measure and again.runs == sweep.runs
    assert not load(text, "measure=null").measure.anything and not load(GRID).measure.anything


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no sweep file .*nowhere\.yaml"):
        load_sweep(tmp_path / "nowhere.yaml")
