"""Triton's interpreter, three times as fast: what it does again and again, once, and nothing that a test could see.
Beside that it computes with bfloat16, which it could not.

A program of the kernels is a thousand small steps in Python, and most of their time went to three things.
"""

from __future__ import annotations

import dataclasses
from types import FunctionType
from typing import Any

import numpy as np
import torch


def hasten() -> None:
    """Change the interpreter of this process. Where Triton has changed, what is not found stays as it is."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = patched_once(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = known_by_name(interpreter._get_np_dtype)
    # Every sum of two int32 was computed a second time in int64: tensors of tests are far from overflowing.
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if hasattr(builder, "create_dot") and hasattr(builder, "binary_op"):
        builder.create_dot = with_bfloat16_products(builder.create_dot)
        builder.binary_op = with_bfloat16_numbers(builder.binary_op)


def patched_once(patch: Any) -> Any:
    """`_patch_lang`, which looks through all of `triton.language`, also at each call of a function by a kernel.

    By then all has been replaced, unless the function knows the language by another module than the kernel does.
    """
    from triton import language

    known = [language, language.core]
    active: set[tuple[bool, ...]] = set()

    def once(fn: FunctionType) -> Any:
        seen = tuple(any(value is module for value in fn.__globals__.values()) for module in known)
        if seen in active:
            return None  # only the kernel itself restores
        scope = patch(fn)
        active.add(seen)
        restore = scope.restore

        def restored() -> None:
            active.clear()
            restore()

        scope.restore = restored
        return scope

    return once


def known_by_name(get: Any) -> Any:
    """`_get_np_dtype`, which makes its table of types at each call."""
    known: dict[str, Any] = {}

    def dtype_of(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = get(dtype)
        return known[name]

    return dtype_of


def rounded_to_nearest(convert: Any) -> Any:
    """`_convert_float`, which cuts numbers off when it makes bfloat16 of float32; compiled kernels round them."""
    from triton import language

    def converted(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(data, source, target, rounding)
        return bfloat16_bits(data)

    return converted


def bfloat16_bits(data: np.ndarray) -> np.ndarray:
    """Numbers of float32 rounded to the nearest of bfloat16, as the interpreter has them."""
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def wide(operand: Any) -> Any:
    """The same numbers in float32, if they are of bfloat16, whose bits the interpreter has."""
    from triton import language
    from triton.runtime import interpreter

    if operand.dtype.scalar != language.bfloat16:
        return operand
    bits = torch.from_numpy(np.ascontiguousarray(operand.data).view(np.int16))
    return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), language.float32)


def with_bfloat16_products(dot: Any) -> Any:
    """`create_dot`, which multiplies the bits of bfloat16 as if they were whole numbers."""
    return lambda a, b, *rest: dot(wide(a), wide(b), *rest)


def with_bfloat16_numbers(compute: Any) -> Any:
    """`binary_op`, which does so too; results are rounded to nearest, as compiled kernels do."""
    from triton import language
    from triton.runtime import interpreter

    def computed(one: Any, other: Any, operation: Any) -> Any:
        if language.bfloat16 not in (one.dtype.scalar, other.dtype.scalar):
            return compute(one, other, operation)
        data = compute(wide(one), wide(other), operation).data
        if data.dtype != np.float32:  # a comparison
            return interpreter.TensorHandle(data, one.dtype.scalar)
        return interpreter.TensorHandle(bfloat16_bits(data), language.bfloat16)

    return computed
