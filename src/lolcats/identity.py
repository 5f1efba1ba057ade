"""What something is, whatever it is called: digests of settings, tokenizers and weights.

Everything that is kept on disk to be found again (tokens, answers, checkpoints) is kept under one of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lolcats.placing import main_device, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 64
"""Numbers of each weight that `weights_digest` looks at, spread evenly."""
PIECE = 1 << 22
"""Numbers of a tensor that are hashed at a time; bounds the memory for their 64-bit copies."""
NOT_COMPUTING = frozenset(
    ["_name_or_path", "transformers_version", "architectures", "dtype", "impl", "use_cache", "output_attentions",
     "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "bos_token_id", "eos_token_id"]
)  # fmt: skip
"""Settings of a model that its outputs do not depend on, or that are known from its weights (`dtype`)."""


def digest(value: object) -> str:
    """A short name for a JSON value: equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def key_of(*parts: object) -> str:
    """A name for values that JSON can spell, others by their text."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, where the tokenizer itself puts one before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and tokenizer("a", verbose=False)["input_ids"][0] == bos else []


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, template: str = "raw") -> dict[str, Any]:
    """What the tokens of a text depend on: digests of the vocabulary and its rules, and the special tokens used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        rules.update(padding=None, truncation=None)  # these change with the last call
    identity = {"digest": digest(rules), "eos": tokenizer.eos_token_id, "begin": begin_ids(tokenizer)}
    if template == "chat":
        identity["chat_template"] = digest(tokenizer.chat_template)
    return identity


@torch.no_grad()
def weights_digest(weights: Iterable[tuple[str, Tensor]], gather: Callable[[Tensor], Tensor] = lambda w: w) -> str:
    """Digest of names, shapes and some numbers of weights, in a moment; the same on every device and after exact casts.

    What training goes on from is compared by it: there, weights that differ differ everywhere.

    Args:
        weights: by name.
        gather: makes a weight that is spread over processes whole, one at a time.
    """
    return samples_digest({name: weight_sample(name, gather(weight.detach())) for name, weight in weights})


@torch.no_grad()
def weight_sample(name: str, weight: Tensor) -> bytes:
    """What `weights_digest` looks at of one weight."""
    flat = weight.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // SAMPLES)][: SAMPLES + 1].to("cpu", torch.float32)
    return f"{name} {tuple(weight.shape)} ".encode() + some.numpy().tobytes()


def samples_digest(samples: Mapping[str, bytes]) -> str:
    """The digest of weights from their samples by name, which may have been taken one after the other."""
    found = hashlib.sha256()
    for name in sorted(samples):
        found.update(samples[name])
    return found.hexdigest()


@torch.no_grad()
def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all of a model's weights, its settings, device and number format, and of its tokenizer.

    Sums of the bits as integers, which come out the same in whatever order a device adds; not proof against forgery.
    """
    weights = _weights_of(stored_tensors(model))
    settings = model.config.to_json_string(use_diff=False)
    words = [tokenizer_identity(tokenizer, "chat"), tokenizer.special_tokens_map]
    return key_of(weights, settings, main_device(model).type, words)


@torch.no_grad()
def network_identity(model: PreTrainedModel) -> str:
    """A hash of what a model makes of token ids: its weights, their number format and its settings.

    The same on every device, and before and after `save_pretrained`. As of `model_identity`, no proof against forgery.
    """
    kept = model.state_dict().keys()  # without frequencies of rotary embeddings, which may change with the text
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
    return key_of(_weights_of([*model.named_parameters(), *buffers]), _computing(model.config.to_dict()))


def _weights_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[Any]]:
    return {name: [str(tensor.dtype), list(tensor.shape), *_bit_sums(tensor)] for name, tensor in tensors}


def _computing(settings: Any) -> Any:
    """A config without what says nothing of how a model computes, at any depth."""
    if not isinstance(settings, dict):
        return settings
    return {str(key): _computing(value) for key, value in sorted(settings.items(), key=str) if key not in NOT_COMPUTING}


def _bit_sums(tensor: Tensor) -> list[int]:
    """Two sums of the raw bits as integers: one weighted by place, one of squares; 64-bit, so they may wrap."""
    if tensor.numel() == 0 or tensor.is_meta:
        return [0, 0]
    bits = tensor.detach().contiguous().flatten()
    if bits.dtype == torch.bool:
        bits = bits.to(torch.uint8)
    if bits.is_floating_point():
        bits = bits.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[bits.element_size()])
    first = second = 0
    for piece in bits.split(PIECE):
        wide = piece.to(torch.int64)
        place = torch.arange(1, len(wide) + 1, device=wide.device)
        first += int((wide * place).sum())
        second += int((wide * wide).sum())
    return [first, second]
