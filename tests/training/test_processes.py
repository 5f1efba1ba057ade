"""Two processes train as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import run_together

SCRIPT = """
import os
import sys

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lolcats import LinearizationConfig, TrainingData, convert, finetune_lora, transfer_attention
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.data import PackedDataset
from tiny import TEXT, train_tokenizer

torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, initializer_range=0.3, pad_token_id=0)).eval()
convert(model, LinearizationConfig(window=4))
ids = np.random.default_rng(0).integers(3, 97, (10, 16)).astype(np.int32)
sets = [PackedDataset(x, np.ones(x.shape, bool), np.zeros(x.shape, np.int32)) for x in (ids[:8], ids[8:])]
data = TrainingData(*sets)
common = {"tokens": 16 * 4 * 4, "batch_size": 4, "warmup_steps": 0, "validate_every": 1}
transfer_attention(model, data, TransferConfig(compile=False, **common))
finetune_lora(model, data, FinetuneConfig(lr=0.05, rank=2, kl_factor=1.0, **common))
windows = {"random_window": [16, 32], "window_dropout": 0.5, **common}
transfer_attention(model, data, TransferConfig(**windows))
finetune_lora(model, data, FinetuneConfig(lr=0.05, rank=2, kl_factor=1.0, near_weight=0.25, **windows))
os.environ["LOLCATS_CACHE"] = f"{sys.argv[1]}/cache of {PartialState().num_processes}"
finetune_lora(model, data, FinetuneConfig(lr=0.05, rank=2, kl_factor=1.0,
                                          teacher_logits={"cache": "topk", "k": 8}, **common))
long = LlamaForCausalLM(LlamaConfig(
    vocab_size=300, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, initializer_range=0.3, pad_token_id=0)).eval()
convert(long, LinearizationConfig(window=4))
ids = np.random.default_rng(0).integers(3, 300, (10, 160)).astype(np.int32)
follows = np.array([0, 1, 1, 1, 0, 1, 0, 1], bool)
sets = [PackedDataset(x, np.ones(x.shape, bool), np.zeros(x.shape, np.int32), f)
        for x, f in ((ids[:8], follows), (ids[8:], None))]
data = TrainingData(*sets, tokenizer=train_tokenizer([TEXT]))
common["tokens"] *= 10
finetune_lora(long, data, FinetuneConfig(lr=0.05, rank=2, kl_factor=1.0, recall={"share": 0.5},
                                         passing={"share": 0.5, "chunks": 2}, **common))
state = PartialState()
state.wait_for_everyone()
both = {"short": model, "long": long}
weights = {f"{name}.{k}": v.contiguous() for name, x in both.items() for k, v in x.state_dict().items()}
save_file(weights, f"{sys.argv[1]}/{state.num_processes}-{state.process_index}")
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the weights after both stages: of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    for processes in (2, 1):
        for code, output in run_together([str(script), str(folder)], processes, folder):
            assert code == 0, output
    return folder


def test_two_processes_train_as_one(trained: Path) -> None:
    one, first = load_file(trained / "1-0"), load_file(trained / "2-0")
    assert one.keys() == first.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, first[name], rtol=1e-3, atol=1e-4, msg=name)


def test_both_processes_end_with_the_same_weights(trained: Path) -> None:
    first, second = load_file(trained / "2-0"), load_file(trained / "2-1")
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert different == []


def test_each_process_computes_a_part_of_the_logits_that_are_kept(trained: Path) -> None:
    held = {processes: [*trained.glob(f"cache of {processes}/teacher_logits/*/*.safetensors")] for processes in (1, 2)}
    assert {processes: len(files) for processes, files in held.items()} == {1: 1, 2: 2}
    one, two = ([load_file(file)["keys"] for file in held[processes]] for processes in (1, 2))
    digests = [sorted(bytes(key.tolist()) for key in torch.cat(keys)) for keys in (one, two)]
    assert digests[0] == digests[1] and len(digests[0]) == 8 + 2


SLOW = """
import os, sys, time
from lolcats.cli import main
from lolcats.runs import loading

load = loading.load_teacher


def load_late(*args, **kwargs):
    if os.environ["RANK"] == "1":
        time.sleep(8)  # meanwhile the main process reads and writes the results
    return load(*args, **kwargs)


loading.load_teacher = load_late
sys.exit(main(sys.argv[1:]))
"""


def test_only_the_main_process_writes_the_run(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    """Though the other one loads its model much later."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    words = ("tokens=96", "batch_size=2", "recall.share=0")
    stages = [f"{stage}.{word}" for stage in ("transfer", "finetune") for word in words]
    command = [str(script), "linearize", str(model_folder), "name=two",
               f"runs_dir={tmp_path / 'runs'}", f"data.sources=[{text_file}]", "data.sequence_length=24",
               "data.validation_sequences=2", "device=cpu", "finetune.merge=false", "linearization.window=8",
               "linearization.kept.pairs=8", "linearization.budget=uniform", *stages]  # fmt: skip
    first = run_together(command, 2, tmp_path)
    assert [code for code, _ in first] == [0, 0], first
    run = tmp_path / "runs" / "two"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "lr" in line] == [1, 2, 1, 2, 1, 2]  # both stages and the control
    assert (run / "model" / "model.safetensors").is_file() and (run / "adapter").is_dir()
    assert not list(run.rglob("*.tmp"))
    again = run_together(command, 2, tmp_path)
    assert [code for code, _ in again] == [1, 1], again
    assert all("already holds a run" in output for _, output in again)
