"""What `test_sharded.py` has processes do: stage 2 of tiny models, in the number of processes that start this file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from killing import Killed, Killer
from lolcats import LinearizationConfig, TrainingData, convert, finetune_lora, transfer_attention
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.config.mixers import BlendConfig
from lolcats.data import PackedDataset
from lolcats.models.quantization import keep_differentiable
from lolcats.models.sharded import whole_tensor
from lolcats.models.teacher import load_teacher
from lolcats.training import Reporter, gradients, loop
from lolcats.training.report import LORA_FILE
from lolcats.training.sharding import load_sharded, shards_weights

LAYERS = {
    "hybrid": LinearizationConfig(window=4),
    "blend": BlendConfig(window=4, kept={"pairs": 4}, budget="uniform"),  # type: ignore[arg-type]
}
COMMON: dict[str, Any] = {
    "tokens": 16 * 4 * 4, "batch_size": 4, "warmup_steps": 0, "validate_every": 2, "checkpoint_every": 2, "rank": 2,
    "lr": 0.02,
}  # fmt: skip
SHARDED = {"enabled": True}
OFFLOADED: dict[str, Any] = {"sharding": {"enabled": True, "cpu_offload": True}, "micro_batch_size": 1}
SCENES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("hybrid", {"kl_factor": 1.0, "near_weight": 0.25}),
    "blend": ("blend", {"kl_factor": 1.0, "train_feature_maps": True, "gradient_checkpointing": True, **OFFLOADED}),
    "alone": ("blend", {"kl_factor": 1.0, "train_feature_maps": True, **OFFLOADED}),
    "passing": ("hybrid", {"passing": {"share": 0.5, "chunks": 2}, "gradient_checkpointing": True}),
    "packed": ("hybrid", {"kl_factor": 1.0}),
    "errors": ("hybrid", {"cross_entropy_factor": 0.0, "error_factor": 5.0, "gradient_checkpointing": True}),
    "long-lora": ("hybrid", {"kl_factor": 1.0, "tokens": 16 * 4 * 7}),
    "long-full": ("hybrid", {"method": "full", "gradient_checkpointing": True, "tokens": 16 * 4 * 7}),
}


def teacher(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, initializer_range=0.3, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def training_data() -> TrainingData:
    ids = np.random.default_rng(0).integers(3, 97, (14, 16)).astype(np.int32)
    follows = np.array([False, *[True] * 11])
    first, rest = (
        PackedDataset(x, np.ones(x.shape, bool), np.zeros(x.shape, np.int32), f)
        for x, f in ((ids[:12], follows), (ids[12:], None))
    )
    return TrainingData(first, rest)


def student(accelerator: Accelerator, mixer: str, config: FinetuneConfig, packed: Path | None) -> PreTrainedModel:
    """Converted from a random teacher, or from one in a folder in 4 bits."""

    def load() -> tuple[PreTrainedModel, Any]:
        if packed is not None:
            return load_teacher(packed, torch.float32, "cpu", "4bit")
        return teacher(tied=mixer == "blend"), None

    alone = accelerator.num_processes == 1  # where the settings would be refused: nothing is gained on a CPU
    sharded = config.sharding.cpu_offload if alone else shards_weights(config, accelerator)
    model, _ = load_sharded(load, config, accelerator) if sharded else load()
    keep_differentiable(model)
    set_seed(0)
    convert(model, LAYERS[mixer], input_ids=torch.from_numpy(training_data().train.ids[:2]).long())
    return model


@contextmanager
def killed_while_writing(step: int) -> Iterator[None]:
    write = loop.write_apart

    def write_and_die(file: Path, now: int, *rest: Any) -> Any:
        found = write(file, now, *rest)
        if file.stem == "last" and now == step:
            raise Killed
        return found

    loop.write_apart = write_and_die
    try:
        yield
    finally:
        loop.write_apart = write


def run_scene(place: Path, name: str, mixer: str, changes: dict[str, Any], folder: str = "", kill: int = 0) -> None:
    """Train a scene, from the checkpoint in `folder` if there is one, until it is killed after the step `kill`.

    After step -`kill`, it is killed while its checkpoint is written: when there are shards, and no file names them yet.
    Its weights and metrics are files named after it, the number of processes and `folder`.
    """
    accelerator = Accelerator(cpu=True)
    own = folder or f"{name}-{accelerator.num_processes}"
    settings = {**COMMON, "sharding": SHARDED, "merge": False, **changes}
    if accelerator.num_processes == 1 and name != "alone":
        settings |= {"sharding": {}, "gradient_checkpointing": False}
    config = FinetuneConfig(**settings)
    model = student(accelerator, mixer, config, place / "teacher" if name == "packed" else None)
    if name == "lora":
        transfer_attention(model, training_data(), TransferConfig(tokens=16 * 4 * 2, batch_size=4, compile=False))
    metrics = place / f"{own}.jsonl" if accelerator.is_main_process else None
    reporter = Killer(metrics, kill) if kill > 0 else Reporter(metrics)
    set_seed(0)
    try:
        with killed_while_writing(-kill):
            finetune_lora(model, training_data(), config, folder=place / own, reporter=reporter)
    except Killed:
        return
    weights = {n: whole_tensor(p.detach()).contiguous() for n, p in model.named_parameters() if p.is_floating_point()}
    save_file(weights, place / f"{own}.{accelerator.process_index}")
    if metrics is not None and (place / LORA_FILE).exists():
        (place / LORA_FILE).rename(place / f"{own}.{LORA_FILE}")


def add_up_together(place: Path) -> None:
    """Add up gradients of this process and the others in buckets, and one by one."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    shapes = [(3,), (2, 5), (4, 4), (1,), (7,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for number, p in enumerate(parameters):
        p.grad = torch.randn(p.shape) if number != accelerator.process_index and number < 4 else None
    own = [torch.zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    one_by_one = {f"{n}": accelerator.reduce(g, "sum") for n, g in enumerate(own[:4])}
    gradients.BUCKET = 12  # less than all have, and than one of them
    gradients.reduce_gradients(parameters, accelerator)
    assert parameters[4].grad is None, "no process has a gradient of it"
    for number, expected in one_by_one.items():
        assert torch.equal(cast(Any, parameters[int(number)].grad), cast(Any, expected)), number
    (place / f"added-{accelerator.process_index}").touch()


def main(place: Path, words: list[str]) -> None:
    """Run scenes; a word is NAME, or NAME:FOLDER:KILL."""
    torch.set_num_threads(1)
    if Accelerator(cpu=True).num_processes == 2:
        add_up_together(place)
    for word in words:
        name, folder, kill = (*word.split(":"), "", "")[:3]
        run_scene(place, name, *SCENES[name], folder, int(kill or 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
