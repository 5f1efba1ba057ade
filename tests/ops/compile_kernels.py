"""Compile every kernel for compute capability 9.0, without a GPU, for one kind of call; print what fails.

The interpreter takes Python that Triton's compiler refuses, so passing there is not enough. Run as a program, in a
process of its own where the interpreter is off: python compile_kernels.py KIND WINDOW_KIND.

Each is compiled once: that texts of other lengths take the same ones is a part of what is checked.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

import bare  # noqa: F401  # the package's __init__ imports transformers
from lolcats.ops.hybrid.kernels import backward, decode, launch
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridSpec, HybridState, LinearState, SinkKeys, WindowRing

SHARED_MEMORY = 232_448  # bytes of a block on an H100
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
BACKWARD = (
    "output_terms",
    "query_features",
    "key_features",
    "weight_kernel",
    "query_inputs",
    "key_inputs",
    "key_values",
)
"""Kernels that are made once more for lengths that 16 divides."""
TARGET = GPUTarget("cuda", 90, 32)


class Compiler:
    """Takes the place of `on`: launches run nothing; they compile what is new, or with `dry` only note it."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.problems: list[str] = []
        self.dry = False

    def __call__(self, kernel: Any, grid: tuple[int, ...]) -> Any:
        del grid

        def take(*arguments: Any, **named: Any) -> None:
            key = compiled_for(kernel, arguments, named)
            if not self.dry and key not in self.kernels and (problem := compile_launch(kernel, arguments, named)):
                self.problems.append(problem)
            self.kernels.add(key)

        return take

    def again(self, known: set[str]) -> list[str]:
        """What was compiled, or would have been, beside `known`."""
        return [f"compiled again: {key}" for key in sorted(self.kernels - known)]


def compiled_for(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What tells one compiled form of a kernel from another, in Triton's own words."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGET))
    bound, kinds, options = bind(*arguments, **named)
    parts = [f"{name}: {kind[0] if kind[1] is None else kind}" for name, kind in zip(bound, kinds, strict=True)]
    return "; ".join([kernel.__name__, *parts, *(f"{name}={value}" for name, value in options.items())])


def compile_launch(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What is wrong with one launch; empty if nothing."""
    names = kernel.arg_names
    constants = {name: value for name, value in named.items() if name not in OPTIONS}
    signature: dict[str, str] = dict.fromkeys(names, "constexpr")
    for name, value in zip(names, arguments, strict=False):
        signature[name] = type_of(value)
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {name: value for name, value in named.items() if name in OPTIONS}
    try:
        compiled = triton.compile(source, target=TARGET, options=options)
    except Exception as error:
        return f"{kernel.__name__}: {str(error).strip()[-300:]}"
    used = compiled.metadata.shared
    return f"{kernel.__name__}: {used} bytes of shared memory" if used > SHARED_MEMORY else ""


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, GluonDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}[{','.join(map(str, value.block_shape))}],{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def run(kind: str, window_kind: str) -> list[str]:
    """What is wrong with the kernels of forward and backward passes and, with maps, of a step."""
    compiler = Compiler()
    for module in (launch, backward, decode):
        module.on = compiler  # type: ignore[attr-defined]
    launch_all(kind, window_kind, 700)
    compiler.dry = True
    launch_all(kind, window_kind, 100)  # one tile, so without states
    known = set(compiler.kernels)
    launch_all(kind, window_kind, 1, back=False)  # 1 and multiples of 16 are what Triton compiles anew for
    for n in (704, 112):
        launch_all(kind, window_kind, n)
    once_more = {key for key in compiler.kernels if key.startswith(BACKWARD)}
    problems = compiler.problems + compiler.again(known | once_more)
    known |= once_more
    for n in (101, 128, 129, 1000, 3000, 3008):
        launch_all(kind, window_kind, n)
    return problems + compiler.again(known)


def launch_all(kind: str, window_kind: str, n: int, back: bool = True) -> None:
    """Launch what there is for texts of n tokens."""
    batch, heads, kv_heads, size, width = 2, 4, 2, 64, 32
    q, k = (torch.empty(batch, n, h, size, dtype=torch.bfloat16).transpose(1, 2) for h in (heads, kv_heads))
    given, plain = kind == "given", window_kind == "sliding"
    features = torch.empty(batch, heads, n, width, dtype=torch.bfloat16)
    weights = torch.empty(heads, size, width)
    maps = features if given else weights.to(q.dtype)
    bias = torch.empty(heads, width) if kind == "t2r" else None
    logits = torch.empty(heads) if plain else None
    decay = torch.empty(batch, heads, n) if plain else None
    factor = None if given else torch.empty(heads)
    x = launch.Operands(q, k, k, maps, maps, torch.empty(heads), bias, bias, factor, logits, decay)
    spec = HybridSpec(64, window_kind, 2 if plain else 0, 0.125, 5.0 if kind == "t2r" else None)
    context = launch.Context() if plain else launch.Context(torch.zeros(batch, 4, dtype=torch.int32))
    plan = launch.make_plan(x, context, spec, kind)
    saved = launch.run_forward(plan, x, context, save=True)
    needs = tuple(t is not None for t in x)
    if back:
        backward.run_backward(plan, x, context, saved, torch.empty_like(saved.out), needs)
    if not given:
        wide = spec._replace(window=200, fold=16)  # several tiles of tokens, and keys that wait
        step(MapWeights(kind, weights, weights, bias, bias, factor), q, k, wide, logits)


def step(maps: MapWeights, q: torch.Tensor, k: torch.Tensor, spec: HybridSpec, logits: torch.Tensor | None) -> None:
    """Launch a decoding step, with decay and padding."""
    (batch, heads, _, size), kv_heads = q.shape, k.shape[1]
    features = maps.q.shape[2] * (2 if maps.kind == "hedgehog" else 1)
    slots = spec.slots
    ring = torch.empty(batch, kv_heads, slots, size, dtype=k.dtype)
    length = torch.zeros(batch, dtype=torch.long)
    window = WindowRing(ring, ring, None, torch.empty(batch, heads, slots))
    linear = LinearState(torch.empty(batch, heads, features, size), torch.empty(batch, heads, features))
    sinks = SinkKeys(*(ring[:, :, : spec.sinks].contiguous() for _ in range(2)))
    state, losses = HybridState(linear, window, sinks, length), torch.empty(batch, heads, 1)
    token = k[:, :, :1]
    factor = torch.empty(heads)
    decode.decode_step(q[:, :, :1], token, token, maps, factor, state, spec, losses, length, logits, length)


if __name__ == "__main__":
    for line in run(*sys.argv[1:]):
        print(line)
