"""What decoding by graphs must not change, for the tests with a stand-in on the CPU and those with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

import lolcats
from lolcats.modeling.decode_graphs import DecodeGraphs, graphs_of

SPLIT = [[4, 2], [[2, 0], [5, 3]], [[3, 1], [6, 1]]]
SETTINGS: dict[str, dict[str, Any]] = {
    "sliding": {"window": 5, "sinks": 2, "fold": 3},
    "terraced": {"window": 4, "window_kind": "terraced", "sinks": 1, "decay": "gate"},
    "elu": {"window": 4, "feature_map": "elu"},
    "kept": {"mixer": "blend", "window": 4, "sinks": 2, "kept": {"pairs": 3}},
    "bytes": {"mixer": "blend", "window": 4, "sinks": 1, "kept": {"pairs": 3}, "bits": 8, "far": "none"},
    "heads": {"mixer": "blend", "sinks": 1, "split": SPLIT, "bits": 8},
    "recalled": {
        "mixer": "blend", "window": 4, "kept": {"pairs": 2, "recall_error": True, "fade": 100}, "far": "gated_delta",
    },
}  # fmt: skip
"""Of layers: both mixers, kinds of windows, kept pairs, heads of different sizes, 8 bits, and far halves."""


def run_again(step: Callable[[], ModelOutput]) -> tuple[ModelOutput, Callable[[], None]]:
    """In the place of a CUDA graph: a step that Python runs anew, whose results are put where the first ones were."""
    output = step()

    def replay() -> None:
        for name, new in step().items():
            if isinstance(new, Tensor):
                output[name].copy_(new)

    return output, replay


def with_stand_in(student: Any) -> DecodeGraphs:
    """Have a model on the CPU decode by the stand-in, without the fused kernels, which would be interpreted."""
    graphs = graphs_of(student)
    graphs.record, graphs.device, graphs.fuses = run_again, "cpu", False
    return graphs


def read(student: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    """A cache with a prompt in it."""
    cache = DynamicCache(config=student.config)
    student(ids, attention_mask=mask, past_key_values=cache)
    return cache


def padded(ids: Tensor) -> Tensor:
    """A mask with padding on the left of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


def step(student: Any, token: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits [B, V] of one more token [B, 1]; `mask` is that of the prompt."""
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, cache.get_seq_length() + 1 - mask.shape[1]), value=1)
    return student(token, attention_mask=mask, past_key_values=cache).logits[:, -1]


def forced(student: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits [B, N - prompt, V] of a text whose tokens after a prompt are read one by one."""
    cache = read(student, ids[:, :prompt], mask)
    steps = [step(student, token, cache, mask) for token in ids[:, prompt:].split(1, 1)]
    return torch.stack(steps, 1)


def eager(student: Any, run: Callable[[], Any]) -> Any:
    """What `run` gives without graphs."""
    lolcats.set_decode_graphs(student, False)
    try:
        return run()
    finally:
        lolcats.set_decode_graphs(student, True)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Logits agree, relative to the largest."""
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max())
    assert error <= tolerance, f"logits are off by {error:.2g} of the largest, expected at most {tolerance:.2g}"


def check_texts(student: Any, make_ids: Callable[..., Tensor], tolerance: float) -> None:
    """Texts of several batches, with and without padding, one after the other and each twice."""
    graphs = graphs_of(student)
    for rows, is_padded in ((1, False), (3, False), (3, True), (1, False)):
        ids = make_ids(rows, 17)
        mask = padded(ids[:, :10]) if is_padded else None
        want = eager(student, lambda ids=ids, mask=mask: forced(student, ids, 10, mask))
        for _ in range(2):
            before = graphs.replays
            assert_close(forced(student, ids, 10, mask), want, tolerance)
            assert graphs.replays - before >= 6, f"{graphs.replays - before} of 7 steps were replayed (batch {rows})"


def check_interleaved(student: Any, make_ids: Callable[..., Tensor], tolerance: float) -> None:
    """Two texts that take turns, of which one is also continued by a longer piece and by a copy."""
    one, two = make_ids(2, 24, 1), make_ids(2, 24, 2)
    want = eager(student, lambda: [forced(student, ids, 8) for ids in (one, two)])
    caches = [read(student, ids[:, :8]) for ids in (one, two)]
    for at in range(8, 18):
        for ids, cache, expected in zip((one, two), caches, want, strict=True):
            assert_close(step(student, ids[:, at : at + 1], cache), expected[:, at - 8], tolerance)
            assert cache.get_seq_length() == at + 1
    assert graphs_of(student).replays >= 18
    copies = [lolcats.continue_from(cache, one[:, 18:19])["past_key_values"] for cache in caches]
    piece = student(one[:, 18:21], past_key_values=caches[0]).logits
    assert_close(piece, want[0][:, 10:13], tolerance)
    for at in range(18, 24):  # copies are continued as if the originals had not been
        assert_close(step(student, two[:, at : at + 1], copies[1]), want[1][:, at - 8], tolerance)
        assert_close(step(student, one[:, at : at + 1], copies[0]), want[0][:, at - 8], tolerance)
    for at in range(21, 24):
        assert_close(step(student, one[:, at : at + 1], caches[0]), want[0][:, at - 8], tolerance)


def check_generated(
    student: Any, make_ids: Callable[..., Tensor], batches: tuple[int, ...], replays: int, options: dict[str, Any]
) -> None:
    """`generate` writes the same tokens for several batches, each twice, by so many replays of a batch or more."""
    graphs = graphs_of(student)
    for rows in batches:
        ids = make_ids(rows, 12)
        settings = {"do_sample": False, "attention_mask": padded(ids), **options}

        def write(ids: Tensor = ids, settings: dict[str, Any] = settings) -> list[list[int]]:
            torch.manual_seed(0)
            return student.generate(ids, **settings).tolist()

        want, before = eager(student, write), graphs.replays
        assert [write(), write()] == [want, want]
        assert graphs.replays - before >= replays


def check_beyond_context(student: Any, make_ids: Callable[..., Tensor], tolerance: float) -> None:
    """Steps before and after the end of the model's context, which have a recording each."""
    reach = student.config.max_position_embeddings
    ids = torch.cat([make_ids(2, reach - 8, 3), make_ids(2, 24)], 1)
    want = eager(student, lambda: forced(student, ids, reach - 8))
    assert_close(forced(student, ids, reach - 8), want, tolerance)
    assert len(graphs_of(student).recordings) == 2


def check_rows_move(student: Any, make_ids: Callable[..., Tensor], tolerance: float) -> None:
    """Rows are reordered, repeated and dropped between steps."""
    ids = make_ids(3, 24)
    changes: list[tuple[Callable[[Any], None], list[int]]] = [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0], device=ids.device)), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1], device=ids.device)), [2, 1]),
    ]
    for change, rows in changes:
        want = eager(student, lambda rows=rows: forced(student, ids[rows], 8))
        cache = read(student, ids[:, :8])
        for at in range(8, 14):
            step(student, ids[:, at : at + 1], cache)
        change(cache)
        for at in range(14, 20):
            assert_close(step(student, ids[rows, at : at + 1], cache), want[:, at - 8], tolerance)
