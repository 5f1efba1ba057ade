"""By layer and head: how far the output is from the teacher's, and where teacher and student look.

With a_ij the teacher's attention of query i to key j, y its output and z the layer's (both before the output
projection), over all queries of all texts:

    error = mean of (z - y)^2                   relative error = error / mean of y^2
    entropy = mean over i of -sum_j a_ij log a_ij
    far share of the teacher = mean over i of sum of a_ij, j in neither window nor sinks

The layer's far share is the weight of its kept pairs and its far half. Shares are means over the queries that have keys
beyond window and sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.evaluation.analysis.file import HeadAnalysis, LayerAnalysis
from lolcats.evaluation.analysis.stream import LayerPass, Stream
from lolcats.mixers import Call
from lolcats.mixers.inside import Inside, Sees
from lolcats.mixers.softmax import attention_blocks
from lolcats.training.losses import output_error

BLOCK, BLOCK_BYTES = 256, 1 << 26
"""Queries of the teacher, and keys of the student, whose weights are in memory at once: so many, and of all heads in
float32 no more than so many bytes. A few tensors of this size are made of them."""


def block_of(call: Call) -> int:
    """See `BLOCK`."""
    return max(1, min(BLOCK, BLOCK_BYTES // (4 * call.q.shape[1] * call.q.shape[2])))


class TeacherSums:
    """What the teacher's attention [1, H, N, N] says of each query, found in blocks of rows.

    Args:
        call: one whole text.
        sees: the keys of window and sinks, see `Inside`.
    """

    def __init__(self, call: Call, sees: Sees) -> None:
        heads, keys = call.q.shape[1], torch.arange(call.q.shape[2], device=call.q.device)
        entropy, far, has_far = [], [], []
        for begin, weights in attention_blocks(call, block_of(call)):
            query, key = keys[begin : weights.shape[-1], None], keys[None, : weights.shape[-1]]
            beyond = by_head(~sees(query, key) & (key <= query), heads)
            entropy.append(torch.special.entr(weights[0]).sum(-1))
            far.append((weights[0] * beyond).sum(-1))
            has_far.append(beyond.any(-1))
        self.entropy = torch.cat(entropy, 1)
        """[H, N], nats."""
        self.far = torch.cat(far, 1)
        """[H, N], to keys in neither window nor sinks."""
        self.has_far = torch.cat(has_far, 1)
        """[H, N], whether there are such keys."""


def by_head(mask: Tensor, heads: int) -> Tensor:
    """A mask [1 or KV, ...] for each query head: [H, ...]."""
    return mask.repeat_interleave(heads // mask.shape[0], 0)


def beyond_near(inside: Inside, call: Call) -> Tensor:
    """Weight [H, N] that `Inside.near` gives to keys in neither window nor sinks, found in blocks of keys."""
    rows, kv_heads, n, _ = call.k.shape
    keys = torch.arange(n, device=call.k.device)
    total = torch.zeros(call.q.shape[1], n, device=call.k.device)
    for key in keys.split(block_of(call)):
        marks = (keys[:, None] == key).to(torch.float32).expand(rows, kv_heads, -1, -1)
        total += (inside.near(marks)[0] * by_head(~inside.sees(keys[:, None], key[None]), len(total))).sum(-1)
    return total


class LayerMeter:
    """Adds up what texts say of one layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._inside: Inside | None = None

    def add(self, seen: LayerPass) -> None:
        """One text; see the module."""
        inside = self._inside = seen.inside()
        teacher = TeacherSums(seen.teacher, inside.sees)
        far = teacher.has_far
        self._add("texts", torch.ones(len(far), device=far.device))
        self._add("error", head_errors(seen.student_output(), seen.output))
        self._add("square", head_errors(torch.zeros_like(seen.output), seen.output))
        self._add("entropy", teacher.entropy.mean(-1))
        self._add("far", (teacher.far * far).sum(-1))
        self._add("queries", far.sum(-1))
        if inside.keep is not None:
            self._add("kept", (beyond_near(inside, seen.call) * far).sum(-1))
        share = beyond_near(inside, seen.call) if inside.one_denominator else inside.share
        if share is not None:
            self._add("share", (share.view_as(far) * far).sum(-1))
        if inside.decay is not None:
            self._add("decay", inside.decay[0].mean(-1))

    def found(self, layer: int) -> LayerAnalysis:
        """The numbers of layer number `layer`."""
        assert self._inside is not None
        sums, heads = self._sums, []
        count, sizes, factor = len(sums["texts"]), self._inside.sizes, self._inside.window_factor
        for head in range(count):
            size = sizes[key_head := head * len(sizes) // count]
            kept = self._over("kept", "queries", head) if size.pairs else None
            share, far = self._over("share", "queries", head), self._over("far", "queries", head)
            heads.append(
                HeadAnalysis(
                    head=head,
                    key_head=key_head,
                    error=self._over("error", "texts", head),
                    relative_error=self._over("error", "square", head),
                    entropy=self._over("entropy", "texts", head),
                    far_share_teacher=far,
                    far_share_student=None if far is None else (kept or 0.0) + (share or 0.0),
                    kept_share=kept,
                    share=share,
                    decay=self._over("decay", "texts", head),
                    window_factor=None if factor is None else float(factor[head]),
                    **size._asdict(),
                )
            )
        return LayerAnalysis(
            layer=layer,
            linearized=True,
            error=self._over("error", "texts"),
            relative_error=self._over("error", "square"),
            entropy=self._over("entropy", "texts"),
            heads=heads,
        )

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _over(self, name: str, other: str, head: int | None = None) -> float | None:
        """One sum divided by another, of a head or of all; None where it is not there, or nothing is divided by."""
        if name not in self._sums:
            return None
        above, below = (self._sums[n].sum() if head is None else self._sums[n][head] for n in (name, other))
        return float(above / below) if float(below) else None


def head_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """`output_error` of each head of outputs [1, H, N, Dv]: [H]."""
    pairs = zip(student.split(1, 1), teacher.split(1, 1), strict=True)
    return torch.stack([output_error(one, other, None) for one, other in pairs])


def transfer_errors(
    model: PreTrainedModel,
    texts: Tensor,
    only: Collection[int] | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[int, float]:
    """Layer -> mean squared error of its output on the model's own softmax stream.

    Args:
        model: converted, with the teacher's weights.
        texts: [S, N] tokens.
        only: layers to look at; None is all.
        progress: called after each layer of each text.
    """
    found: dict[int, list[float]] = {}

    def visit(seen: LayerPass) -> None:
        error = output_error(seen.student_output(), seen.output, None)
        found.setdefault(seen.layer, []).append(float(error))
        if progress is not None:
            progress()

    stream = Stream(model, model, only)
    for text in texts:
        stream.read(text, visit)
    return {layer: sum(errors) / len(errors) for layer, errors in found.items()}
