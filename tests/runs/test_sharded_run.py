"""A whole run with sharded weights, in two processes: its artefact is an ordinary one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forked import run_together
from lolcats.data import build_datasets
from lolcats.evaluation import Variant, measure
from lolcats.runs.folder import RunFolder

MAIN = "import sys\nfrom lolcats.cli import main\nsys.exit(main(sys.argv[1:]))\n"


@pytest.mark.slow
def test_a_sharded_run_leaves_an_ordinary_artefact(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    values = ("tokens=96", "batch_size=2", "recall.share=0")
    words = [f"{stage}.{value}" for stage in ("transfer", "finetune") for value in values]
    command = [
        str(tmp_path / "main.py"), "linearize", str(model_folder), "name=two", f"runs_dir={tmp_path / 'runs'}",
        f"data.sources=[{text_file}]", "data.sequence_length=24", "data.validation_sequences=2", "device=cpu",
        "dtype=bfloat16", "linearization.mixer=hybrid", "linearization.window=4",
        "evaluation.controls=[trained_window]", "finetune.sharding.enabled=true",
        "finetune.gradient_checkpointing=true", "finetune.merge=false", "finetune.lr=0.01",
        "finetune.targets=attention", *words,
    ]  # fmt: skip
    done = run_together(command, 2, tmp_path)
    assert [code for code, _ in done] == [0, 0], done
    folder = RunFolder(tmp_path / "runs" / "two")
    saved, teacher = load_file(folder.model / "model.safetensors"), load_file(model_folder / "model.safetensors")
    assert {name for name in saved if "mixer" not in name} == {
        name.replace("self_attn.", "self_attn.inner.") for name in teacher
    }
    changed = {n for n, t in teacher.items() if not torch.equal(t.bfloat16(), saved[n.replace("attn.", "attn.inner.")])}
    assert changed == {n for n in teacher if "self_attn" in n}, "adapters are merged, and nothing else is touched"
    assert (folder.adapter / "adapter_config.json").is_file() and (folder.model / "controls").is_dir()
    assert not list(folder.path.rglob("*.shards"))
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    _, held = build_datasets(folder.config().data, tokenizer, folder.config().seed)
    variant = Variant(AutoModelForCausalLM.from_pretrained(folder.model))
    again = measure({"x": variant}, torch.from_numpy(held.ids).long())["x"].perplexity
    assert again == pytest.approx(folder.results().perplexity["student"], rel=1e-3)
