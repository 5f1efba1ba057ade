"""The comparisons of test_decode_graphs.py with CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lolcats
from decode_cases import (
    SETTINGS,
    assert_close,
    check_beyond_context,
    check_generated,
    check_interleaved,
    check_rows_move,
    check_texts,
    eager,
    forced,
    read,
    step,
)
from lolcats.modeling import attention_mode
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.fused import Fused, fused_copy
from lolcats.modeling.fused_prompts import prompts_of
from lolcats.modeling.fused_rotary import NAME
from lolcats.modeling.head import tolerance

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_gradients")]
DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3**0.5 * tolerance(torch.bfloat16)}
"""Kernels with and without padding, and products for batches of other sizes, add up in other orders; fused kernels
round otherwise in each of three layers."""


@pytest.fixture
def graphed(make_student: Students) -> Students:
    """A student on the GPU."""

    def make(dtype: torch.dtype, **settings: Any) -> Any:
        return make_student(**settings).to("cuda", dtype)

    return make


@pytest.fixture
def ids_of(tokens: Tokens) -> Tokens:
    """Tokens on the GPU."""
    return lambda *args, **kwargs: tokens(*args, **kwargs).cuda()


@pytest.fixture(autouse=True)
def _whole_products() -> Iterator[None]:
    """float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_texts_are_the_same(graphed: Students, ids_of: Tokens, name: str, dtype: torch.dtype) -> None:
    check_texts(graphed(dtype, **SETTINGS[name]), ids_of, CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["terraced", "kept", "heads"])
def test_texts_take_turns(graphed: Students, ids_of: Tokens, name: str, dtype: torch.dtype) -> None:
    check_interleaved(graphed(dtype, **SETTINGS[name]), ids_of, CLOSE[dtype])


@pytest.mark.parametrize("name", ["sliding", "kept", "heads"])
def test_rows_move_between_steps(graphed: Students, ids_of: Tokens, name: str) -> None:
    check_rows_move(graphed(torch.float32, **SETTINGS[name]), ids_of, CLOSE[torch.float32])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("name", ["sliding", "heads"])
def test_generate_writes_the_same(graphed: Students, ids_of: Tokens, name: str, options: dict[str, Any]) -> None:
    student = graphed(torch.float32, **SETTINGS[name])
    check_generated(student, ids_of, (3, 1, 3), 40, {"max_new_tokens": 24, **options})


@pytest.mark.parametrize("name", ["sliding", "heads"])
def test_a_replay_is_a_replay(graphed: Students, ids_of: Tokens, name: str) -> None:
    """No kernel is launched by Python's way through the layers: their forward is not called."""
    student, ids = graphed(torch.bfloat16, **SETTINGS[name]), ids_of(1, 40)
    forced(student, ids, 8)
    cache = read(student, ids[:, :8])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for at in range(8, 28):
            step(student, ids[:, at : at + 1], cache)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("aten::copy_", 0) >= 40, "of tokens and positions"
    assert calls.get("aten::linear", 0) == 0, f"aten::linear ran {calls['aten::linear']} times in 20 steps"


def test_beyond_the_context_sinks_are_seen_from_its_end(graphed: Students, ids_of: Tokens) -> None:
    check_beyond_context(graphed(torch.float32, **SETTINGS["kept"]), ids_of, CLOSE[torch.float32])


def test_modes_and_weights_are_noticed(graphed: Students, ids_of: Tokens) -> None:
    student, ids = graphed(torch.float32, **SETTINGS["kept"]), ids_of(2, 20)

    def same() -> None:
        graphs = graphs_of(student)
        graphs.enabled = False
        want = forced(student, ids, 8)
        graphs.enabled = True
        assert_close(forced(student, ids, 8), want, CLOSE[torch.float32])

    same()
    with attention_mode(student, "window_only"):
        same()
    student.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    same()
    student.to("cpu").to("cuda")
    same()
    assert graphs_of(student).replays > 40


def test_a_recording_gives_its_memory_back(graphed: Students, ids_of: Tokens) -> None:
    student, ids = graphed(torch.bfloat16, **SETTINGS["kept"]), ids_of(64, 20)
    forced(student, ids, 8)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    lolcats.set_decode_graphs(student, False)
    assert torch.cuda.memory_allocated() < held


def test_threads_and_streams(graphed: Students, ids_of: Tokens) -> None:
    student = graphed(torch.float32, **SETTINGS["kept"])
    texts = [ids_of(1, 40, seed) for seed in range(4)]
    want = eager(student, lambda: [forced(student, ids, 8) for ids in texts])
    got: dict[int, Tensor] = {}
    torch.cuda.synchronize()

    def run(number: int) -> None:
        stream = torch.cuda.Stream() if number % 2 else torch.cuda.current_stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            got[number] = forced(student, texts[number], 8)
        stream.synchronize()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(want):
        assert number in got, f"thread {number} failed"
        assert_close(got[number], expected, CLOSE[torch.float32])


@pytest.mark.parametrize("recipe", ["recommended", "hybrid"])
def test_a_model_of_usual_sizes(make_teacher: Students, ids_of: Tokens, recipe: str) -> None:
    """Heads of 64 as in SmolLM2, the layer of a recipe, bfloat16, and more tokens than a window holds."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    teacher = make_teacher(**sizes, head_dim=64, initializer_range=0.05).to("cuda", torch.bfloat16)
    student = lolcats.convert(teacher, lolcats.load_config(recipe).linearization, input_ids=ids_of(2, 1024))
    check_texts(student, ids_of, CLOSE[torch.bfloat16])
    ids = ids_of(2, 700)
    want = eager(student, lambda: forced(student, ids, 640))
    assert_close(forced(student, ids, 640), want, CLOSE[torch.bfloat16])
    assert [graph.is_fused for graph in graphs_of(student).recordings] == [True]
    begin = prompts_of(student).read
    again = [student(ids).logits for _ in range(2)]
    assert torch.equal(*again) and prompts_of(student).read == begin + 2
    assert_close(again[0], eager(student, lambda: student(ids).logits), CLOSE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_kernels_are_found_for_all_norms_and_products(
    make_teacher: Students, ids_of: Tokens, dtype: torch.dtype
) -> None:
    teacher = make_teacher().to("cuda", dtype)
    copied = fused_copy(teacher, torch.device("cuda"))
    assert copied is not None
    assert_close(copied(ids_of(2, 8)).logits, teacher(ids_of(2, 8)).logits, CLOSE[dtype])
    forwards = [vars(module)["forward"] for module in copied.modules() if "forward" in vars(module)]
    found = [forward.found[dtype] for forward in forwards if isinstance(forward, Fused)]
    assert len(found) == 10 and None not in found
    turns = [f.__func__.__globals__[NAME].found.values() for f in forwards if not isinstance(f, Fused)]
    assert len(turns) == 3 and all(set(turn) == {True} for turn in turns)
