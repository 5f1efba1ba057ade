"""Layers that are looked into, and their weights query by query in float64: what the analysis answers to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.evaluation.analysis.stream import LayerPass, Stream
from lolcats.mixers import Call
from lolcats.ops.near import NearSpec
from lolcats.ops.near.reference import visible

LAYERS: dict[str, dict[str, Any]] = {
    "learned": {"mixer": "blend", "window": 4, "sinks": 2, "kept": {"pairs": 3}, "decay": "gate"},
    "recall": {"mixer": "blend", "window": 3, "kept": {"pairs": 2, "score": "self_recall"}, "decay": "fixed"},
    "recency": {"mixer": "blend", "window": 3, "sinks": 1, "far": "none", "kept": {"pairs": 5, "score": "recency"}},
    "random": {"mixer": "blend", "window": 2, "far": "kda", "kept": {"pairs": 4, "score": "random"}},
    "oracle": {"mixer": "blend", "window": 3, "sinks": 1, "kept": {"pairs": 4, "score": "oracle"}, "decay": "none"},
    "no pairs": {"mixer": "blend", "window": 5, "sinks": 1},
    "window": {"mixer": "blend", "window": 5, "sinks": 1, "far": "none"},
    "heads": {"mixer": "blend", "sinks": 1, "far": "none", "split": [[[4, 3], [2, 0]], [[1, 6], [7, 2]], [3, 2]]},
    "hybrid": {"mixer": "hybrid", "window": 4, "sinks": 1, "decay": "gate"},
    "terraced": {"mixer": "hybrid", "window": 3, "window_kind": "terraced"},
}
"""Settings of a model of three layers with six query and two key heads."""


def passes(teacher: PreTrainedModel, ids: Tensor, student: PreTrainedModel | None = None) -> dict[int, LayerPass]:
    """Each layer of a student, or of a model that is its own teacher, at one text, tokens [N]."""
    found: dict[int, LayerPass] = {}
    stream = Stream(teacher, teacher if student is None else student)
    stream.read(ids, lambda seen: found.update({seen.layer: seen}))
    return found


def teacher_weights(call: Call) -> Tensor:
    """[H, N, N] of softmax attention; scores may be capped, and there may be learned sinks."""
    heads, n = call.q.shape[1:3]
    q, k = call.q[0].double(), call.k[0].double()
    weights = torch.zeros(heads, n, n, dtype=torch.float64)
    for head in range(heads):
        for i in range(n):
            scores = k[head * len(k) // heads, : i + 1] @ q[head, i] * call.scale
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            sink = 0.0 if call.sink_logits is None else call.sink_logits[head].double().exp()
            weights[head, i, : i + 1] = scores.exp() / (scores.exp().sum() + sink)
    return weights


def seen_keys(seen: LayerPass, head: int) -> list[tuple[list[int], list[int]]]:
    """For each query of a query head the keys that it sees in window and sinks, and its kept pairs."""
    inside, settings, n = seen.inside(), seen.student.mixer.settings, seen.call.q.shape[2]
    if getattr(settings, "window_kind", "sliding") == "terraced":
        return [([j for j in range(i + 1) if i // settings.window - j // settings.window <= 1], []) for i in range(n)]
    key_head = head * len(inside.sizes) // seen.call.q.shape[1]
    window, sinks, pairs = inside.sizes[key_head]
    scores = None if inside.keep is None or not pairs else inside.keep(None).score[0, key_head].tolist()
    found = []
    for i in range(n):
        keys = visible(i, NearSpec(window, sinks, pairs), scores)
        near = [j for j in keys if j < sinks or i - j < window]
        found.append((near, [j for j in keys if j not in near]))
    return found


def near_weights(seen: LayerPass) -> tuple[Tensor, Tensor]:
    """[H, N, N] of near attention: of all that it sees, and of its kept pairs alone."""
    call = seen.call
    heads, n = call.q.shape[1:3]
    weights, kept = (torch.zeros(heads, n, n, dtype=torch.float64) for _ in range(2))
    for head in range(heads):
        for i, (near, pairs) in enumerate(seen_keys(seen, head)):
            k = call.k[0, head * call.k.shape[1] // heads, near + pairs].double()
            weights[head, i, near + pairs] = (k @ call.q[0, head, i].double() * call.scale).softmax(-1)
            kept[head, i, pairs] = weights[head, i, pairs]
    return weights, kept
