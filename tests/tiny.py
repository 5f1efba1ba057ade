"""The tiny teacher of the tests, its tokenizers and its text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lolcats.modeling import linearized_layers

TEXT = (
    "The river runs through a green valley, and the old mill still turns beside it. A miller lived there with "
    "his daughter, who could count every stone in the wall and every star above it. "
)
SENTENCE = "the cat sat on the mat and looked at the moon while a long river ran through the green valley. "
CHATML = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], size: int = 300, special: tuple[str, ...] = ("<end>",), **settings: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens that ends texts with <end>; `settings` are those of its class."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **settings)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One with a chat template."""
    made = train_tokenizer([SENTENCE], special=("<end>", "<start>"))
    made.chat_template = CHATML
    return made


def save_teacher(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int = 2) -> None:
    """A random Llama and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, initializer_range=0.3, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def perturb(model: PreTrainedModel, amount: float = 0.3) -> PreTrainedModel:
    """Move every added parameter away from its start, so that no test passes by symmetry."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in linearized_layers(model):
            for p in layer.mixer.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * amount)
    return model
