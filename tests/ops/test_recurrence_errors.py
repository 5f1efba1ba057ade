"""Each mistake is a ValueError that says what was expected and what came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import zeros

from lolcats.ops import RecurrentState, recurrence, recurrence_step, resolve_recurrence
from lolcats.ops.recurrence import api
from lolcats.ops.recurrence import fla as adapter


def state(*size: int, k_sum: bool = False, rows: int = 2) -> RecurrentState:
    return RecurrentState(zeros(*size), zeros(*size[:3]) if k_sum else None, zeros(rows, dtype=torch.long))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "q of 3 dimensions": ({"q": zeros(2, 4, 6)}, r"q with 4 dimensions.*; got \(2, 4, 6\)"),
    "integers": ({"v": zeros(2, 2, 6, 3, dtype=torch.int)}, r"v of floating point; got torch.int32"),
    "no token": ({"q": zeros(2, 4, 0, 5)}, r"at least one token; got 0"),
    "heads": ({"v": zeros(2, 3, 6, 3)}, r"query heads \(4\) to be a multiple of value heads; got 3"),
    "no value head": ({"v": zeros(2, 0, 6, 3)}, r"multiple of value heads; got 0"),
    "tokens of v": ({"v": zeros(2, 2, 7, 3)}, r"v \(2, 2, 6\) and a value size; got \(2, 2, 7, 3\)"),
    "features of k": ({"k": zeros(2, 2, 6, 4)}, r"k \(2, 4, 6, 5\) or \(2, 2, 6, 5\); got \(2, 2, 6, 4\)"),
    "heads of k": ({"k": zeros(2, 1, 6, 5)}, r"k \(2, 4, 6, 5\) or \(2, 2, 6, 5\); got \(2, 1, 6, 5\)"),
    "decay per query head": (
        {"log_decay": zeros(2, 4, 6)},
        r"log_decay \(2, 2, 6\) or \(2, 2, 6, 5\); got \(2, 4, 6\)",
    ),
    "beta per channel": ({"beta": zeros(2, 2, 6, 5)}, r"beta \(2, 2, 6\); got \(2, 2, 6, 5\)"),
    "beta normalised": ({"beta": zeros(2, 2, 6), "normalised": True}, r"normalised only without beta.*; got both"),
    "mask": ({"attention_mask": zeros(2, 7)}, r"attention_mask \(2, 6\); got \(2, 7\)"),
    "segments": ({"segment_ids": zeros(1, 6)}, r"segment_ids \(2, 6\); got \(1, 6\)"),
    "segments and mask": ({"segment_ids": zeros(2, 6), "attention_mask": zeros(2, 6)}, r"segment_ids without"),
    "segments and state": ({"segment_ids": zeros(2, 6), "return_state": True}, r"segment_ids without.*return_state"),
    "state": ({"initial_state": state(2, 4, 5, 3)}, r"kv \(2, 2, 5, 3\); got \(2, 4, 5, 3\)"),
    "length": ({"initial_state": state(2, 2, 5, 3, rows=1)}, r"length \(2,\); got \(1,\)"),
    "state with k_sum": ({"initial_state": state(2, 2, 5, 3, k_sum=True)}, r"k_sum None.*; got \(2, 2, 5\)"),
    "state without k_sum": (
        {"initial_state": state(2, 2, 5, 3), "normalised": True},
        r"k_sum \(2, 2, 5\), as normalised is True; got None",
    ),
    "state_dtype": ({"state_dtype": torch.int8}, r"state_dtype of floating point, or None; got torch.int8"),
    "implementation": ({"impl": "fast"}, r"'auto', 'reference', 'chunked', 'fla'; got 'fast'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str) -> None:
    change, message = WRONG[name]
    call = {"q": zeros(2, 4, 6, 5), "k": zeros(2, 2, 6, 5), "v": zeros(2, 2, 6, 3)}
    with pytest.raises(ValueError, match=message):
        recurrence(**{**call, **change})


def test_mistakes_of_a_step() -> None:
    q, k, v, before = zeros(2, 4, 1, 5), zeros(2, 2, 1, 5), zeros(2, 2, 1, 3), state(2, 2, 5, 3)
    with pytest.raises(ValueError, match=r"q \[batch, heads, 1, size\]; got \(2, 4, 2, 5\)"):
        recurrence_step(zeros(2, 4, 2, 5), k, v, before)
    with pytest.raises(ValueError, match=r"active \(2,\); got \(3,\)"):
        recurrence_step(q, k, v, before, active=zeros(3))


def test_what_flash_linear_attention_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error where it is asked for, and the chunked form under "auto"."""
    q, k, v = zeros(1, 2, 3, 4), zeros(1, 2, 3, 4), zeros(1, 2, 3, 4)
    monkeypatch.setattr(api, "fla_installed", lambda: False)
    with pytest.raises(ValueError, match=r"which is not installed here: pip install 'lolcats\[fla\]'"):
        recurrence(q, k, v, impl="fla")
    monkeypatch.setattr(api, "fla_installed", lambda: True)
    assert resolve_recurrence("fla") == "fla"
    with pytest.raises(ValueError, match=r"impl 'fla' cannot run this call: .* CUDA device; the tensors are on cpu"):
        recurrence(q, k, v, impl="fla")
    assert recurrence(q, k, v).out.shape == v.shape
    with pytest.raises(ValueError, match=r"impl 'fla' needs chunk_x of fla\.none, which cannot be had here"):
        adapter._imported("fla.none", "chunk_x")


def test_sizes_and_dtypes_of_flash_linear_attention() -> None:
    def reason(features: int = 256, beta: bool = False, dtype: torch.dtype = torch.bfloat16) -> str | None:
        q = SimpleNamespace(device=torch.device("cuda"))
        k, v = SimpleNamespace(shape=(1, 2, 3, features)), SimpleNamespace(dtype=dtype)
        inputs: Any = SimpleNamespace(q=q, k=k, v=v, beta=beta or None)
        return adapter.fla_refusal(inputs)

    assert reason() is reason(beta=True) is reason(257) is None
    assert "at most 256 numbers; got 257" in str(reason(257, beta=True))
    assert "bfloat16 only; got torch.float32" in str(reason(dtype=torch.float32))
