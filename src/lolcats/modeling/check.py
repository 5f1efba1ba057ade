"""The self-check: whether a family's facts are honoured, on a short text, before anything is trained.

Widened to the whole text (`Mixer.widened`), a linearized layer is softmax attention. So whatever a family does with its
attention, its masks, its cache and its logits can be compared with the plain model, which is the same model with its
own attention modules put back for a moment. Nothing is copied, and all is put back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError, NotFiniteError
from lolcats.modeling.attention import FULL, SOFTMAX, LinearizedAttention, attention_mode, linearized_layers
from lolcats.modeling.calls import attention_named
from lolcats.modeling.convert import convert
from lolcats.modeling.head import FAILURES, OutputHead, probe_ids, relative_error, tolerance
from lolcats.models.quantization import is_quantized

TOKENS, PADDING, LATER = 24, 3, 5
"""Length of the text, tokens of padding before it, and tokens at its end that are changed to see whom they reach."""
FLOORS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
"""Smallest tolerances, relative: sums in another order, in models of many layers."""
CEILING = 0.15
"""Largest tolerance, however far the plain model is from itself: a fact that is not honoured is off by more."""


@dataclass(frozen=True)
class Fact:
    """One thing that must hold, and how far it is from holding."""

    name: str
    meaning: str
    """What holds if it is `ok`."""
    value: float
    """Relative distance of logits, or a number of mistakes; infinite where it could not be computed."""
    tolerance: float
    problem: str = ""
    """What came instead of a number."""

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.value <= self.tolerance


class FamilyCheck(NamedTuple):
    """All facts of a model."""

    model: str
    """Class of the model."""
    facts: tuple[Fact, ...]

    @property
    def ok(self) -> bool:
        """Whether all hold."""
        return all(fact.ok for fact in self.facts)

    def require(self) -> None:
        """Raise LolcatsError naming the first fact that does not hold."""
        for fact in self.facts:
            if not fact.ok:
                got = fact.problem or f"it is off by {fact.value:.2g} where {fact.tolerance:.2g} is rounding"
                raise LolcatsError(
                    f"{self.model} does something that lolcats does not see: expected that {fact.meaning}; {got}"
                )


def check_family(model: PreTrainedModel, input_ids: Tensor | None = None) -> FamilyCheck:
    """Convert a copy of a model and check it; the model stays as it is, so memory must hold two.

    Args:
        model: any decoder-only model.
        input_ids: [1, N] token ids, None takes random ones.

    Raises:
        LolcatsError: the model cannot be linearized.
    """
    return check_model(convert(copy.deepcopy(model), LinearizationConfig(), seed=0), input_ids)


@torch.no_grad()
def check_model(model: PreTrainedModel, input_ids: Tensor | None = None) -> FamilyCheck:
    """Check a linearized model in place: some thirty forward passes of a few tokens, after which it is what it was.

    Args:
        model: a linearized model on any device, of any dtype, quantized or not.
        input_ids: [1, N] token ids, None takes random ones.
    """
    assert linearized_layers(model), "expected a linearized model"
    was_training = model.training
    try:
        model.eval()
        ids = probe_ids(model, _length(model)) if input_ids is None else input_ids[:1].to(model.device)
        facts = _facts(model, ids)
    finally:
        model.train(was_training)
    return FamilyCheck(type(model).__name__.removeprefix("Linearized"), tuple(facts))


def _length(model: PreTrainedModel) -> int:
    table = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(TOKENS, int(table)) if table else TOKENS


def _facts(model: PreTrainedModel, ids: Tensor) -> list[Fact]:
    runs = {"full": _full, "cache": _cached, "pieces": _pieces, "padding": _padded}
    facts = [_head(model), _visits(model, ids)]
    with plain_attention(model):
        plain = {name: _result(run, model, ids) for name, run in runs.items()}
        later = _result(_full, model, torch.cat([ids[:, :-LATER], ids[:, :LATER]], 1))
    full = plain["full"]
    if isinstance(full, str):
        return [*facts, Fact("plain", "the plain model runs", float("inf"), 0.0, full)]
    limit = _tolerance(model, plain, full)

    def compare(name: str, meaning: str, got: Tensor | str, expected: Tensor | str) -> None:
        if isinstance(expected, str):
            return  # what the plain model cannot do is not asked for
        if isinstance(got, str):
            facts.append(Fact(name, meaning, float("inf"), limit, got))
        else:
            facts.append(Fact(name, meaning, _distance(got, expected, model.dtype), limit))

    compare("causal", "a later token changes no earlier logits", _cut(later), _cut(full))
    with attention_mode(model, SOFTMAX):
        for name, words in (("full", ""), ("pieces", " with a cache, in pieces")):
            got = _result(runs[name], model, ids)
            compare(f"softmax, {name}", f"softmax mode gives the plain model's logits{words}", got, plain[name])
    whole = "a window over the whole text gives the plain model's logits"
    words = {"full": "", "cache": " with a cache", "pieces": " with a cache, in pieces", "padding": ", left padded"}
    with _whole_window(model, ids.shape[1] + PADDING):
        for name, run in runs.items():
            compare(f"window, {name}", whole + words[name], _result(run, model, ids), plain[name])
    return facts


def _head(model: PreTrainedModel) -> Fact:
    meaning, limit = "its logits follow from its last hidden states", tolerance(model.dtype)
    try:
        return Fact("head", meaning, OutputHead(model).difference, limit)
    except NotFiniteError:  # no fact of the family: its weights are at fault
        raise
    except LolcatsError as error:
        return Fact("head", meaning, float("inf"), limit, str(error))
    except FAILURES as error:
        return Fact("head", meaning, float("inf"), limit, f"it ends in {type(error).__name__}: {error}")


def _visits(model: PreTrainedModel, ids: Tensor) -> Fact:
    """The interface is called once per linearized layer, in order."""
    layers, visits = linearized_layers(model), list[int]()

    def note(layer: LinearizedAttention, *_: Any) -> None:
        visits.append(layer.layer_idx)

    meaning = "each linearized layer calls the attention interface once per forward pass, in order"
    for layer in layers:
        layer.observer = note
    try:
        result = _result(_full, model, ids)
    finally:
        for layer in layers:
            layer.observer = None
    expected = [layer.layer_idx for layer in layers]
    problem = "" if visits == expected else f"layers {expected} were called as {visits}"
    if isinstance(result, str):
        problem = result
    return Fact("layers", meaning, float("inf") if problem else 0.0, 0.0, problem)


Run = Callable[[PreTrainedModel, Tensor], Tensor]


def _result(run: Run, model: PreTrainedModel, ids: Tensor) -> Tensor | str:
    """Logits [N, V], or why there are none."""
    try:
        logits = run(model, ids)[0].double()
    except (*FAILURES, NotImplementedError) as error:
        return str(error) if isinstance(error, LolcatsError) else f"it ends in {type(error).__name__}: {error}"
    return logits if bool(logits.isfinite().all()) else "some of the logits are not finite"


def _full(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _cached(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits


def _pieces(model: PreTrainedModel, ids: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    count = ids.shape[1]
    sizes = [count // 2, count // 4, 1, 1]
    parts = ids.split([*sizes, count - sum(sizes)], 1)
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


def _padded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The text behind padding, its positions counted from its first token where the family takes them."""
    padded = torch.cat([ids[:, :1].expand(1, PADDING), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    options: dict[str, Tensor] = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(input_ids=padded, use_cache=False, **options).logits[:, PADDING:]


def _cut(logits: Tensor | str) -> Tensor | str:
    return logits if isinstance(logits, str) else logits[:-LATER]


def _tolerance(model: PreTrainedModel, plain: dict[str, Tensor | str], full: Tensor) -> float:
    """What rounding may do: a few times the distance of the plain model from itself, with a cache and without."""
    noise = [
        _distance(got, full, model.dtype) for name in ("cache", "pieces") if not isinstance(got := plain[name], str)
    ]
    floor = FLOORS[torch.bfloat16] if is_quantized(model) else FLOORS.get(model.dtype, FLOORS[torch.bfloat16])
    return min(CEILING, max(floor, *(4 * distance for distance in noise), 0.0))


def _distance(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Relative distance of logits [N, V]: the worst token's; in low precision that of all tokens together.

    There a router may choose another expert for one token, by rounding alone.
    """
    if got.shape != expected.shape or dtype in (torch.float32, torch.float64):
        return relative_error(got, expected)
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the family's own attention modules stand in the place of the linearized ones: the plain model."""
    wrapped = {n: m for n, m in model.named_modules() if isinstance(m, LinearizedAttention)}
    name = model.config._attn_implementation
    if name not in ("eager", "sdpa"):
        name = "sdpa" if model._supports_sdpa else "eager"
    try:
        for path, layer in wrapped.items():
            _put(model, path, layer.inner)
        with attention_named(model, name):
            yield
    finally:
        for path, layer in wrapped.items():
            _put(model, path, layer)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def _whole_window(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Inside, the windows of all linearized layers are as long as the text."""
    layers = linearized_layers(model)
    before = [(layer, layer.mixer) for layer in layers]
    try:
        for layer in layers:
            layer.mixer = layer.mixer.widened(tokens)
        with attention_mode(model, FULL):
            yield
    finally:
        for layer, mixer in before:
            layer.mixer = mixer
