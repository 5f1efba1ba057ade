"""The batch that layers start from, and by which a budget is shared."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lolcats import linearize
from lolcats.config import RunConfig
from lolcats.data import build_datasets
from lolcats.runs.memory_plan import plan_memory
from lolcats.runs.state import start_batch
from lolcats.training import TrainingData

ASKS = ("data.sequence_length=96", "transfer.recall.share=0.2")
SHARED = ("linearization.mixer=blend", "linearization.far=none", "linearization.kept.pairs=5",
          "linearization.budget=heads")  # fmt: skip
Configs = Callable[..., RunConfig]


@pytest.fixture
def make_data(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[RunConfig], TrainingData]:
    def make(config: RunConfig) -> TrainingData:
        return TrainingData(*build_datasets(config.data, tiny_tokenizer, config.seed), tokenizer=tiny_tokenizer)

    return make


def test_every_second_row_asks_where_a_stage_does(make_config: Configs, make_data: Callable[..., Any]) -> None:
    data = make_data(make_config(*ASKS))
    plain = torch.from_numpy(data.train.ids).long()
    assert torch.equal(start_batch(make_config("data.sequence_length=96"), data), plain[:4])
    before = data.train.ids.copy()
    for words in (ASKS, (ASKS[0], "finetune.recall.share=0.1")):
        batch = start_batch(make_config(*words), data)
        assert batch.shape == (4, 96) and batch.dtype == torch.int64
        assert [torch.equal(*rows) for rows in zip(batch, plain, strict=False)] == [True, False, True, False]
        text = "".join(data.tokenizer.batch_decode(batch[1::2]))
        assert any(word in text for word in ("pass key", "dial", "register", "Letters", "letter", "agent", "Ask for"))
    assert np.array_equal(data.train.ids, before), "the data themselves are not written to"
    off = make_config(ASKS[0], "finetune.recall.share=0.1", "finetune.enabled=false")
    assert torch.equal(start_batch(off, data), plain[:4]), "a stage that is not done asks for nothing"


def test_it_depends_on_the_seed_alone(make_config: Configs, make_data: Callable[..., Any]) -> None:
    data = make_data(make_config(*ASKS))

    def batch(*words: str) -> Tensor:
        torch.manual_seed(len(words))
        return start_batch(make_config(*ASKS, *words), data)

    assert torch.equal(batch(), batch("transfer.lr=0.5"))
    assert not torch.equal(batch("seed=1"), batch())
    split = ["linearization.split=[[4, 1], [3, 2]]", *SHARED]
    assert torch.equal(batch(*split), batch()), "of a split that is known already it is the same"
    one = batch("transfer.micro_batch_size=1")
    assert torch.equal(one, batch()[:2]), "there is room for a question"


@pytest.mark.slow
def test_a_plan_and_a_resumed_run_see_the_same(make_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    for name in ("recipe", "memory_plan"):
        module = import_module(f"lolcats.runs.{name}")
        monkeypatch.setattr(module, "start_batch", lambda *given: seen.append(start_batch(*given)) or seen[-1])
    config = make_config(*SHARED, *ASKS, "transfer.recall.gap=2048", "evaluation.controls=[]")
    plan = plan_memory(config).config.linearization.model_dump()["split"]
    split = linearize(config, until="transfer").results().split
    results = linearize(config, resume=True).results()
    assert results.complete and results.split == split == plan
    assert len(seen) == 3 and all(torch.equal(batch, seen[0]) for batch in seen)
