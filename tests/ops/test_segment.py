"""The forward pass by segments: when it is taken, and that it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.mixers import Call, Sizes, build_mixer
from lolcats.ops import HybridSpec

pytest.importorskip("triton")
from lolcats.ops.hybrid.kernels import attention, segment_launch
from lolcats.ops.hybrid.kernels.launch import Context, Operands, Plan, make_plan
from lolcats.ops.hybrid.kernels.segment_launch import NEEDED, SHORTEST, missing_names, refusal

SCRIPT = Path(__file__).with_name("compile_segment.py")
BFLOAT16 = 2.0**-8
PLAIN, WHOLE = HybridSpec(64), Context()
DEVICE = "it needs compute capability 9"
"""The last thing that is asked for: who hears this on a CPU would go by segments on the right GPU."""
SIZES = Sizes(heads=8, kv_heads=2, head_dim=128, value_dim=128, hidden_size=16)
SETTINGS: dict[str, Any] = {
    "feature_map": "hedgehog", "feature_size": 64, "window": 64, "window_kind": "sliding", "sinks": 0, "fold": 16,
    "state_heads": "query", "decay": "none",
}  # fmt: skip
"""Of a layer `hybrid` that goes by segments."""


def operands(
    n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, map_heads: int = 4, size: int = 128, device: str = "cpu"
) -> Operands:
    """Random tokens in the layout of a layer, maps of 64 columns and parameters of all heads."""
    generator = torch.Generator(device).manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v = (normal(batch, n, h, size).bfloat16().transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    map_q, map_k = ((normal(h, size, 64) / 5).bfloat16() for h in (heads, map_heads))
    return Operands(q, k, v, map_q, map_k, normal(heads), factor=normal(heads) / 4)


def planned(x: Operands, spec: HybridSpec = PLAIN, kind: str = "hedgehog", c: Context = WHOLE) -> Plan:
    return make_plan(x, c, spec, kind)


def test_what_is_taken_but_for_the_device() -> None:
    x = operands(SHORTEST, 3)
    assert refusal(planned(x), x, WHOLE) == DEVICE
    x = operands(SHORTEST, map_heads=2)._replace(factor=None)
    for kind in ("sliding", "terraced"):
        assert refusal(planned(x, HybridSpec(64, kind, scale=0.1, fold=16)), x, WHOLE) == DEVICE


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("bfloat16", {"v": torch.zeros(1, 2, SHORTEST, 128, dtype=torch.float16)}),
        ("128 numbers", {"v": torch.zeros(1, 2, SHORTEST, 64, dtype=torch.bfloat16)}),
        ("64 columns", {"map_q": torch.zeros(4, 128, 32), "map_k": torch.zeros(4, 128, 32)}),
        ("no sinks", {"sink_logits": torch.zeros(4)}),
        ("no decay", {"log_decay": torch.zeros(1, 4, SHORTEST)}),
        ("copy engine", {"k": torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16).expand(1, 2, SHORTEST, 128)}),
    ],
)
def test_tensors_that_are_refused(reason: str, change: dict[str, Tensor]) -> None:
    x = operands(SHORTEST)._replace(**change)
    assert reason in (refusal(planned(x), x, WHOLE) or "")


@pytest.mark.parametrize(
    ("reason", "spec"),
    [
        ("window of 64", HybridSpec(65)),
        ("window of 64", HybridSpec(128, "terraced")),
        ("no sinks", HybridSpec(64, sinks=1)),
        ("no softcap", HybridSpec(64, softcap=5.0)),
        ("scale above 0", HybridSpec(64, scale=0.0)),
    ],
)
def test_settings_that_are_refused(reason: str, spec: HybridSpec) -> None:
    x = operands(SHORTEST)
    assert reason in (refusal(planned(x, spec), x, WHOLE) or "")


def test_calls_that_are_refused() -> None:
    x = operands(SHORTEST - 1)
    assert f"{SHORTEST} tokens" in (refusal(planned(x), x, WHOLE) or "")
    x = operands(SHORTEST)
    assert "hedgehog" in (refusal(planned(x, kind="t2r"), x, WHOLE) or "")
    rows = Context(torch.tensor([[0, 0, SHORTEST, 0]], dtype=torch.int32))
    initial = Context(initial=torch.zeros(1, 4, 128 * 129))
    for context in (rows, initial):
        assert "no state before" in (refusal(planned(x, c=context), x, context) or "")


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What is said to the calls of real layers, which are short here."""
    said: list[str | None] = []

    def noted(p: Plan, x: Operands, c: Context) -> str | None:
        said.append(refusal(p, x, c))
        return said[-1]

    monkeypatch.setattr(segment_launch, "SHORTEST", 65)
    monkeypatch.setattr(attention, "segment_refusal", noted)
    return said


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels on the CPU, interpreted")


@interpreted
@torch.no_grad()
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, DEVICE),
        ({"state_heads": "kv"}, DEVICE),
        ({"window_kind": "terraced"}, DEVICE),
        ({"feature_size": None}, "64 columns"),  # as many as a head has numbers
        ({"decay": "gate"}, "no decay"),
    ],
    ids=str,
)
def test_what_a_layer_hands_over(reasons: list[str | None], change: dict[str, Any], reason: str, keep: bool) -> None:
    x = operands(70, 1, SIZES.heads, SIZES.kv_heads)
    mixer = build_mixer("hybrid", SIZES, impl="triton", **SETTINGS | change)
    mixer(Call(x.q, x.k, x.v, x.q.new_zeros(1, 70, 16), 128**-0.5), keep=keep)
    assert len(reasons) == 1
    assert reason in (reasons[0] or "")


@interpreted
def test_what_a_model_hands_over(
    reasons: list[str | None], make_teacher: Callable[..., Any], make_student: Callable[..., Any], tokens: Any
) -> None:
    """The prompt of a text, with a mask that hides nothing."""
    teacher = make_teacher(num_attention_heads=2, num_key_value_heads=1, head_dim=128).bfloat16()
    student = make_student(teacher, mixer="hybrid", impl="triton", **SETTINGS)
    ids = tokens(1, 70)
    student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert reasons == [DEVICE] * 3


def test_this_triton_has_all_names() -> None:
    assert not missing_names(NEEDED)


def test_names_that_are_missing_are_told() -> None:
    language = "triton.experimental.gluon.language"
    needed = {language: "warp_specialize(x,y) barrier|fence nothing|none gluon.x", "triton.nowhere": "x"}
    assert missing_names(needed) == ["warp_specialize(x,y)", "nothing|none", "gluon.x", "triton.nowhere"]


@pytest.mark.parametrize(("segments", "split"), [(3, 2), (2, 5), (1, 2)])
def test_states_before_segments(segments: int, split: int) -> None:
    """Sums of pieces are added up; on a CPU by Triton's interpreter."""
    from lolcats.ops.hybrid.kernels.segment import scan_pieces

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.randn(2, segments - 1, split, 128 * 129, device=device)
    before = torch.full((2, segments, 128 * 128), torch.nan, dtype=torch.bfloat16, device=device)
    before_sum = torch.full((2, segments, 128), torch.nan, device=device)
    segment_launch.on(scan_pieces, (2, 33))(sums, before, before_sum, segments, split, MOST=5, BLOCK=512)
    want = torch.cat([torch.zeros(2, 1, 128 * 129, device=device), sums.sum(2)], 1).cumsum(1)
    torch.testing.assert_close(before.float(), want[..., : 128 * 128], rtol=2 * BFLOAT16, atol=1e-5)
    torch.testing.assert_close(before_sum, want[..., 128 * 128 :], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]
