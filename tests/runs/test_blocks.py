"""Stage 1 block by block: what it trains is what training all layers together gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats import RunConfig, linearize
from lolcats.runs.folder import RunFolder
from lolcats.training.checkpoint import load_tensors, read_metadata

UNCLIPPED = ("transfer.clip=1e30",)
LAYERS = {
    "hybrid": ("linearization.start=paper",),
    "matched": ("linearization.start=matched", "linearization.layers=[0,2,3]"),
    "blend": ("linearization.mixer=blend", "linearization.kept.pairs=5", "linearization.budget=heads",
              "linearization.kept.score=learned"),
    "documents": ("data.packing=documents", "transfer.micro_batch_size=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of four layers, in several shards."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=4, head_dim=6,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    tiny_tokenizer.save_pretrained(folder)
    return folder


def stage_1(folder: RunFolder, name: str = "last") -> dict[str, Tensor]:
    """Trained parameters and what the optimiser knows of them."""
    tensors, _ = load_tensors(folder.checkpoints("transfer") / f"{name}.safetensors")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("random:")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


Make = Callable[..., RunConfig]


@pytest.fixture
def make(make_config: Make, teacher: Path) -> Make:
    return lambda *changes: make_config(f"model={teacher}", "transfer.validate_every=3", *UNCLIPPED, *changes)


@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_train_what_all_layers_train_together(make: Make, layer: str) -> None:
    joint = linearize(make("name=joint", *LAYERS[layer]), until="transfer")
    for size in (1, 2, 4):
        changes = (f"name=blocks{size}", f"transfer.blocks.size={size}", *LAYERS[layer])
        folder = linearize(make(*changes), until="transfer")
        assert_same(stage_1(folder), stage_1(joint))
        metadata = [read_metadata(f.checkpoints("transfer") / "last.safetensors") for f in (folder, joint)]
        assert metadata[0]["weights"] == metadata[1]["weights"] and metadata[0]["data"] == metadata[1]["data"]
        assert folder.results().split == joint.results().split
        assert folder.results().perplexity["transfer"] == joint.results().perplexity["transfer"]
        assert not list((folder.path / "hidden").rglob("*.safetensors"))
