"""Decoding steps that are recorded once as a CUDA graph and then replayed.

Python launches the kernels of a step one by one, which takes a small model twenty times as long as running them. The
forward pass of a linearized model therefore replays a recording wherever it is asked for one more token of each text
and nothing else; `generate` and every other caller see no difference. All other calls run as ever.

A recording has buffers of its own: the tokens, their positions, and the states of a batch of texts. While texts are
continued, their states live in these buffers; when other texts take them over, they are given a copy of theirs. So a
cache always holds its own state, and whatever else reads or changes a cache need not know of recordings.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lolcats.errors import LolcatsError, first_line
from lolcats.mixers import State, map_state, state_tensors
from lolcats.modeling.agreement import check_agree
from lolcats.modeling.cache import LinearizedLayer, overwrite, same_form
from lolcats.modeling.decode_call import Call, read_call
from lolcats.modeling.fused import fused_copy
from lolcats.modeling.head import FAILURES, relative_error, tolerance
from lolcats.modeling.network import Network, may_run_otherwise, read_network
from lolcats.modeling.passes import unseen_values
from lolcats.modeling.recorders import Recorder, current_device, record_cuda
from lolcats.modeling.taking_back import moved_out

KEPT = 4
"""Recordings of a model, each with its buffers; the one that was not used for longest goes."""
Forward = Callable[..., Any]
"""A forward pass, of arguments by name."""


class _HeldLayer(LinearizedLayer):
    """A layer whose state stays in the tensors that it has; counting is for the caches that borrow them."""

    def __init__(self, state: State, seen: int) -> None:
        super().__init__()
        self.state, self.seen, self.is_initialized = state, seen, True

    def advance(self, state: State, tokens: int, whole: bool = True) -> None:
        """Write the new state over the old one."""
        assert self.state is not None
        if not same_form(self.state, state):
            raise RuntimeError("the state of a layer changes its form")
        overwrite(self.state, state)


class DecodeGraph:
    """One recording: a step of a batch of texts.

    Args:
        record: how.
        forward: of the family.
        network: what the recording takes for granted of the model.
        call: the first step, which is not done here.
        fused: the same as `forward` by fewer kernels, which is recorded if that can be; None: there is no such thing.

    Raises:
        RuntimeError: it cannot be recorded; or what the family raises (`FAILURES`).
    """

    def __init__(
        self, record: Recorder, forward: Forward, network: Network, call: Call, fused: Forward | None = None
    ) -> None:
        self.network, self.kind, self.side = network, call.kind, network.side(call.seen)
        self._thread, self._residents = threading.get_ident(), list[Any]()
        # Tensors of inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad(), current_device(call.ids.device):
            self._ids, self._positions = call.ids.clone(), call.own_positions().clone()
            self.states = [map_state(layer.state, _copied) for layer in call.layers]
            self._cache: Any = copy.copy(call.cache)
            other, _ = self._two_steps(forward, call, network.other(call.seen))
            expected = self._two_steps(forward, call, call.seen)
            if not relative_error(other, expected[0]) <= tolerance(other.dtype):
                raise RuntimeError("the model's step depends on numbers that a recording would not change")
            self.unfused = "" if fused is None else self._make_fused(record, fused, call, expected)
            """Why it is without the fused kernels that there are; else ""."""
            self.is_fused = fused is not None and not self.unfused
            if not self.is_fused:
                self._make(record, forward, call, expected)
        if self.unfused:
            warnings.warn(f"steps are recorded without fused kernels: {self.unfused}", stacklevel=2)
        own = {t.untyped_storage().data_ptr() for state in self.states for t in state_tensors(state)}
        self._moved_out = functools.partial(moved_out, own)

    def _make_fused(self, record: Recorder, fused: Forward, call: Call, expected: list[Tensor]) -> str:
        """Record the step of fewer kernels; why that fails, else ""."""
        try:
            steps = self._two_steps(
                fused, call, call.seen
            )  # here kernels are compiled, and modules compared with theirs
            # Each of these kernels may round once otherwise, in every layer: a model of 32 moves by more than one does.
            check_agree("the step of fused kernels", steps, expected, math.sqrt(len(call.layers)))
            self._make(record, fused, call, steps)
        except Exception as error:  # Triton's compiler raises what it likes; what is only faster must not end a text
            return first_line(error)
        return ""

    def _make(self, record: Recorder, forward: Forward, call: Call, expected: list[Tensor]) -> None:
        self._output, self._replay = record(lambda: self._run(forward))
        self._check(call, expected)

    def _two_steps(self, forward: Forward, call: Call, seen: int) -> list[Tensor]:
        """Logits of the call and of one after it, run as ever; the second reads what the first has written."""
        self._cache.layers = [_HeldLayer(state, seen) for state in self.states]
        self._begin(call)
        return [cast(Any, self._run(forward)).logits.clone() for _ in range(2)]

    def _begin(self, call: Call) -> None:
        for state, layer in zip(self.states, call.layers, strict=True):
            overwrite(state, layer.state)

    def _check(self, call: Call, expected: list[Tensor]) -> None:
        """Replay two steps and compare: a recording that is wrong must not be found out by its texts."""
        self._begin(call)
        for want in expected:
            self._replay()
            check_agree("the recorded step", [cast(Any, self._output).logits], [want])

    def _run(self, forward: Forward) -> ModelOutput:
        """The step on the buffers. Kernels are compiled, and rotations found, in those before the recording."""
        with unseen_values():
            output = forward(
                input_ids=self._ids, position_ids=self._positions, past_key_values=self._cache, use_cache=True,
                return_dict=True,
            )  # fmt: skip
        if not all(isinstance(x, Tensor) or x is self._cache for x in output.values()):
            raise RuntimeError(f"the model returns {', '.join(output)}, which are not all tensors")
        return output

    def takes(self, call: Call) -> bool:
        """Whether this is a recording of such a step, and nobody else's texts are in it."""
        if call.kind != self.kind or self.network.side(call.seen) != self.side or len(call.layers) != len(self.states):
            return False
        if not self._is_home(call.layers):
            others = [layer for ref in self._residents if (layer := ref()) is not None and layer not in call.layers]
            if others and self._thread != threading.get_ident():
                return False  # another thread may be at work on them
            if not all(same_form(s, layer.state) for s, layer in zip(self.states, call.layers, strict=True)):
                return False
        return self.network.is_same()

    def _is_home(self, layers: list[Any]) -> bool:
        return all(layer.state is state for layer, state in zip(layers, self.states, strict=True))

    def run(self, call: Call) -> ModelOutput:
        """The step."""
        for layer in call.layers:
            layer.record.prepare_step(layer.point)
        self._settle(call.layers)
        self._ids.copy_(call.ids)
        self._positions.copy_(call.own_positions())
        self._replay()
        for layer, state in zip(call.layers, self.states, strict=True):
            layer.advance(state, 1)
        parts = {n: x.clone() if isinstance(x, Tensor) else call.cache for n, x in self._output.items()}
        return type(self._output)(**parts)

    def _settle(self, layers: list[Any]) -> None:
        """Bring the states of these layers into the buffers, after a copy of what else is there and still needed."""
        self._thread = threading.get_ident()
        if self._is_home(layers):
            return
        for ref in self._residents:
            if (other := ref()) is not None:
                other.record.map(self._moved_out)
                if other not in layers:
                    other.state = map_state(other.state, self._moved_out)
        for layer, state in zip(layers, self.states, strict=True):
            overwrite(state, layer.state)
            layer.state = state
        self._residents = [weakref.ref(layer) for layer in layers]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


class DecodeGraphs:
    """The recordings of a model.

    Args:
        enabled: whether steps are recorded at all.
        record: how.
        device: type of the devices on which.
        fuses: whether with fewer kernels (`modeling.fused`), where they can be.
    """

    def __init__(
        self, enabled: bool = True, record: Recorder = record_cuda, device: str = "cuda", fuses: bool = True
    ) -> None:
        self.enabled, self.record, self.device, self.fuses = enabled, record, device, fuses
        self.recordings: list[DecodeGraph] = []
        """The last used one first."""
        self.replays = 0
        """Steps that were replayed."""
        self._seen_once: dict[tuple[Any, ...], Network] = {}
        self._refused: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, and a model that was pickled, record anew."""
        return DecodeGraphs, (self.enabled, self.record, self.device, self.fuses)

    def clear(self) -> None:
        """Forget all recordings. Texts that are in their buffers keep them."""
        with self._lock:
            self.recordings, self._seen_once, self._refused = [], {}, set()

    def step(self, model: Any, forward: Forward, given: dict[str, Any]) -> ModelOutput | None:
        """The output of a call, replayed; None where it is to run as ever.

        Args:
            model: a linearized model.
            forward: its family's, which takes the model first.
            given: arguments by name.
        """
        call = read_call(given, model.config, self.device) if self.enabled else None
        if call is None or not may_run_otherwise(model, self.device):
            return None
        with self._lock:
            graph = next((graph for graph in self.recordings if graph.takes(call)), None)
            if graph is None and (network := self._warm_network(model, call)) is not None:
                graph = self._record(model, forward, network, call)
            if graph is None or not call.is_plain():
                return None
            self.recordings = [graph, *(other for other in self.recordings if other is not graph)][:KEPT]
            self.replays += 1
            return graph.run(call)

    def _warm_network(self, model: Any, call: Call) -> Network | None:
        """What a recording of this call may take for granted; None at the first call of a kind, which may be the last.

        None also where the model does what a recording would lose.
        """
        kind = (*call.kind, len(call.layers))
        if kind in self._refused:
            return None
        network = self._seen_once.pop(kind, None)
        if network is not None and network.is_same():
            return network
        network = read_network(model, call.ids.device)
        if network is not None and network.layers == len(call.layers):
            self._seen_once = {kind: network} if len(self._seen_once) > KEPT else {**self._seen_once, kind: network}
        return None

    def _record(self, model: Any, forward: Forward, network: Network, call: Call) -> DecodeGraph | None:
        copied = fused_copy(model, call.ids.device) if self.fuses else None
        fused = None if copied is None else functools.partial(forward, copied)
        try:
            return DecodeGraph(self.record, functools.partial(forward, model), network, call, fused)
        except FAILURES as error:  # it cannot be in a graph, or there is no memory for one
            self._refused.add((*call.kind, len(call.layers)))
            warnings.warn(f"decoding runs without CUDA graphs, which is slower: {first_line(error)}", stacklevel=2)
            return None


def graphs_of(model: PreTrainedModel) -> DecodeGraphs:
    """The recordings of a linearized model."""
    return vars(model).setdefault("_decode_graphs", DecodeGraphs())


def set_decode_graphs(model: nn.Module, enabled: bool) -> None:
    """Have a linearized model decode by CUDA graphs, as it does where nothing else is said, or not.

    Switched off, it also gives the memory of its recordings back, once the caches that were last used are gone.

    Args:
        model: a linearized model, or one that wraps it (peft).
        enabled: whether.

    Raises:
        LolcatsError: there is no linearized model.
    """
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel) and getattr(m, "decodes_by_graphs", False)]
    if not found:
        raise LolcatsError(f"expected a linearized model; {type(model).__name__} is none and has none in it")
    for one in found:
        graphs = graphs_of(one)
        graphs.enabled = enabled
        if not enabled:
            graphs.clear()
