"""The merged format, the folder that is written, and what is refused."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats import LolcatsError, export_model, load_config
from lolcats.export import FORMATS
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import read_results

from .conftest import Runs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("part", ["", "model"])
def test_merged_is_the_model_with_its_card(runs: Runs, ids: Tensor, tmp_path: Path, part: str) -> None:
    run = runs()
    done = export_model(run.path / part, tmp_path / "deep" / "out")
    loaded, original = (AutoModelForCausalLM.from_pretrained(p) for p in (done.folder, run.model))
    assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)
    assert (
        AutoTokenizer.from_pretrained(done.folder).get_vocab() == AutoTokenizer.from_pretrained(run.model).get_vocab()
    )
    names = {p.name for p in done.folder.iterdir()}
    assert names == {p.name for p in run.model.iterdir()} | {"README.md"}
    assert {"generation_config.json", "lolcats_recipe.yaml", "lolcats_results.json", "tokenizer.json"} <= names
    assert load_config(done.folder / "lolcats_recipe.yaml") == load_config(run.config_file)
    assert read_results(done.folder / "lolcats_results.json") == run.results()
    assert done.size == sum(map(len, contents(done.folder).values()))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["merged", "remote-code"])
def test_weights_in_another_format_and_in_several_files(runs: Runs, ids: Tensor, tmp_path: Path, format: str) -> None:
    run = runs()
    options = {"trust_remote_code": True, "dtype": "auto"} if format == "remote-code" else {"dtype": "auto"}
    parts = export_model(run.path, tmp_path / "parts", format, shard_bytes=6000).folder
    assert len([*parts.glob("model-*.safetensors")]) > 3 and not (parts / "model.safetensors").exists()
    same, original = (AutoModelForCausalLM.from_pretrained(p, **options) for p in (parts, run.model))
    assert torch.equal(same(input_ids=ids).logits, original(input_ids=ids).logits)
    half = export_model(parts, tmp_path / "half", format, dtype="bfloat16").folder
    expected = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(half, **options).state_dict()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {t.dtype for n, t in found.items() if ".mixer." in n} == {torch.float32}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_can_be_exported_again(runs: Runs, tmp_path: Path) -> None:
    first = export_model(runs().path, tmp_path / "a" / "same").folder
    second = export_model(first, tmp_path / "b" / "same").folder
    assert contents(first) == contents(second)


@pytest.mark.parametrize("format", FORMATS)
def test_no_path_of_this_machine_where_the_base_is_named(runs: Runs, tmp_path: Path, format: str) -> None:
    run = runs()
    local = load_config(run.config_file).runs_dir
    done = export_model(run.path, tmp_path / "out", format, base="someone/teacher")
    files = contents(done.folder)
    assert not [name for name, data in files.items() if local.encode() in data or str(tmp_path).encode() in data]
    recipe = load_config(done.folder / "lolcats_recipe.yaml")
    assert (recipe.model, recipe.data.sources) == ("someone/teacher", ["river.txt"])
    assert b"base_model: someone/teacher" in files["README.md"]
    assert json.loads(files["lolcats_results.json"])["model"] == "someone/teacher"


PAGE = '<html><title>{run}</title><script>const files = [{model}, {text}, "layers"]</script></html>'


def with_report(run: RunFolder, tmp_path: Path) -> Path:
    """A copy of a run, whose page names the paths of this machine."""
    copied = Path(shutil.copytree(run.path, tmp_path / "a & b" / "run"))
    config = run.config()
    page = PAGE.format(
        run=html.escape(str(copied)), model=json.dumps(config.model), text=json.dumps(config.data.sources[0])
    )
    (copied / "report.html").write_text(page)
    return copied


@pytest.mark.parametrize("format", FORMATS)
def test_the_page_of_a_run_lies_beside_its_card(runs: Runs, tmp_path: Path, format: str) -> None:
    run = with_report(runs(), tmp_path)
    done = export_model(run, tmp_path / "out", format)
    assert done.report and (done.folder / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert "[report.html](report.html)" in (done.folder / "README.md").read_text()
    assert "report.html" not in done.left_out
    without = export_model(runs().path, tmp_path / "without", format)
    assert not without.report and "report.html" not in (without.folder / "README.md").read_text()


def test_the_page_goes_along_with_an_export_of_an_export(runs: Runs, tmp_path: Path) -> None:
    first = export_model(with_report(runs(), tmp_path), tmp_path / "x" / "same").folder
    second = export_model(first, tmp_path / "y" / "same")
    assert second.report and second.left_out == [] and contents(first) == contents(second.folder)


def test_the_page_that_others_see_names_no_place_of_this_machine(runs: Runs, tmp_path: Path) -> None:
    run = with_report(runs(), tmp_path)
    done = export_model(run, tmp_path / "out", base="someone/teacher")
    expected = PAGE.format(run="run", model='"someone/teacher"', text='"river.txt"')
    assert (done.folder / "report.html").read_text() == expected


def test_a_page_that_is_a_link_elsewhere_is_refused(runs: Runs, tmp_path: Path) -> None:
    run = with_report(runs(), tmp_path)
    (run / "report.html").rename(tmp_path / "secret.html")
    (run / "report.html").symlink_to(tmp_path / "secret.html")
    with pytest.raises(LolcatsError, match=r"report.html is a link to .*secret.html, outside the folder"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_only_when_asked(runs: Runs, tmp_path: Path) -> None:
    out = export_model(runs().path, tmp_path / "out", "adapter").folder
    before = contents(out)
    with pytest.raises(LolcatsError, match=r"already holds an export; overwrite it"):
        export_model(runs().path, out)
    assert contents(out) == before
    export_model(runs().path, out, overwrite=True)
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_export_is_never_replaced(runs: Runs, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(LolcatsError, match=r"is no export of lolcats"):
            export_model(runs().path, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert export_model(runs().path, tmp_path / "empty").size > 0


def test_the_source_is_never_replaced(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(runs().path, run)
    before = contents(run)
    for source in (run, run / "model"):
        for out in (run, run / "model", run.parent, run / "model" / ".." / "model"):
            with pytest.raises(LolcatsError, match=r"holds the model that is exported"):
                export_model(source, out, overwrite=True)
    assert contents(run) == before


def test_nothing_is_written_into_the_source(runs: Runs, tmp_path: Path) -> None:
    """Nor through links, of either."""
    run = tmp_path / "runs" / "run"
    shutil.copytree(runs().path, run)
    shutil.copytree(run / "model", tmp_path / "alone")
    before = contents(run)
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "to_out").symlink_to(run / "model" / "out")
    for source, out in (
        (run, run / "out"),
        (run / "model", run / "model" / "deep" / "out"),
        (tmp_path / "link", run / "out"),
        (run, tmp_path / "link" / "model" / "out"),
        (run, tmp_path / "to_out"),
        (tmp_path / "alone", tmp_path / "alone" / "inner"),
    ):
        with pytest.raises(LolcatsError, match=r"lies inside .*choose a folder outside"):
            export_model(source, out)
    assert contents(run) == before


def test_a_link_to_a_place_stays_one(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    for overwrite in (False, True):
        export_model(runs().path, tmp_path / "out", "adapter", overwrite=overwrite)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "README.md").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_model(runs().path, ".", "adapter")
    assert 'load_adapter("here")' in (tmp_path / "here" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "here", "out"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing_and_what_was_there(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    run, out = runs(), tmp_path / "out"
    export_model(run.path, out)
    before = contents(out)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lolcats.export.contents.shutil.copyfile", full)
    monkeypatch.setattr("lolcats.export.adapter.save_file", full)
    for overwrite, place in ((True, out), (False, tmp_path / "new")):
        with pytest.raises(LolcatsError, match=r"cannot write .*No space left on device; .*untouched"):
            export_model(run.path, place, format, overwrite=overwrite)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_fails_at_the_last_moment_puts_the_old_back(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_model(runs().path, tmp_path / "out", "adapter").folder
    before = contents(out)
    original = os.replace

    def fail(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr("lolcats.files.os.replace", fail)
    with pytest.raises(LolcatsError, match=r"Input/output error; what was there before is untouched"):
        export_model(runs().path, out, overwrite=True)
    assert contents(out) == before


def test_what_cannot_be_exported(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match=r"unknown format 'gguf'; expected one of merged, adapter, remote-code"):
        export_model(runs().path, tmp_path / "out", "gguf")
    with pytest.raises(LolcatsError, match=r"unknown dtype 'int8'; expected one of float32, bfloat16, float16"):
        export_model(runs().path, tmp_path / "out", dtype="int8")
    with pytest.raises(LolcatsError, match=r"an adapter keeps its own"):
        export_model(runs().path, tmp_path / "out", "adapter", shard_bytes=10)
    with pytest.raises(LolcatsError, match=r"no linearized model or run at .*nowhere"):
        export_model(tmp_path / "nowhere", tmp_path / "out")
    shutil.copytree(runs().path, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model", "added*"))
    with pytest.raises(LolcatsError, match=r"run without a model yet; finish it with .*config.yaml first"):
        export_model(tmp_path / "unfinished", tmp_path / "out")
    shutil.copytree(runs().model, tmp_path / "plain", ignore=shutil.ignore_patterns("*.yaml"))
    with pytest.raises(LolcatsError, match=r"has no lolcats_recipe.yaml"):
        export_model(tmp_path / "plain", tmp_path / "out")
    shutil.copytree(runs().model, tmp_path / "broken")
    (tmp_path / "broken" / "lolcats_results.json").write_text("{")
    with pytest.raises(LolcatsError, match=r"lolcats_results.json cannot be used: it is not JSON"):
        export_model(tmp_path / "broken", tmp_path / "out")
    adapter = export_model(runs().path, tmp_path / "adapter", "adapter").folder
    with pytest.raises(LolcatsError, match=r"is an exported adapter, .*export the run"):
        export_model(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
