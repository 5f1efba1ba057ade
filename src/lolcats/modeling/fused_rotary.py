"""Rotary embedding in one kernel in the place of some ten, where a family does it by a function of its own file.

The family's attention calls `apply_rotary_pos_emb`, a global of its file. Of an attention module that is copied
(`modeling.fused`) the copy has a `forward` with the same code and other globals, in which this name stands for another
function; the file, the class and the module stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lolcats.modeling.agreement import agree, random_numbers
from lolcats.modeling.head import FAILURES
from lolcats.ops.elementwise import DTYPES, turn_halves

NAME = "apply_rotary_pos_emb"
ROWS, TOKENS = 2, 8
"""Of what the kernel and the family's function are compared by, at most."""


class FusedTurn:
    """Takes the place of a family's function.

    Args:
        own: the function, of q, k, cos and sin.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.found: dict[tuple[Any, ...], bool] = {}
        """Whether the kernel gives what the function gives, for inputs of a kind."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or not _can_turn(*args):
            return self.own(*args, **kwargs)
        q, k, cos, sin = args
        kind = (q.dtype, q.shape[3], cos.shape[-1], cos.ndim)
        if kind not in self.found:
            try:
                self.found[kind] = self._gives_the_same(q, k, cos, sin)
            except FAILURES:
                self.found[kind] = False
        return turn_halves(q, k, cos, sin) if self.found[kind] else self.own(q, k, cos, sin)

    def _gives_the_same(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Of random numbers and angles, a few tokens."""
        rows, tokens = min(len(q), ROWS), min(q.shape[2], TOKENS)
        q, k = (random_numbers((rows, x.shape[1], tokens, x.shape[3]), x) for x in (q, k))
        angle = random_numbers((min(len(cos), rows), tokens, cos.shape[2] // 2), cos).float()
        halves = [torch.cat([x, x], -1).to(cos.dtype) for x in (angle.cos(), angle.sin())]
        return all(agree(x, y, 1) for x, y in zip(turn_halves(q, k, *halves), self.own(q, k, *halves), strict=True))


def _can_turn(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    if not all(isinstance(x, Tensor) and x.dtype in DTYPES and x.dtype == q.dtype for x in (q, k, cos, sin)):
        return False
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
        return False
    rows, _, tokens, size = q.shape
    same = (k.shape[0], k.shape[2], k.shape[3]) == (rows, tokens, size)
    return same and size % 2 == 0 and cos.shape[1:] == (tokens, size) and cos.shape[0] in (1, rows)


def with_fused_rotary(module: nn.Module) -> types.FunctionType | None:
    """The forward of the module's class with a fused rotary embedding; None where it calls none by the usual name."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or NAME not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(NAME)
    if not callable(own) or hasattr(forward, "__wrapped__"):
        return None
    names = {**forward.__globals__, NAME: FusedTurn(own)}
    new = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    new.__kwdefaults__ = forward.__kwdefaults__
    return new
