"""The fused decoding step is `hybrid_step`, outputs and states, also on a GPU; on a CPU by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Case, make
from test_kernels import assert_near, map_weights, name_of

from lolcats.ops.hybrid.layout import Inputs, empty_state
from lolcats.ops.hybrid.recurrent import hybrid_step, leaving_keys
from lolcats.ops.types import HybridSpec

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
CASES = [  # few programs, of which the interpreter runs ten a second; long enough for keys to leave where rows pause
    Case(26, 16, kv_heads=1, features=8),
    Case(16, 5, sinks=3, groups=3, feature_heads="kv", features=5, softcap=0.7, learned=True),
    Case(12, 5, decay=True, groups=2, feature_heads="kv", kv_heads=1, size=20, value_size=17, features=6),
    Case(8, 1, sinks=1, groups=2, batch=1, features=3),
    Case(20, 5, "terraced", sinks=3, groups=3, feature_heads="kv", kv_heads=1, features=5, learned=True),
    Case(16, 4, "terraced", decay=True, feature_heads="kv", groups=2, kv_heads=1, size=20, value_size=17, features=6),
    Case(6, 1, "terraced", batch=1, features=3),
]


def scene(case: Case, kind: str, padded: bool) -> Any:
    marks = [pytest.mark.slow] * (case.n > 8)
    return pytest.param(case, kind, padded, marks=marks, id=f"{name_of(case)}-{kind}{'-some rows pause' * padded}")


SCENES = [
    scene(case, kind, (i + j) % 2 == 1) for i, case in enumerate(CASES) for j, kind in enumerate(("hedgehog", "t2r"))
]
"""Every case with either kind of features and with either way of going on."""


@pytest.mark.parametrize(("case", "kind", "padded"), SCENES)
@torch.no_grad()
def test_steps(case: Case, kind: str, padded: bool) -> None:
    from lolcats.ops.hybrid.kernels.decode import decode_step, step_refusal

    tensors = make(case, torch.float32).map(lambda x: x.detach().to(DEVICE))
    maps = map_weights(kind, case, torch.float32)
    maps = maps._replace(
        **{n: x.detach().to(DEVICE) for n, x in zip(maps._fields[1:], maps[1:], strict=True) if x is not None}
    )
    spec = HybridSpec(case.window, case.kind, case.sinks, case.size**-0.5, case.softcap)
    assert step_refusal(tensors.q, tensors.v, maps, spec) is None
    phi_q, phi_k = maps.phi_q(tensors.q), maps.phi_k(tensors.k)
    inputs = Inputs(*tensors[:3], phi_q, phi_k, tensors.window_factor, tensors.log_decay, None, None, None)
    plain = empty_state(inputs, spec)
    plain = plain._replace(window=plain.window._replace(phi_k=None))
    fused = plain.map(lambda t: t.clone())
    addresses = [t.data_ptr() for t in fused.tensors()]
    for i in range(case.n):
        q, k, v, features = (x[:, :, i : i + 1] for x in (*tensors[:3], phi_q))
        decay = None if tensors.log_decay is None else tensors.log_decay[:, :, i : i + 1]
        active = None
        if padded:  # as the model gives it: a column of a wider mask
            active = ((torch.arange(case.batch, device=DEVICE) + i) % 3)[:, None].repeat(1, 4)[:, -1]
        leaving = maps.phi_k(leaving_keys(plain, k, spec))
        if decay is not None:
            leaving = leaving.repeat_interleave(plain.linear.kv.shape[1] // leaving.shape[1], 1)
        rest = (spec, decay, active, tensors.sink_logits)
        want, plain = hybrid_step(q, k, v, features, leaving, tensors.window_factor, plain, *rest)
        got, fused = decode_step(q, k, v, maps, tensors.window_factor, fused, *rest)
        assert_near(got, want.double(), f"output {i}")
        for a, b in zip(fused.tensors(), plain.tensors(), strict=True):
            assert_near(a, b.double(), f"state {i}", 1e-5)
    assert addresses == [t.data_ptr() for t in fused.tensors()]
