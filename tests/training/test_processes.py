"""Two processes train as one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lolcats import LinearizationConfig, TrainingData, convert, finetune_lora, transfer_attention
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.data import PackedDataset

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
state = PartialState()
state.wait_for_everyone()
weights = {k: v.contiguous() for k, v in model.state_dict().items()}
save_file(weights, f"{sys.argv[1]}/{state.num_processes}-{state.process_index}")
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the weights after both stages: of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    source = Path(__file__).parents[2] / "src"
    plain = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = [
        plain | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"}
        for rank in range(2)
    ]  # fmt: skip

    def start(env: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(folder)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    for environments in (pair, [plain]):
        running = [start(env) for env in environments]
        try:
            for process in running:
                output, _ = process.communicate(timeout=100)
                assert process.returncode == 0, output
        finally:
            for process in running:
                process.kill()
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
