"""State: a text may be cut anywhere, padded anywhere and batched with others; what is carried has a constant size."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    CPU_IMPLEMENTATIONS,
    Case,
    Tensors,
    assert_same,
    assert_same_gradients,
    assert_same_state,
    make,
    run,
    state_of,
)
from torch import Tensor

from lolcats.ops import HybridState
from lolcats.ops.hybrid.layout import held_positions, in_order

SLIDING = Case(50, 8, "sliding", sinks=2, decay=True, groups=3, kv_heads=1)
TERRACED = Case(50, 8, "terraced", sinks=2, decay=True, groups=2, kv_heads=2, softcap=1.0, learned=True)
PLAIN = Case(50, 8, "sliding", feature_heads="kv", groups=3)
LINEAR = Case(50, 0, "sliding", feature_heads="kv", groups=2)
WAITING = Case(50, 8, "sliding", sinks=2, decay=True, groups=3, kv_heads=1, softcap=1.0, learned=True, fold=5)
WAITING_LINEAR = Case(50, 0, "sliding", sinks=1, feature_heads="kv", groups=2, fold=4)
CASES = [SLIDING, TERRACED, PLAIN, LINEAR, WAITING, WAITING_LINEAR]
NAMES = ["sliding", "terraced", "plain", "linear", "waiting", "waiting-linear"]


def run_pieces(tensors: Tensors, case: Case, cuts: list[int], impls: list[str]) -> tuple[Tensor, HybridState]:
    """The text in pieces that end at `cuts` and at its end, each piece with its own implementation."""
    state, outputs = None, []
    for (begin, end), impl in zip(itertools.pairwise([0, *cuts, case.n]), itertools.cycle(impls)):
        result = run(tensors.tokens(begin, end), case, impl, initial_state=state, return_state=True)
        state = result.state
        outputs.append(result.out)
    assert state is not None
    return torch.cat(outputs, 2), state


@pytest.mark.slow
@pytest.mark.parametrize("second", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("first", CPU_IMPLEMENTATIONS)
def test_split_is_the_full_pass(first: str, second: str) -> None:
    for case in (SLIDING, TERRACED, WAITING, WAITING_LINEAR):
        tensors = make(case)
        full = run(tensors, case, "reference", return_state=True)
        assert full.state is not None
        for cut in (1, 2, 7, 8, 9, 12, 13, 16, 17, 31, 49):
            out, state = run_pieces(tensors, case, [cut], [first, second])
            assert_same(out, full.out, f"{case.kind}, cut at {cut}")
            assert_same_state(state, full.state, case)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_many_pieces_are_the_full_pass(case: Case) -> None:
    tensors = make(case)
    full = run(tensors, case, "reference", return_state=True)
    assert full.state is not None
    for cuts in ([1, 2, 3], [8, 16, 24, 32, 40, 48], [5, 5 + 17, 40], list(range(1, 50))):
        out, state = run_pieces(tensors, case, cuts, ["chunked", "recurrent", "reference"])
        assert_same(out, full.out, f"cuts {cuts}")
        assert_same_state(state, full.state, case)


def test_split_of_a_text_longer_than_chunks_and_window() -> None:
    for kind, window, fold in (("sliding", 65, 1), ("sliding", 65, 70), ("terraced", 64, 1), ("sliding", 0, 1)):
        case = Case(400, window, kind, sinks=4, decay=True, groups=2, kv_heads=1, batch=1, fold=fold)
        tensors = make(case)
        out, _ = run_pieces(tensors, case, [63, 129, 130, 300], ["chunked"])
        assert_same(out, run(tensors, case, "reference").out, f"{kind} {window} {fold}")


def test_shorter_than_the_sinks() -> None:
    """The state of a text that has not filled its sinks goes on filling them."""
    case = Case(9, 3, sinks=6)
    tensors = make(case)
    want = run(tensors, case, "reference").out
    for impl in CPU_IMPLEMENTATIONS:
        assert_same(run_pieces(tensors, case, [2, 5], [impl])[0], want, impl)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_gradients_flow_through_the_state(impl: str) -> None:
    for case in (SLIDING, TERRACED, WAITING):
        tensors = make(case)
        out, _ = run_pieces(tensors, case, [11, 30], [impl])
        assert_same_gradients(out, run(tensors, case, "reference").out, tensors)


@pytest.mark.parametrize(("kind", "fold"), [("sliding", 1), ("sliding", 9), ("terraced", 1)])
def test_defect_03_prefill_and_decode_windows_agree(kind: str, fold: int) -> None:
    """Each token decoded after a prefill sees exactly the keys that it sees in the full pass."""
    case = Case(40, 6, kind, kv_heads=1, batch=1, fold=fold)
    tensors = make(case)
    full = run(tensors, case, "reference").out
    for cut in range(1, 40):
        state = state_of(tensors.tokens(0, cut), case, "chunked")
        decoded = run(tensors.tokens(cut, cut + 1), case, "recurrent", initial_state=state).out
        assert_same(decoded, full[:, :, cut : cut + 1], f"token {cut}")


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_defect_04_chunked_prefill_keeps_every_key(kind: str) -> None:
    """After pieces of one window each, every key is in the sums or in the window, none in both and none in neither."""
    case = Case(320, 64, kind, sinks=3, feature_heads="kv", kv_heads=1, batch=1)
    tensors = make(case)
    for impl in ("reference", "chunked"):
        out, state = run_pieces(tensors, case, [64, 128, 192, 256], [impl])
        held = held_positions(state.length, case.spec)[:, None, :, None] >= case.sinks
        phi_k = in_order(state.window, state.length).phi_k
        assert phi_k is not None
        in_window = (phi_k * held).sum(2)
        assert_same(state.linear.k_sum + in_window, tensors.phi_k[:, :, case.sinks :].sum(2), impl)
        assert_same(out, run(tensors, case, "reference").out, impl)


def summed_and_held(case: Case) -> tuple[list[int], list[int]]:
    """Tokens in the sums and tokens in the ring after n tokens, one after the other."""
    summed: list[int] = []
    held: list[int] = []
    for i in range(case.n):
        held.append(i)
        if case.kind == "sliding":
            leaving = [j for j in held if j <= i - case.window]
        else:
            leaving = [j for j in held if j // case.window < i // case.window - 1]
        if len(leaving) == (case.fold if case.kind == "sliding" else case.window):
            summed += leaving
            held = [j for j in held if j not in leaving]
    return summed, held


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_keys_wait_for_their_block(impl: str) -> None:
    """After any number of tokens the sums are those of whole blocks, decayed up to their last key; the rest waits."""
    for case in (WAITING, WAITING_LINEAR, TERRACED):
        for n in (1, 7, 8, 9, 12, 13, 14, 17, 18, 24, 25, 33, 50):
            tensors = make(case._replace(n=n))
            state = state_of(tensors, case, impl)
            summed, held = summed_and_held(case._replace(n=n))
            positions = held_positions(state.length, case.spec)[0]
            assert positions[positions >= 0].tolist() == held
            assert_same(in_order(state.window, state.length).k[:, :, positions >= 0], tensors.k[:, :, held])
            k_sum = torch.zeros_like(state.linear.k_sum)
            for j in [j for j in summed if j >= case.sinks]:
                later = 0.0 if tensors.log_decay is None else tensors.log_decay[:, :, j + 1 : len(summed)].sum(-1)
                k_sum = k_sum + tensors.phi_k[:, :, j] * torch.as_tensor(later).exp()[..., None]
            assert_same(state.linear.k_sum, k_sum, f"{n} tokens")


def test_many_equal_keys_are_summed_without_a_drift() -> None:
    """Numbers that are small beside their sum are rounded all the same way; those of a block are added up before."""
    errors = {}
    for fold in (1, 16):
        case = Case(256, 2, feature_heads="kv", kv_heads=1, batch=1, fold=fold)
        tensors = make(case, torch.float32).map(lambda x: torch.full_like(x, 1 / 3))
        state = state_of(tensors.tokens(0, 2), case, "chunked")
        before = 2.0**20 / 3  # as after a million such keys
        state = state._replace(linear=state.linear._replace(k_sum=state.linear.k_sum + before))
        after = run(tensors, case, "recurrent", initial_state=state, return_state=True).state
        assert after is not None
        growth = 256 / 3
        errors[fold] = float((after.linear.k_sum - before).max()) / growth - 1
    assert abs(errors[1]) > 0.03 and abs(errors[16]) < 0.003


def padded_rows(tensors: Tensors, case: Case, lengths: list[int], side: str) -> tuple[Tensors, Tensor]:
    """Row b holds the first lengths[b] tokens, garbage elsewhere; and the mask."""
    parts = []
    for row, length in enumerate(lengths):
        missing = case.n - length
        text = tensors.rows(row, row + 1).tokens(0, length)
        parts.append(text.padded(missing, 0) if side == "left" else text.padded(0, missing))
    joined: Any = [None if xs[0] is None else torch.cat(xs) for xs in zip(*parts, strict=True)]
    index = torch.arange(case.n)
    mask = torch.stack([index >= case.n - m if side == "left" else index < m for m in lengths]).long()
    return Tensors(*joined)._replace(**tensors.per_head()), mask


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_defect_06_padding_changes_nothing(side: str, impl: str) -> None:
    """Outputs, zeros at padding, the state, and the text that goes on after it: as if each row were alone."""
    for case in (SLIDING, TERRACED, WAITING):
        check_padding(case._replace(batch=3), side, impl)


def check_padding(case: Case, side: str, impl: str) -> None:
    tensors, lengths = make(case), [50, 23, 1]
    padded, mask = padded_rows(tensors, case, lengths, side)
    result = run(padded, case, impl, attention_mask=mask, return_state=True)
    assert result.state is not None
    assert result.out[~mask.bool()[:, None].expand(result.out.shape[:3])].abs().max() == 0
    more = make(case._replace(n=5), seed=1)._replace(**tensors.per_head())
    later = run(more, case, impl, initial_state=result.state).out
    for row, length in enumerate(lengths):
        text = tensors.rows(row, row + 1).tokens(0, length)
        alone = run(text, case, impl, return_state=True)
        assert alone.state is not None
        assert_same(result.out[row : row + 1][:, :, mask[row].bool()], alone.out, f"row {row}")
        assert_same_state(result.state.map(lambda t, r=row: t[r : r + 1]), alone.state, case)
        going_on = run(more.rows(row, row + 1), case, impl, initial_state=alone.state).out
        assert_same(later[row : row + 1], going_on, f"row {row}, later")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_padding_in_a_later_piece(impl: str, side: str) -> None:
    """Padding between the tokens of the state and the new ones, longer than a chunk, counts for nothing."""
    for case in (SLIDING, WAITING):
        check_later_padding(case._replace(batch=3), side, impl)


def check_later_padding(case: Case, side: str, impl: str) -> None:
    later, before, after = case._replace(n=150), [50, 23, 9], [70, 150, 2]
    tensors = make(case)
    first, mask = padded_rows(tensors, case, before, "left")
    state = state_of(first, case, impl, attention_mask=mask)
    more = make(later, seed=1)._replace(**tensors.per_head())
    second, mask = padded_rows(more, later, after, side)
    out = run(second, later, impl, attention_mask=mask, initial_state=state).out
    for row in range(3):
        alone = state_of(tensors.rows(row, row + 1).tokens(0, before[row]), case, "reference")
        text = more.rows(row, row + 1).tokens(0, after[row])
        want = run(text, later, "reference", initial_state=alone).out
        real = mask[row].bool()
        assert_same(out[row : row + 1, :, real], want, f"row {row}")
        assert (out[row, :, ~real] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_batch_is_single(impl: str) -> None:
    for case in CASES:
        tensors = make(case)
        batch = run(tensors, case, impl, return_state=True)
        assert batch.state is not None
        for row in range(case.batch):
            single = run(tensors.rows(row, row + 1), case, impl, return_state=True)
            assert single.state is not None
            assert_same(batch.out[row : row + 1], single.out)
            assert_same_state(batch.state.map(lambda t, r=row: t[r : r + 1]), single.state, case)


def test_rows_of_a_state_can_be_reordered() -> None:
    """What beam search does: rows change places, or are copied, between two calls."""
    rows = torch.tensor([1, 1, 0])
    for case in (SLIDING, TERRACED, WAITING):
        case = case._replace(batch=3)
        before = make(case)
        after = make(case._replace(n=6), seed=1)._replace(**before.per_head())
        state = state_of(before, case, "chunked").map(lambda t: t[rows])
        out = run(after, case, "recurrent", initial_state=state).out
        for place, row in enumerate(rows.tolist()):
            alone = state_of(before.rows(row, row + 1), case, "reference")
            want = run(after.rows(place, place + 1), case, "reference", initial_state=alone).out
            assert_same(out[place : place + 1], want)


@pytest.mark.slow
@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_size_does_not_depend_on_length(impl: str) -> None:
    for case in CASES:
        sizes = set()
        for n in (1, 100, 1000 if impl == "chunked" else 300):
            tensors = make(case._replace(n=n, batch=1), torch.float32).to(torch.float32)
            state = state_of(tensors, case, impl)
            behind = sum(t.untyped_storage().nbytes() for t in state.tensors())  # what views keep alive
            sizes.add((state.nbytes, behind))
        assert len(sizes) == 1


def test_nbytes_counts_every_tensor() -> None:
    for case, slots in (SLIDING, 8), (WAITING, 8 + 4):
        state = state_of(make(case, torch.float32).to(torch.float32), case, "chunked")
        batch, size, value, features, heads, sinks = 2, 4, 3, 3, 3, 2
        floats = heads * features * (value + 1) + sinks * (size + value)
        floats += slots * (size + value + heads * features + heads)
        assert state.nbytes == batch * (4 * floats + 8)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_defect_05_sums_are_float32_for_bfloat16_inputs(impl: str) -> None:
    for case in (SLIDING, PLAIN):
        tensors = make(case).to(torch.bfloat16)
        state = state_of(tensors, case, impl)
        later = run(tensors, case, impl, initial_state=state, return_state=True)
        assert later.state is not None
        assert later.out.dtype == torch.bfloat16
        for each in (state, later.state):
            assert {t.dtype for t in each.linear} == {torch.float32}
            assert {each.window.k.dtype, each.window.v.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize(("kind", "slots"), [("sliding", 8), ("terraced", 16)])
def test_defect_08_keys_and_values_are_held_per_key_head(kind: str, slots: int, impl: str) -> None:
    """6 query heads share 2 key heads: the ring, the sinks and one state a key head are not repeated for them."""
    case = Case(30, 8, kind, sinks=2, feature_heads="kv", groups=3)
    state = state_of(make(case), case, impl)
    assert state.sinks is not None
    assert state.window.phi_k is not None
    assert state.window.k.shape == (2, 2, slots, 4)
    assert state.window.v.shape == (2, 2, slots, 3)
    assert state.window.phi_k.shape == (2, 2, slots, 3)
    assert state.sinks.k.shape == (2, 2, 2, 4)
    assert state.linear.kv.shape == (2, 2, 3, 3)
    assert state.linear.k_sum.shape == (2, 2, 3)


def test_initial_state_is_not_changed() -> None:
    for impl in CPU_IMPLEMENTATIONS:
        tensors = make(SLIDING)
        state = state_of(tensors, SLIDING, impl)
        before = [t.clone() for t in state.tensors()]
        run(tensors, SLIDING, impl, initial_state=state, return_state=True)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))


def test_state_only_on_request() -> None:
    assert run(make(PLAIN), PLAIN, "chunked").state is None
