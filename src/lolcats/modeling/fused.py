"""A copy of a model with fewer kernels, by which decoding steps are recorded.

In a CUDA graph a kernel takes two microseconds however little it does, and an RMS norm of transformers is
eight of them. In the copy these norms are one kernel, and so is what a gated MLP does between its products, and the
rotary embedding of queries and keys (`modeling.fused_rotary`).

The copy is as shallow as it can be: it has the weights of the model, and all of its modules in which nothing is
replaced; of the others it has copies, whose `forward` is another. So nothing is installed in the model and taken out
again: other threads, which may run it meanwhile, hooks, and whoever looks through its modules see what was there.

No list of families says which formula a module has. Modules are looked for by their names and those of their parts, and
one is replaced only if a kernel gives what the module itself gives to random numbers, rounding included.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from lolcats.modeling.agreement import agree, random_numbers, rounding
from lolcats.modeling.fused_rotary import with_fused_rotary
from lolcats.modeling.head import FAILURES, relative_error
from lolcats.ops.elementwise import ACTIVATIONS, DTYPES, NORM_FORMS, NormForm, gated_product, kernels_refuse, rms_norm

EPSILONS = ("variance_epsilon", "eps")
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
SCALES = (1.0, 1.0, 100.0, 0.001)
"""Of random rows for a norm: the mean square of the last is about epsilon."""
PEAKS = (1.0, 64.0)
"""Largest numbers that come to the product of an MLP: at the larger one, a clamp shows."""
T = TypeVar("T")


def fused_copy(model: nn.Module, device: torch.device) -> nn.Module | None:
    """A copy of the model in which kernels are fused; None where there is nothing to fuse, or kernels cannot run.

    What a module computes is found out when it is first called, in a pass that must not be a recording.

    Args:
        model: in evaluation, without hooks that must see every module's own forward.
        device: where its weights are.
    """
    if kernels_refuse(device) is not None:
        return None
    copy = _copied(model, {})
    return None if copy is model else copy


def _copied(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module, or a shallow copy of it if something in it is replaced; one that occurs twice stays one."""
    if module not in made:
        fused, turn = _fused(module), with_fused_rotary(module) if _is_untouched(module) else None
        changes: dict[str, Any] = {"forward": fused} if fused is not None else _changes_below(module, made)
        made[module] = module
        if changes or turn is not None:
            made[module] = copy = object.__new__(type(module))
            vars(copy).update(vars(module) | changes)
            if turn is not None:
                vars(copy)["forward"] = types.MethodType(turn, copy)
    return made[module]


def _changes_below(module: nn.Module, made: dict[nn.Module, nn.Module]) -> dict[str, Any]:
    """What its copy has in the place of the module's attributes: nothing if all that it has in it stays."""
    below = {name: child and _copied(child, made) for name, child in module._modules.items()}
    return {"_modules": below} if any(child is not module._modules[name] for name, child in below.items()) else {}


def _fused(module: nn.Module) -> Callable[..., Any] | None:
    """What may take the place of the module's forward."""
    if not _is_untouched(module):
        return None
    children = [module._modules.get(name) for name in PARTS]
    if all(isinstance(child, nn.Module) for child in children):
        return FusedMLP(module) if _is_untouched(cast(nn.Module, children[-1])) else None
    is_norm = type(module).__name__.endswith("RMSNorm") and not (module._modules or module._buffers)
    is_norm = is_norm and list(module._parameters) == ["weight"] and _epsilon(module) is not None
    return FusedNorm(module) if is_norm else None


def _is_untouched(module: nn.Module) -> bool:
    """Whether its forward is that of its class, and nothing hangs on it."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _epsilon(module: nn.Module) -> float | None:
    return next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


class Fused(Generic[T]):
    """Takes the place of a module's forward.

    Args:
        own: the module.
    """

    def __init__(self, own: nn.Module) -> None:
        self.own: Any = own
        self.found: dict[torch.dtype, T | None] = {}
        """What `find` has found for inputs of a dtype."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            return self.own.forward(*args, **kwargs)
        if x.dtype not in self.found:
            try:
                self.found[x.dtype] = self.find(x)
            except FAILURES:  # of a module that is called in other ways only
                self.found[x.dtype] = None
        way = self.found[x.dtype]
        return self.own.forward(x) if way is None else self.run(x, way)

    def find(self, like: Tensor) -> T | None:
        """What makes `run` give what the module itself gives to inputs like this one; None if nothing does."""
        raise NotImplementedError

    def run(self, x: Tensor, way: T) -> Tensor:
        """The module's output."""
        raise NotImplementedError


class FusedNorm(Fused[NormForm]):
    """An RMS norm of rows [..., D]."""

    def find(self, like: Tensor) -> NormForm | None:
        """The form that agrees in most numbers, if all are within one rounding."""
        x = random_numbers((1, len(SCALES), like.shape[-1]), like) * like.new_tensor(SCALES)[:, None]
        want = self.own.forward(x)
        outputs = {form: self.run(x, form) for form in NORM_FORMS}
        fits = [form for form, got in outputs.items() if agree(got, want, 1)]
        return min(fits, key=lambda form: int((outputs[form] != want).sum()), default=None)

    def run(self, x: Tensor, way: NormForm) -> Tensor:
        return rms_norm(x, self.own.weight, cast(float, _epsilon(self.own)), way)


class FusedMLP(Fused[str]):
    """down(activation(gate(x)) * up(x)), whatever the three are: LoRA and quantized layers are called as ever."""

    def find(self, like: Tensor) -> str | None:
        """The activation, if the module does that and no more."""
        own, x = self.own, random_numbers((1, 2, like.shape[-1]), like)
        peak = max(float(part(x).abs().max()) for part in (own.gate_proj, own.up_proj))
        names = set(ACTIVATIONS if peak > 0 else ())
        for size in PEAKS:
            scaled = x * (size / max(peak, 1e-30))
            gate, up = own.gate_proj(scaled), own.up_proj(scaled)
            product = own.act_fn(gate) * up
            if not relative_error(own.down_proj(product), own.forward(scaled)) <= rounding(like.dtype):
                return None
            # Where the tanh is near -1, what torch adds 1 to it leaves has few digits.
            lost = 4 * torch.finfo(torch.float32).eps * (gate.double() * up.double()).abs()
            names = {name for name in names if agree(gated_product(gate, up, name), product, 2, lost)}
        return names.pop() if len(names) == 1 else None

    def run(self, x: Tensor, way: str) -> Tensor:
        return self.own.down_proj(gated_product(self.own.gate_proj(x), self.own.up_proj(x), way))
