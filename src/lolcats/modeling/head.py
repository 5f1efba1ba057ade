"""From the last hidden states to logits, by whatever a family does there.

A loss over many tokens makes its logits a few thousand tokens at a time, so it needs the model in two parts: the
decoder, which gives hidden states, and the rest. Both are found by watching the family's own forward pass. Where the
rest is one matrix with a scale and a cap, and gives the family's logits, it is computed so; in any other family its own
forward does it, with a decoder that hands out the given hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lolcats.errors import LolcatsError, NotFiniteError
from lolcats.placing import main_device

FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a family's code raises when it is called in a way that it is not made for."""
PROBE_TOKENS = 8
PROBE_SCALES = (1.0, 8.0)
"""Hidden states are also compared at a larger scale, where a cap of the logits cannot hide."""


class OutputHead:
    """The decoder of a model, and its map from hidden states [..., d_model] to float32 logits [..., vocabulary].

    Args:
        model: a causal language model with its weights; one forward pass of a few tokens shows what it does.

    Raises:
        LolcatsError: the model does not have the two parts.
    """

    def __init__(self, model: nn.Module) -> None:
        whole = getattr(model, "get_base_model", None)  # peft's wrapper
        self.model = cast(PreTrainedModel, model if whole is None else whole())
        was_training = self.model.training
        try:
            with torch.no_grad():
                self.model.eval()
                self._look()
        finally:
            self.model.train(was_training)

    def hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states [B, N, d_model]; `inputs` as for the model, those that are None left out."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self._alone:
            return self.decoder(**inputs).last_hidden_state
        kept: list[Any] = []
        hook = self.decoder.register_forward_hook(lambda _module, _args, output: kept.append(output))
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return kept[-1].last_hidden_state

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of all that comes after the decoder, those that it shares with the decoder included."""
        decoder = set(self.decoder.modules())
        rest = [module for module in self.model.modules() if module not in decoder]
        return list(dict.fromkeys(p for module in rest for p in module.parameters(recurse=False)))

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._by_matrix(hidden) if self.is_matrix else self._by_family(hidden)

    def _look(self) -> None:
        """Find the decoder, and how the family's logits come from its hidden states."""
        name = type(self.model).__name__
        self.decoder, output, logits = _watch(self.model)
        self._output_type = type(output)
        hidden = output.last_hidden_state
        self._alone = self._runs_alone(hidden)
        limit = tolerance(logits.dtype)
        if not bool(logits.isfinite().all()):
            raise NotFiniteError(f"{name} gives logits that are not finite; expected a model with finite weights")
        try:
            distance = relative_error(self._by_family(hidden), logits)
        except FAILURES as error:
            raise LolcatsError(f"{self._not_two_parts()}; it ends in {type(error).__name__}: {error}") from error
        if not distance <= limit:
            raise LolcatsError(f"{self._not_two_parts()}; the logits differ by {distance:.2g} (relative)")
        self.difference = distance
        self.is_matrix = isinstance(self.model.get_output_embeddings(), nn.Module) and all(
            self._matrix_error(hidden * scale) <= limit for scale in PROBE_SCALES
        )

    def _not_two_parts(self) -> str:
        return (
            f"{type(self.model).__name__} cannot be split into a decoder and a head: expected logits that follow from "
            f"the last hidden states of {type(self.decoder).__name__} alone"
        )

    def _runs_alone(self, hidden: Tensor) -> bool:
        """Whether the decoder may be called without the model, which some prepare inputs for."""
        ids = probe_ids(self.model)
        try:
            alone = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        except FAILURES:
            return False
        return relative_error(alone, hidden) <= tolerance(hidden.dtype)

    def _matrix_error(self, hidden: Tensor) -> float:
        try:
            return relative_error(self._by_matrix(hidden), self._by_family(hidden))
        except RuntimeError:  # a matrix for vectors of another size
            return float("inf")

    def _by_matrix(self, hidden: Tensor) -> Tensor:
        config = cast(Any, self.model.config.get_text_config(decoder=True))
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        cap = getattr(config, "final_logit_softcapping", None)
        logits = cast(nn.Module, self.model.get_output_embeddings())(hidden).float() * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _by_family(self, hidden: Tensor) -> Tensor:
        """The family's own forward, its decoder giving `hidden`."""
        rows = hidden.reshape(-1, *hidden.shape[-2:]) if hidden.ndim > 1 else hidden[None, None]
        if rows.shape[0] * rows.shape[1] == 0:
            return hidden.new_zeros(*hidden.shape[:-1], cast(Any, self.model.config).get_text_config().vocab_size)
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        with giving(self.decoder, self._output_type(last_hidden_state=rows)):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().reshape(*hidden.shape[:-1], -1)


def probe_ids(model: PreTrainedModel, tokens: int = PROBE_TOKENS) -> Tensor:
    """Random token ids [1, tokens], the same for equal vocabularies and none of them among the first ones."""
    vocabulary = int(cast(Any, model.config).get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    first = min(3, vocabulary - 1)  # padding, start and end of text
    return torch.randint(first, vocabulary, (1, tokens), generator=generator).to(main_device(model))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest distance of two vectors [..., V] by the length of the longest; infinite where it cannot be told."""
    if got.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    distance = (got.double() - expected).norm(dim=-1).max() / expected.norm(dim=-1).max().clamp_min(1e-30)
    return float(distance) if bool(distance.isfinite()) else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """How far the same formula may be from itself, relative: some roundings of the format in a row."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def _watch(model: PreTrainedModel) -> tuple[PreTrainedModel, Any, Tensor]:
    """The outermost module inside `model` that gives hidden states, what it gave, and the logits [1, T, V] from it."""
    seen: list[tuple[PreTrainedModel, Any]] = []

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, ModelOutput) and getattr(output, "last_hidden_state", None) is not None:
            seen.append((cast(PreTrainedModel, module), output))

    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    hooks = [module.register_forward_hook(note) for module in inner]
    try:
        logits = model(input_ids=probe_ids(model), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise LolcatsError(
            f"{type(model).__name__} has no part that gives last hidden states; expected a decoder and a head on it"
        )
    return *seen[-1], logits  # an outer module ends after the ones inside it


@contextmanager
def giving(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, calling `module` gives `output`, whatever it is called with."""
    own = module.__dict__.get("forward")  # accelerate puts one there
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
