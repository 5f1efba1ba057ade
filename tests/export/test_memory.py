"""Models that do not fit: no more of the weights is in memory than a part of one file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import forked
from lolcats import LinearizationConfig, convert, export_model, load_config
from lolcats.config import dump_config
from lolcats.runs.artefact import save_artefact
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results
from lolcats.runs.trained import added_tensors, save_added
from lolcats.training.checkpoint import save_tensors

MB = 10**6
SHARD = 50 * MB
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("whole", {}),
    "remote-code": ("whole", {"format": "remote-code"}),
    "adapter": ("whole", {"format": "adapter"}),
    "other format, other files": ("whole", {"dtype": "bfloat16", "shard_bytes": SHARD}),
    "from the teacher's files": ("unsaved", {"shard_bytes": SHARD}),
    "adapter, from the teacher's files": ("unsaved", {"format": "adapter"}),
}


def make_runs(place: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two runs of one model of 210 MB: one that saved it, and one that did not."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(shape)
    model.save_pretrained(place / "teacher", max_shard_size=SHARD)
    tokenizer.save_pretrained(place / "teacher")
    layers = LinearizationConfig()
    convert(model, layers, seed=0)
    for name in ("whole", "unsaved"):
        run = RunFolder(place / name)
        config = load_config(None, [f"model={place / 'teacher'}", f"name={name}", "finetune.rank=8"])
        config = config.model_copy(update={"linearization": layers})
        run.path.mkdir()
        run.config_file.write_text(dump_config(config))
        save_added(run, added_tensors(model))
        lora = {
            f"parameter:model.layers.{layer}.self_attn.inner.{at}.lora_{side}.default.weight": torch.randn(shape)
            for layer in range(5)
            for at, rows in (("q_proj", 1024), ("v_proj", 256))
            for side, shape in (("A", (8, 1024)), ("B", (rows, 8)))
        }
        for stage in ("transfer", "finetune"):
            for file in ("best", "last"):
                save_tensors(run.checkpoints(stage) / f"{file}.safetensors", lora, {"step": 1, "steps": 1})
        results = Results(dtype="float32", model=config.model)
        run.write_results(results)
        if name == "whole":
            model.config.architectures = [type(model).__name__]
            save_artefact(run.model, model, tokenizer, config, results)


def peak_growth(place: Path, name: str) -> int:
    """Bytes by which an export raises what the process has in memory."""
    run, options = CASES[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    export_model(place / run, place / "exported", overwrite=True, **options)
    return memory("VmHWM") - before


def memory(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_no_more_than_a_file_of_weights(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    make_runs(tmp_path, tiny_tokenizer)
    largest = max(f.stat().st_size for f in (tmp_path / "teacher").glob("*.safetensors"))
    assert 0.6 * SHARD < largest <= SHARD + MB
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = forked.start([__file__, str(tmp_path)], tmp_path, environment)
    child.join()
    assert child.exitcode == 0, (tmp_path / "out").read_text()
    grown = json.loads((tmp_path / "grown.json").read_text())
    assert grown.keys() == CASES.keys()
    assert not {name: size for name, size in grown.items() if size > 1.2 * largest}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    peak_growth(folder, "adapter")  # what is imported and read once is no part of it
    Path("grown.json").write_text(json.dumps({name: peak_growth(folder, name) for name in CASES}))
