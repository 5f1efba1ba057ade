"""A recurrence by the kernels of flash-linear-attention (the extra `fla`), an adapter to its calls.

There tensors are [B, N, H, size] with as many key heads as query heads, sums are float32, and operands and states
between chunks bfloat16. Padding has been made harmless before (`without_padding`); packed texts are laid into one row
with `cu_seqlens`, where no state is shared.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from lolcats.ops.recurrence.layout import (
    Inputs,
    Spec,
    Sums,
    first_sums,
    joined,
    parted,
    quotient,
    text_starts,
    with_ones,
)

LARGEST_KEY = 256
"""The delta rule's kernels take keys of at most so many numbers."""
FULL_DECAY = -60.0
"""exp of it is 1e-26, nothing beside what bfloat16 operands leave; the kernels take differences of sums of decays, in
which -inf would be NaN and much smaller numbers would lose the others."""
MULTIPLE = 16
"""Sizes are filled with zeros up to a multiple of it; the kernels refuse odd ones."""


@functools.cache
def fla_installed() -> bool:
    """Whether flash-linear-attention and Triton, which it needs, can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "fla"))


def fla_refusal(inputs: Inputs) -> str | None:
    """Why the kernels cannot run a call, or None."""
    if inputs.q.device.type != "cuda":
        return f"it needs a CUDA device; the tensors are on {inputs.q.device}"
    if inputs.v.dtype != torch.bfloat16:
        return f"its products are of bfloat16 numbers, so it takes v in bfloat16 only; got {inputs.v.dtype}"
    if inputs.beta is not None and inputs.k.shape[3] > LARGEST_KEY:
        return f"with beta it takes keys of at most {LARGEST_KEY} numbers; got {inputs.k.shape[3]}"
    return None


def fla_recurrence(inputs: Inputs, spec: Spec, return_state: bool) -> tuple[Tensor, Sums | None]:
    """The recurrence by flash-linear-attention's kernels; arguments as checked by `recurrence` and `fla_refusal`."""
    batch, heads, n, _ = inputs.q.shape
    state_heads, packed = inputs.k.shape[1], inputs.segment_ids is not None
    v = with_ones(inputs.v) if spec.normalised else inputs.v
    q, k, values = (_rows(_filled(x.to(v.dtype)), heads, packed) for x in (inputs.q, inputs.k, v))
    gates = (None if x is None else _rows(x.float(), heads, packed) for x in (inputs.log_decay, inputs.beta))
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": return_state}
    if inputs.segment_ids is not None:
        options["cu_seqlens"] = _cuts(inputs.segment_ids)
    if inputs.state is not None:
        sums = first_sums(inputs._replace(k=inputs.k.float()), spec)
        options["initial_state"] = _first_state(joined(sums), heads, k.shape[-1], values.shape[-1])
    out, last = _call(q, k, values, *gates, options=options)
    out = out[..., : v.shape[-1]].reshape(batch, n, heads, -1).transpose(1, 2).float()
    if not return_state:
        return quotient(out, spec), None
    # The query heads of one state head have made the same state.
    last = last[:, :: heads // state_heads, : inputs.k.shape[3], : v.shape[-1]]
    return quotient(out, spec), parted(last, spec)


def _call(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, *, options: dict[str, Any]
) -> tuple[Tensor, Any]:
    """The kernels for these gates, log_decay [B, N, H] or [B, N, H, F] and beta [B, N, H]; output and last state."""
    if log_decay is not None:
        log_decay = log_decay.clamp_min(FULL_DECAY)
        if log_decay.ndim == 4:
            log_decay = _filled(log_decay)
        elif beta is not None or _refuses_gradients(q, k, v, log_decay):
            # With beta always: the kernels of gated_delta_rule refuse these gradients too.
            log_decay = log_decay[..., None].expand(q.shape)
    if beta is not None and log_decay is None:
        return _imported("fla.ops.delta_rule", "chunk_delta_rule")(q, k, v, beta, **options)
    if beta is not None:
        return _imported("fla.ops.kda", "chunk_kda")(q, k, v, log_decay, beta, **options)
    if log_decay is None or log_decay.ndim == 3:
        return _imported("fla.ops.simple_gla", "chunk_simple_gla")(q, k, v, log_decay, **options)
    return _imported("fla.ops.gla", "chunk_gla")(q, k, v, log_decay, **options)


def _imported(module: str, name: str) -> Any:
    """Something of flash-linear-attention, which is imported when it is asked for; the code of an export runs without.

    Raises:
        ValueError: it cannot be imported, or has no such name.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"impl 'fla' needs {name} of {module}, which cannot be had here ({error}): pip install 'lolcats[fla]'"
        ) from error


def _refuses_gradients(*tensors: Tensor) -> bool:
    """Whether these need gradients that the kernels for a decay per head do not give.

    Triton 3.4 to 3.7.0 compiles them wrongly for Hopper, so that flash-linear-attention 0.6 refuses there.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return False
    hopper, since, until = (
        _imported("fla.utils", name) for name in ("IS_NVIDIA_HOPPER", "TRITON_ABOVE_3_4_0", "TRITON_ABOVE_3_7_1")
    )
    return hopper and since and not until


def _filled(x: Tensor) -> Tensor:
    """x with its last dimension filled with zeros up to a multiple of `MULTIPLE`."""
    missing = -x.shape[-1] % MULTIPLE
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _rows(x: Tensor, heads: int, packed: bool) -> Tensor:
    """[B, h, N, ...] -> [B, N, heads, ...], or where texts are packed [1, B N, heads, ...]."""
    x = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)).transpose(1, 2)
    return x.flatten(0, 1)[None] if packed else x


def _cuts(segment_ids: Tensor) -> Tensor:
    """Where the texts of all rows, one after the other, begin, and where the last ends."""
    starts = text_starts(segment_ids).flatten().nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=segment_ids.numel())


def _first_state(kv: Tensor, heads: int, key_size: int, value_size: int) -> Tensor:
    """The state [B, S, ., .] that comes in, filled with zeros: [B, heads, key_size, value_size]."""
    kv = torch.nn.functional.pad(kv, (0, value_size - kv.shape[-1], 0, key_size - kv.shape[-2]))
    return kv.repeat_interleave(heads // kv.shape[1], 1)
