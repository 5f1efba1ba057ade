"""Prompts are read by the copy of a model that has fewer kernels (`modeling.fused`), as recorded steps are.

In a prompt of 32,768 tokens of an 8B model norms, rotary embeddings and gated products are a fifth of the time, and in
a short one every kernel less is one that Python need not launch. A copy is good for as long as the model's modules are
what they were. When it is made, it reads the beginning of a text as the model does, and their logits are compared.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from lolcats.errors import first_line
from lolcats.modeling.agreement import check_agree
from lolcats.modeling.decode_call import is_prompt
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.fused import fused_copy
from lolcats.modeling.network import Network, may_run_otherwise, read_modules

COMPARED = 16
"""Tokens that the copy and the model read to be compared."""
Forward = Callable[..., Any]
"""A family's forward pass, which takes the model first."""


class FusedPrompts:
    """The copy of a model by which its prompts are read, made at the first of them."""

    def __init__(self) -> None:
        self.network: Network | None = None
        """What the copy takes for granted of the model; also where there is none."""
        self.copy: nn.Module | None = None
        self.read = 0
        """Prompts that the copy has read."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, and a model that was pickled, begin anew."""
        return FusedPrompts, ()

    def run(self, model: Any, forward: Forward, given: dict[str, Any]) -> ModelOutput | None:
        """The output of a call by the copy; None where it is to run as ever.

        Args:
            model: a linearized model.
            forward: its family's.
            given: arguments by name.
        """
        graphs = graphs_of(model)
        if not (graphs.enabled and graphs.fuses and is_prompt(given, model.config, graphs.device)):
            return None
        if not may_run_otherwise(model, graphs.device):
            return None
        with self._lock:
            if self.network is None or not self.network.is_same():
                self._renew(model, forward, given["input_ids"])
            copied = self.copy
            self.read += copied is not None
        return None if copied is None else forward(copied, **given)

    def _renew(self, model: Any, forward: Forward, ids: Tensor) -> None:
        """Make the copy, if there is something to fuse and it gives what the model gives."""
        self.network = self.copy = None
        if read_modules(model, ids.device) is None:
            return
        begin = ids[:1, :COMPARED]

        def logits(of: Any) -> Tensor:
            return cast(Any, forward(of, input_ids=begin, use_cache=False, return_dict=True)).logits

        copied = None
        try:
            want = logits(model)  # the first pass may find things out, which the modules then have in them
            copied = fused_copy(model, ids.device)
            if copied is not None:
                check_agree("the copy", [logits(copied)], [want], math.sqrt(model.config.num_hidden_layers))
        except Exception as error:  # Triton's compiler raises what it likes; what is only faster must not end a text
            warnings.warn(f"prompts are read without fused kernels: {first_line(error)}", stacklevel=2)
            copied = None
        self.copy, self.network = copied, read_modules(model, ids.device)


def prompts_of(model: nn.Module) -> FusedPrompts:
    """What reads the prompts of a linearized model."""
    return vars(model).setdefault("_fused_prompts", FusedPrompts())
