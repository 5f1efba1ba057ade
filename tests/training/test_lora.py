"""Which linear layers get adapters where those of queries and keys are left out (tests/modeling has all families)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lolcats import LolcatsError
from lolcats.config import FinetuneConfig
from lolcats.training import FinetuneStage, lora

Students = Callable[..., Any]


def test_no_qk_leaves_out_queries_and_keys_of_all_layers(make_student: Students) -> None:
    """Of those too that keep softmax attention."""
    stage = FinetuneStage(make_student(window=4, layers=[1]), FinetuneConfig(rank=2, targets="no_qk"))
    modules = {name.partition(".lora_")[0].replace(".inner", "") for name in stage.parameters()}
    names = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert modules == {f"model.layers.{i}.{name}" for i in range(3) for name in names}


@pytest.mark.parametrize("known", [set(), {"q_proj"}], ids=str)
def test_unknown_names_of_queries_and_keys_are_refused(
    make_student: Students, monkeypatch: pytest.MonkeyPatch, known: set[str]
) -> None:
    monkeypatch.setattr(lora, "QUERIES_AND_KEYS", known)
    with pytest.raises(LolcatsError, match=r"make queries and keys is not known; name those .*'v_proj'") as error:
        lora.check_lora(make_student(window=4), FinetuneConfig(targets="no_qk"))
    assert "\n" not in str(error.value)
