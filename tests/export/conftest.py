"""Finished runs of a tiny teacher, of the kinds whose exports differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats import linearize, load_config
from lolcats.runs.folder import RunFolder

Runs = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> Runs:
    """Make a run with settings, or give the one that was made with them. Not to be changed."""
    place = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "teacher")
    tiny_tokenizer.save_pretrained(place / "teacher")
    (place / "river.txt").write_text(text)
    made: dict[tuple[str, ...], RunFolder] = {}

    def run(*overrides: str) -> RunFolder:
        if overrides not in made:
            settings = [
                f"model={place / 'teacher'}", f"name=run{len(made)}", f"runs_dir={place}", "device=cpu",
                "dtype=float32", "linearization.window=6", "linearization.sinks=2", "linearization.start=matched",
                f"data.sources=[{place / 'river.txt'}]", "data.sequence_length=24", "data.validation_sequences=2",
                "transfer.tokens=192", "transfer.batch_size=4", "finetune.tokens=192", "finetune.batch_size=4",
                "finetune.lr=1e-2", "finetune.warmup_steps=1", "finetune.rank=2", "evaluation.controls=[window_only]",
            ]  # fmt: skip
            with torch.enable_grad():
                made[overrides] = linearize(load_config(None, [*settings, *overrides]))
        return made[overrides]

    return run


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Tokens [2, 20], more than window and sinks."""
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
