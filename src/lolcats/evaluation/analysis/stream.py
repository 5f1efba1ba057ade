"""The teacher's stream: a text is read by the teacher, and each of its linearized layers is looked at on the way.

Teacher and student are two models whose layers have the same mixers, or one that is its own teacher. A layer of the
student gets what the teacher's layer gets, so errors of earlier layers are not in it; its queries, keys and values are
those of its own projections, which stage 2 may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.mixers.inside import Inside
from lolcats.modeling import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.attention import SOFTMAX
from lolcats.placing import main_device


class LayerPass(NamedTuple):
    """A layer of both models at one text, a row."""

    layer: int
    teacher: AttentionCall
    output: Tensor
    """[1, H, N, Dv], of the teacher's softmax attention."""
    student: LinearizedAttention
    call: AttentionCall
    """The student's."""

    def student_output(self) -> Tensor:
        """[1, H, N, Dv]."""
        return self.student.mixer(self.call)[0]

    def inside(self) -> Inside:
        """What the student's layer does."""
        return self.student.mixer.inside(self.call)


class Stream:
    """Reads texts.

    Args:
        teacher: a converted model with the teacher's weights.
        student: the model that is looked at, which may be the same.
        only: indices of the layers to look at; None is all that are linearized.

    Raises:
        LolcatsError: the models do not fit each other, or have no layer that could be looked at.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, only: Collection[int] | None = None) -> None:
        self.teacher, self.student = teacher, student
        self._own = {layer.layer_idx: layer for layer in linearized_layers(student)}
        known = {layer.layer_idx for layer in linearized_layers(teacher)}
        if known != self._own.keys():
            raise LolcatsError(
                f"expected a teacher converted as the student is, with linearized layers {sorted(self._own)}; got "
                f"{sorted(known)}"
            )
        if unknown := set(only or ()) - known:
            raise LolcatsError(f"layers {sorted(unknown)} are not linearized; choose some of {sorted(known)}")
        self.layers = [layer for layer in linearized_layers(teacher) if only is None or layer.layer_idx in only]
        self._others = [layer for layer in linearized_layers(teacher) if layer not in self.layers]
        if not self.layers:
            raise LolcatsError("no layer to look at: expected a linearized model; call lolcats.convert first")

    @property
    def indices(self) -> list[int]:
        """Of the layers that are looked at, ascending."""
        return sorted(layer.layer_idx for layer in self.layers)

    @torch.no_grad()
    def read(self, ids: Tensor, visit: Callable[[LayerPass], object]) -> None:
        """Read one text, tokens [N]; `visit` is called with each layer as the teacher comes to it."""
        inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def remember(layer: LinearizedAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.clear()  # those of one layer alone are kept alive
            inputs[layer.layer_idx] = args, kwargs

        def observe(layer: LinearizedAttention, call: AttentionCall, output: Tensor) -> None:
            own = self._own[layer.layer_idx]
            theirs = call if own is layer else _call_of(own, *inputs[layer.layer_idx])
            visit(LayerPass(layer.layer_idx, _alone(call), output, own, _alone(theirs)))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.register_forward_pre_hook(remember, with_kwargs=True))
                stack.callback(setattr, layer, "observer", None)
                layer.observer = observe
            for layer in self._others:  # whoever is observed gives the teacher's output anyway
                stack.callback(setattr, layer, "mode", layer.mode)
                layer.mode = SOFTMAX
            self.teacher.base_model(input_ids=ids[None].to(main_device(self.teacher)), use_cache=False)


def _call_of(layer: LinearizedAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """What a layer's own projections make of the inputs of another."""
    found: list[AttentionCall] = []
    layer.observer = lambda _layer, call, _output: found.append(call)
    try:
        layer(*args, **kwargs)
    finally:
        layer.observer = None
    return found[0]


def _alone(call: AttentionCall) -> AttentionCall:
    """The call of one whole text: where softmax layers remain, their mask says so too."""
    return replace(call, padding=None, segments=None)
