"""What a decoding step needs before its attention, at once: the score of the new key; q, k and v as pairs are coded;
and queries as sinks see them.

In torch this is dozens of small operations on a token's few numbers, which take longer than the attention itself. The
kernels do them in two launches (`kernels/prepare.py`); where they cannot, `prepare_refusal` says why, and the caller
does it in torch. Of a text of many tokens `score_keys` makes the score (`kernels/hidden.py`, `kernels/score.py`); its
pairs are coded by `PairCodec.coded`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from lolcats.ops.near.prepared import Prepared, ScoreCall, SinkCall
from lolcats.ops.near.quantize import PairCodec


def prepare_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    codec: PairCodec | None,
    score: ScoreCall | None,
    length: Tensor,
    state_indices: Tensor | None = None,
    sinks: SinkCall | None = None,
) -> Prepared:
    """One token of each text as `codec` codes it, and the score of its key; by kernels.

    Args:
        q: [B, H, 1, D]; k: [B, KV, 1, D]; v: [B, KV, 1, Dv]; float32, bfloat16 or float16.
        codec: of stored pairs, 8 bits; None leaves q, k and v as they are.
        score: what the score is made of, or None.
        length: [rows] int64, tokens before this one, of the texts or of a pool of more texts.
        state_indices: [B] int32 or int64, the row of each text in the pool; -1 is a row without a text, of which all
            that is returned means nothing.
        sinks: what their queries are made of, or None.

    Returns:
        The same bytes and queries as the codec makes, and the score up to the order in which products are added up.

    Raises:
        ValueError: the kernels do not take this; the message says why.
    """
    if codec is None and score is None and sinks is None:
        return Prepared(q, k, v, None)
    if (reason := prepare_refusal(q, k, v, codec=codec, score=score)) is not None:
        raise ValueError(f"the kernels cannot prepare this decoding step: {reason}; prepare it in torch")
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.near.kernels.prepare import code_pairs_and_score

    return code_pairs_and_score(q, k, v, codec, score, length, state_indices, sinks)


def score_keys(k: Tensor, v: Tensor, score: ScoreCall) -> Tensor:
    """The score of each key of a text as it is before it fades, by kernels, where `score_refusal` has nothing to say.

    Args:
        k: [B, KV, N, D], with the rotation of `score`; v: [B, KV, N, Dv].
        score: what else it is made of: the layer's input [B, N, d_model], and cos and sin [B or 1, N, P].

    Returns:
        [B, KV, N] float32, in torch's numbers up to the order in which products are added up.
    """
    from lolcats.ops.near.kernels.hidden import read_texts  # not at the top: see `prepare_step`
    from lolcats.ops.near.kernels.score import score_pairs

    return score_pairs(k, v, read_texts(score.hidden, score.weights), score)


def score_refusal(k: Tensor, v: Tensor, score: ScoreCall) -> str | None:
    """Why `score_keys` does not take a call, or None."""
    if (reason := _refusal(k, k, v) or _score_refusal(score, k, v)) is not None:
        return reason
    hidden, sizes = score.hidden, (k.shape[3], v.shape[3])
    wanted = (k.shape[0], k.shape[2], score.weights.read_hidden.shape[1])
    if tuple(hidden.shape) != wanted or hidden.device != k.device:
        return f"it takes a layer's input {wanted} on {k.device}; got {tuple(hidden.shape)} on {hidden.device}"
    if torch.is_grad_enabled() and hidden.requires_grad:
        return "it gives no gradients to a layer's input; score keys under torch.no_grad()"
    return None if min(sizes) >= 16 else f"it takes head sizes of at least 16; got D {sizes[0]}, Dv {sizes[1]}"


def prepare_refusal(q: Tensor, k: Tensor, v: Tensor, *, codec: PairCodec | None, score: ScoreCall | None) -> str | None:
    """Why `prepare_step` does not take a call, or None."""
    if (reason := _refusal(q, k, v)) is not None:
        return reason
    if q.shape[2] != 1:
        return f"it takes one token of each text; got {q.shape[2]}"
    if codec is not None and codec.bits != 8:
        return f"it codes in 8 bits; got a codec of {codec.bits}"
    return None if score is None else _score_refusal(score, k, v)


def _refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why no kernel of these takes such tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not installed here"
    from lolcats.ops.near.kernels.launch import refusal  # not at the top: see `prepare_step`

    if (reason := refusal(q, k, v, False, None)) is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "it gives no gradients; decode under torch.no_grad()"
    if not (_is_power(k.shape[3]) and _is_power(v.shape[3])):
        return f"it takes head sizes that are powers of 2; got D {k.shape[3]}, Dv {v.shape[3]}"
    return None


def _score_refusal(score: ScoreCall, k: Tensor, v: Tensor) -> str | None:
    weights, width = score.weights, k.shape[3] + v.shape[3]
    if any(x.dtype != torch.float32 or x.device != k.device for x in weights):
        return f"it takes weights of the score of float32 on {k.device}"
    if score.hidden.dtype == torch.float64:
        return "it takes a layer's input of float32 or less; got float64"
    if weights.read_pair.shape[1] != width:
        return f"it takes a score that reads a key and a value, {width} numbers; got {weights.read_pair.shape[1]}"
    sizes = weights.read_hidden.shape[0], weights.read_pair.shape[0]
    if not all(_is_power(size) and 32 <= size <= 128 for size in sizes):
        return f"it takes scores of 32, 64 or 128 hidden numbers in each part; got {sizes[0]} and {sizes[1]}"
    return None


def _is_power(size: int) -> bool:
    """Whether of 2."""
    return size & (size - 1) == 0
