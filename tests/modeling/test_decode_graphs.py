"""Decoding by recordings gives what decoding step by step gives; here a stand-in takes the place of CUDA graphs."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

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
    padded,
    read,
    run_again,
    step,
    with_stand_in,
)
from lolcats import LolcatsError, attention_mode
from lolcats.mixers import state_tensors
from lolcats.modeling import decode_graphs, fused_prompts
from lolcats.modeling.decode_graphs import KEPT, graphs_of
from lolcats.modeling.head import relative_error, tolerance

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")
CLOSE = 1e-5
FORBIDDEN = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount",
    "lift_fresh", "lift_fresh_copy",
}  # fmt: skip


@pytest.fixture
def graphed(make_student: Students) -> Students:
    """A student that decodes by the stand-in."""

    def make(model: Any = None, **settings: Any) -> Any:
        student = make_student(model, **settings)
        with_stand_in(student)
        return student

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_texts_are_the_same(graphed: Students, tokens: Tokens, name: str) -> None:
    check_texts(graphed(**SETTINGS[name]), tokens, CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_interpreter")
@pytest.mark.parametrize("name", ["sliding", "bytes"])
def test_kernels_that_work_in_place_do_so_in_the_buffers(
    make_teacher: Students, graphed: Students, tokens: Tokens, name: str
) -> None:
    pytest.importorskip("triton")
    student, ids = graphed(make_teacher(num_hidden_layers=1), **SETTINGS[name], impl="triton"), tokens(1, 9)
    want = eager(student, lambda: forced(student, ids, 6))
    assert_close(forced(student, ids, 6), want, CLOSE)
    assert graphs_of(student).replays == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["terraced", "heads"])
def test_texts_take_turns(graphed: Students, tokens: Tokens, name: str) -> None:
    check_interleaved(graphed(**SETTINGS[name]), tokens, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sliding", "kept"])
def test_rows_move_between_steps(graphed: Students, tokens: Tokens, name: str) -> None:
    check_rows_move(graphed(**SETTINGS[name]), tokens, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}, {"num_return_sequences": 2, "do_sample": True}],
    ids=str,
)
def test_generate_writes_the_same(graphed: Students, tokens: Tokens, options: dict[str, Any]) -> None:
    check_generated(graphed(**SETTINGS["kept"]), tokens, (3, 1), 9, {"max_new_tokens": 6, **options})


@pytest.mark.slow
def test_beyond_the_context_sinks_are_seen_from_its_end(graphed: Students, tokens: Tokens) -> None:
    check_beyond_context(graphed(**SETTINGS["kept"]), tokens, CLOSE)


@pytest.mark.slow
def test_a_saved_state_goes_on(graphed: Students, tokens: Tokens, tmp_path: Path) -> None:
    student, ids = graphed(**SETTINGS["heads"]), tokens(2, 24)
    want = eager(student, lambda: forced(student, ids, 8))
    cache = read(student, ids[:, :8])
    for at in range(8, 14):
        step(student, ids[:, at : at + 1], cache)
    lolcats.save_state(cache, tmp_path / "state", student)
    forced(student, tokens(2, 14, 5), 8)  # another text has the buffers
    for going_on in (lolcats.load_state(tmp_path / "state", student), cache):
        for at in range(14, 20):
            assert_close(step(student, ids[:, at : at + 1], going_on), want[:, at - 8], CLOSE)


def test_counts_are_those_of_eager_steps(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)

    def facts() -> list[Any]:
        cache = read(student, ids[:, :8], padded(ids[:, :8]))
        for at in range(8, 12):
            step(student, ids[:, at : at + 1], cache, padded(ids[:, :8]))
        with pytest.raises(LolcatsError, match="crop"):
            cache.crop(-1)
        return [(layer.seen, layer.passes, layer.whole, layer.state.length.tolist()) for layer in cache.layers]

    assert facts() == eager(student, facts)
    assert graphs_of(student).replays == 3


@pytest.mark.parametrize("change", ["hidden", "gap", "short", "two"])
def test_masks_are_judged_as_ever(graphed: Students, tokens: Tokens, change: str) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    mask = torch.ones_like(ids[:, :14])
    cache = read(student, ids[:, :10])
    for at in range(10, 13):
        step(student, ids[:, at : at + 1], cache)
    replays = graphs_of(student).replays
    if change == "hidden":
        mask[1, 2] = 0
    elif change == "two":
        mask[1, 13] = 2
    elif change == "short":
        mask = mask[:, 1:]
    else:  # a row whose new token is padding: it runs as ever
        mask[0, 13] = 0
        student(ids[:, 13:14], attention_mask=mask, past_key_values=cache)
        assert cache.layers[0].state.length.tolist() == [13, 14]
        assert graphs_of(student).replays == replays
        return
    with pytest.raises(LolcatsError, match="mask"):
        student(ids[:, 13:14], attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 13


def test_without_a_mask_padding_is_missed(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    forced(student, ids, 10)
    cache = read(student, ids[:, :10], padded(ids[:, :10]))
    with pytest.raises(LolcatsError, match="padding"):
        step(student, ids[:, 10:11], cache)


@pytest.mark.slow
def test_what_changes_the_model_is_noticed(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["kept"]), tokens(2, 14)
    graphs = graphs_of(student)

    def same() -> None:
        """The text by graphs is that of eager steps; the graphs stay."""
        before = graphs.enabled
        graphs.enabled = False
        want = forced(student, ids, 8)
        graphs.enabled = before
        assert_close(forced(student, ids, 8), want, CLOSE)

    same()
    with attention_mode(student, "window_only"):
        same()
    replays = graphs.replays
    same()
    assert graphs.replays == replays + 6, "the first recording is still of use"
    weight = student.model.layers[1].mlp.down_proj.weight
    weight.mul_(1.5)  # in place: the recording reads it
    same()
    weight.data = weight.data * 0.5
    same()
    student.model.layers[0] = copy.deepcopy(student.model.layers[2])
    student.model.layers[0].self_attn.inner.layer_idx = 0
    same()
    assert graphs.replays > replays + 18
    assert len(graphs.recordings) == KEPT


def test_hooks_are_run(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(1, 20)
    forced(student, ids, 8)
    seen: list[int] = []
    places = [student.model.layers[1], student.lm_head, student.model]
    for place in places:
        seen.clear()
        hook = place.register_forward_hook(lambda *_: seen.append(1))
        forced(student, ids, 8)
        hook.remove()
        assert len(seen) == 13
    seen.clear()
    replays = graphs_of(student).replays
    with student.register_forward_hook(lambda *_: seen.append(1)):  # of the whole model: around a replay too
        forced(student, ids, 8)
    assert (len(seen), graphs_of(student).replays) == (13, replays + 12)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": False},
        {"return_dict": False},
        {"labels": torch.tensor([[3], [4]])},
        {"logits_to_keep": torch.tensor([0])},
        {"position_ids": torch.tensor([[[8], [8]]])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_calls_are_left_to_python(graphed: Students, tokens: Tokens, options: dict[str, Any]) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 12)
    forced(student, ids, 8)
    replays = graphs_of(student).replays
    cache = read(student, ids[:, :8])
    if options.keys() == {"position_ids"}:
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            student(ids[:, 8:9], past_key_values=cache, **options)
    else:
        student(ids[:, 8:9], past_key_values=cache, **options)
    assert graphs_of(student).replays == replays


@pytest.mark.parametrize("layers", [[1], [0, 2]], ids=str)
def test_softmax_layers_are_left_to_python(graphed: Students, tokens: Tokens, layers: list[int]) -> None:
    student, ids = graphed(window=4, layers=layers), tokens(2, 16)
    assert_close(forced(student, ids, 8), student(ids).logits[:, 8:], 1e-4)
    assert graphs_of(student).replays == 0


def test_gradients_and_training_are_left_to_python(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    forced(student, ids, 8)
    replays, cache = graphs_of(student).replays, read(student, ids[:, :8])
    with torch.enable_grad():
        assert step(student, ids[:, 8:9], cache).requires_grad
    student.train()
    step(student, ids[:, 9:10], cache)
    assert graphs_of(student).replays == replays


@pytest.mark.slow
def test_inference_mode_and_no_grad_take_turns(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["kept"]), tokens(2, 20)
    want = eager(student, lambda: forced(student, ids, 8))
    with torch.inference_mode():
        assert_close(forced(student, ids, 8), want, CLOSE)
    assert_close(forced(student, ids, 8), want, CLOSE)
    with torch.inference_mode():
        assert_close(forced(student, ids, 8), want, CLOSE)


def test_switched_off_nothing_is_replayed(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    want, graphs = forced(student, ids, 8), graphs_of(student)
    cache = read(student, ids[:, :8])
    steps = [step(student, ids[:, at : at + 1], cache) for at in range(8, 12)]
    lolcats.set_decode_graphs(student, False)
    replays = graphs.replays
    assert not graphs.recordings
    steps += [step(student, ids[:, at : at + 1], cache) for at in range(12, 16)]  # the text goes on from the buffers
    assert_close(torch.stack(steps, 1), want, CLOSE)
    assert graphs.replays == replays
    with pytest.raises(LolcatsError, match="linearized"):
        lolcats.set_decode_graphs(student.lm_head, False)


def test_copies_of_a_model_record_for_themselves(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    want = forced(student, ids, 8)
    lolcats.set_decode_graphs(student, False)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert not graphs_of(other).enabled
        lolcats.set_decode_graphs(other, True)
        other.lm_head.weight.mul_(2)
        assert_close(forced(other, ids, 8), 2 * want, CLOSE)
        assert graphs_of(other).replays
        assert not graphs_of(student).recordings


@pytest.mark.slow
def test_threads_do_not_share_buffers(graphed: Students, tokens: Tokens) -> None:
    student = graphed(**SETTINGS["kept"])
    texts = [tokens(1, 24, seed) for seed in range(3)]
    want = eager(student, lambda: [forced(student, ids, 8) for ids in texts])
    got: list[Tensor | None] = [None] * 3
    start = threading.Barrier(3)

    def run(number: int) -> None:
        with torch.no_grad():
            start.wait()
            got[number] = forced(student, texts[number], 8)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(got, want, strict=True):
        assert ours is not None
        assert_close(ours, expected, CLOSE)


def test_a_text_of_another_thread_keeps_the_buffers(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(1, 20)
    cache = read(student, ids[:, :8])
    for at in range(8, 11):
        step(student, ids[:, at : at + 1], cache)
    states = [layer.state for layer in cache.layers]

    def run() -> None:
        with torch.no_grad():
            forced(student, tokens(1, 20, 4), 8)

    other = threading.Thread(target=run)
    other.start()
    other.join()
    assert all(layer.state is state for layer, state in zip(cache.layers, states, strict=True))
    assert len(graphs_of(student).recordings) == 2


def test_what_cannot_be_recorded_runs_as_ever(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    want = eager(student, lambda: forced(student, ids, 8))
    graphs = graphs_of(student)

    def refuse(_step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs.record = refuse
    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower: operation not permitted when stream"):
        got = forced(student, ids, 8)
    assert torch.equal(got, want)
    assert torch.equal(forced(student, ids, 8), want)  # and does not try again
    graphs.record = run_again
    graphs.clear()
    assert_close(forced(student, ids, 8), want, CLOSE)
    assert graphs.replays


@pytest.mark.parametrize("forgets", ["everything", "states"])
def test_a_recording_that_is_wrong_is_not_used(graphed: Students, tokens: Tokens, forgets: str) -> None:
    student, ids = graphed(**SETTINGS["kept"]), tokens(2, 16)
    want = eager(student, lambda: forced(student, ids, 8))
    graphs = graphs_of(student)

    def record(run: Any) -> Any:
        output, again = run_again(run)

        def replay() -> None:
            held = [tensor.clone() for tensor in buffers]
            again()
            for tensor, old in zip(buffers, held, strict=True):
                tensor.copy_(old)

        # What a step writes to, found as the tensors of the recording that is being made.
        frame = run.__closure__ and next(c.cell_contents for c in run.__closure__ if hasattr(c.cell_contents, "states"))
        buffers = [tensor for state in frame.states for tensor in state_tensors(state)]
        return output, (lambda: None) if forgets == "everything" else replay

    graphs.record = record
    with pytest.warns(UserWarning, match="the recorded step is off by"):
        got = forced(student, ids, 8)
    assert torch.equal(got, want) and not graphs.recordings


class _Rounded:
    """Forward of a norm that rounds otherwise."""

    def __init__(self, own: Any, size: float) -> None:
        self.own, self.size = own, size

    def __call__(self, x: Tensor) -> Tensor:
        y = type(self.own).forward(self.own, x).float()
        ones = torch.ones_like(y).copysign(torch.arange(y.shape[-1]) % 2 - 0.5)
        return (y * (1 + self.size * ones)).to(x.dtype)


@pytest.mark.parametrize(("size", "taken"), [(2.0**-8, True), (0.3, False)])
def test_fused_kernels_may_round_otherwise_but_not_more(
    graphed: Students, make_teacher: Students, tokens: Tokens, monkeypatch: Any, size: float, taken: bool
) -> None:
    """One rounding of each norm is more than a whole model of many layers may move otherwise."""
    teacher = make_teacher(num_hidden_layers=24, initializer_range=0.2).to(torch.bfloat16)
    student, ids = graphed(teacher, **SETTINGS["sliding"]), tokens(2, 16)

    def other(model: Any, _device: Any) -> Any:
        copied = copy.deepcopy(model)
        for module in copied.modules():
            if type(module).__name__.endswith("RMSNorm"):
                vars(module)["forward"] = _Rounded(module, size)
        return copied

    monkeypatch.setattr(decode_graphs, "fused_copy", other)
    monkeypatch.setattr(fused_prompts, "fused_copy", lambda *_: None)
    graphs_of(student).fuses = True
    want = eager(student, lambda: forced(student, ids, 8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = forced(student, ids, 8)
    (recording,) = graphs_of(student).recordings
    errors = [relative_error(x, y) for x, y in zip(got.unbind(1), want.unbind(1), strict=True)]
    assert recording.is_fused == taken and graphs_of(student).replays
    if taken:
        assert max(errors) > tolerance(torch.bfloat16), "the case is none"
    else:
        assert max(errors) <= tolerance(torch.bfloat16)
        assert "without fused kernels: the step of fused kernels is off by" in str(said[0].message)


def test_a_step_that_counts_in_python_is_not_recorded(graphed: Students, tokens: Tokens) -> None:
    student, ids = graphed(**SETTINGS["sliding"]), tokens(2, 16)
    rotary = student.model.rotary_emb
    own = type(rotary).forward

    class Counting(type(rotary)):
        """Angles by a number of the cache, as families with tables of positions may have them."""

        cache: Any = None

        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            return own(self, x, torch.full_like(position_ids, self.cache.get_seq_length()))

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        Counting.cache = kwargs["past_key_values"]

    rotary.__class__ = Counting
    note.__module__ = "transformers.utils.output_capturing"  # taken for one of those that do nothing
    student.model.register_forward_pre_hook(note, with_kwargs=True)
    cache = DynamicCache(config=student.config)
    student(ids[:, :8], past_key_values=cache)
    with pytest.warns(UserWarning, match="depends on numbers"):
        for at in range(8, 12):
            step(student, ids[:, at : at + 1], cache)
    assert graphs_of(student).replays == 0


class _Watch(TorchDispatchMode):
    """Finds what a CUDA graph cannot hold: questions to the device, sizes that depend on values, copies from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [x for x in (args[1] or ()) if isinstance(x, Tensor)] if name in ("index", "index_put_") else []
        if name in FORBIDDEN or any(x.dtype == torch.bool for x in masks):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_asks_the_device_for_nothing(graphed: Students, tokens: Tokens, name: str) -> None:
    student, ids, watch = graphed(**SETTINGS[name]), tokens(2, 12), _Watch()

    def record(step: Any) -> Any:
        with watch:
            step()
        return run_again(step)

    graphs_of(student).record = record
    forced(student, ids, 8)
    assert graphs_of(student).replays == 3
    assert not watch.found
    with watch:  # it does find them
        assert bool(ids.any()) and len(ids[ids > 0]) and len(torch.tensor([1]))
    assert len(watch.found) == 3
