"""A decay so strong that nothing before it counts any more: no NaN, and nothing of it is left."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU_IMPLEMENTATIONS, Case, assert_same, make, run

CUT = 37


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [-1e4, -1e30, -float("inf")])
def test_a_full_decay_begins_a_new_text(decay: float, impl: str) -> None:
    case = Case(90, 0, decay=True, groups=2)
    tensors = make(case)
    assert tensors.log_decay is not None
    log_decay = tensors.log_decay.clone()
    log_decay[:, :, CUT] = decay
    out = run(tensors._replace(log_decay=log_decay), case, impl).out
    assert_same(out[:, :, CUT:], run(tensors.tokens(CUT), case._replace(n=90 - CUT), impl).out, impl)
    assert_same(out[:, :, :CUT], run(tensors.tokens(0, CUT), case._replace(n=CUT), impl).out, impl)


def test_many_full_decays_stay_finite() -> None:
    """Their sum is beyond what float32 adds exactly, and differences of sums are what the chunked form works with."""
    case = Case(300, 9, decay=True)
    tensors = make(case).to(torch.float32)
    log_decay = torch.full_like(tensors.q[..., 0], -1e6)
    outputs = [run(tensors._replace(log_decay=log_decay), case, impl).out for impl in CPU_IMPLEMENTATIONS]
    for out in outputs:
        assert out.isfinite().all()
        torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-4)
