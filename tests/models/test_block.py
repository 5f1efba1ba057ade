"""One block of layers in memory: it gives what the whole model gives there, bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from families import FAMILIES
from lolcats import LolcatsError
from lolcats.models.block import Part, load_block
from lolcats.models.block_check import check_blocks
from lolcats.models.layers import decoder_layers
from lolcats.models.quantization import keep_differentiable, quantization_config
from lolcats.models.source_files import source_digest

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OFTEN = {"gemma3_text", "phi", "gpt2", "mixtral"}
PACKED = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures("no_gradients")


def config_of(family: str, **changes: Any) -> Any:
    settings = {name: value for name, value in (SIZES | changes).items() if name not in SIZES or value is not None}
    return AutoConfig.for_model(family, **settings)


def streams(model: PreTrainedModel, position_ids: Tensor | None) -> list[Tensor]:
    """What each layer of the whole model gives."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *found: outputs.append(found[2])) for layer in decoder_layers(model)[1]]
    model.base_model(input_ids=IDS, position_ids=position_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def assert_blocks_are_the_whole(folder: Path, model: PreTrainedModel, **options: Any) -> None:
    """Layer by layer, each from what the one before it gave; and the logits from what the last one gave."""
    count = len(decoder_layers(model)[1])
    for position_ids in (None, PACKED):
        hidden = None
        for index, expected in enumerate(streams(model, position_ids)):
            random = torch.get_rng_state()
            block = load_block(str(folder), Part(index, index + 1, embeddings=index == 0), **options)
            assert torch.equal(torch.get_rng_state(), random), "blocks must leave the start of layers as it is"
            hidden = block(IDS, position_ids, hidden)
            assert torch.equal(hidden, expected), index
            assert not any(p.is_meta for p in decoder_layers(block.model)[1][index].parameters())
            others = [layer for n, layer in enumerate(decoder_layers(block.model)[1]) if n != index]
            assert all(p.is_meta for layer in others for p in layer.parameters())
        head = load_block(str(folder), Part(count, count, head=True), **options)
        with head.given(hidden):
            found = head.model(input_ids=IDS, position_ids=position_ids, use_cache=False).logits
        assert torch.equal(found, model(input_ids=IDS, position_ids=position_ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in FAMILIES]
)
def test_a_block_gives_what_the_whole_model_gives_there(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of(family, **FAMILIES[family].settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert_blocks_are_the_whole(tmp_path, model)
    small = check_blocks(config)
    assert len(decoder_layers(small)[1]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantized_block(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(config_of("llama", hidden_size=64, head_dim=16)).save_pretrained(tmp_path)
    dtype = torch.float32
    options = {"quantization_config": quantization_config(kind, dtype), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **options).eval()
    keep_differentiable(model)
    assert_blocks_are_the_whole(tmp_path, model, dtype=dtype, quantization=kind)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deepseek_v3", "gpt_oss"))]
)
def test_large_models_are_checked_by_small_ones(family: str) -> None:
    """Settings as they are shipped: billions of parameters."""
    check_blocks(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", ["bloom", "gemma3n_text"])
def test_families_whose_layers_need_more_are_refused(family: str) -> None:
    with pytest.raises(LolcatsError, match=r"cannot be trained block by block: .*; set transfer.blocks.size to null"):
        check_blocks(config_of(family))


def test_a_layer_that_reads_more_than_the_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    layer = cast(Any, modeling_llama.LlamaDecoderLayer)
    own, first = layer.forward, list[Tensor]()

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.self_attn.layer_idx == 0:
            first[:] = [hidden_states]
        return own(self, hidden_states, *args, **kwargs) + 0.1 * first[0]

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(LolcatsError, match="layer 2 does not follow from the hidden states in front of it alone"):
        check_blocks(config_of("llama"))


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config_of("llama"))
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    before = source_digest(str(tmp_path))
    load_block(str(tmp_path), Part(0, 1, embeddings=True))
    with pytest.raises(LolcatsError, match=r"hold NaN or infinity \(model.layers.1.mlp.up_proj.weight\)"):
        load_block(str(tmp_path), Part(1, 2))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.down" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    load_block(str(tmp_path), Part(0, 1, embeddings=True))
    with pytest.raises(LolcatsError, match=r"1 missing .*layers.2.mlp.down_proj.weight"):
        load_block(str(tmp_path), Part(2, 3))
    assert source_digest(str(tmp_path)) != before
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LolcatsError, match="has no weights"):
        source_digest(str(tmp_path))
