"""The whole analysis of a model, from its layers to what it writes, and the files that it leaves."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis.attention import Pooling, choose_maps, read_map, text_in_cells
from lolcats.evaluation.analysis.file import (
    MAPS,
    AnalysedText,
    Analysis,
    AttentionSection,
    KeptAnalysis,
    LayerAnalysis,
    LoraModule,
    LoraSection,
    Number,
    write_analysis,
)
from lolcats.evaluation.analysis.generations import PROMPTS, write_both
from lolcats.evaluation.analysis.kept import kept_pairs, token_texts
from lolcats.evaluation.analysis.layers import LayerMeter, transfer_errors
from lolcats.evaluation.analysis.maps import write_maps
from lolcats.evaluation.analysis.stream import LayerPass, Stream
from lolcats.evaluation.variants import student_variants, teacher_variants
from lolcats.modeling import linearized_layers
from lolcats.modeling.attention import added_parameters, measured_buffers
from lolcats.modeling.start import start_from_text
from lolcats.models.device import describe_device
from lolcats.models.generation import encode
from lolcats.placing import main_device

Progress = Callable[[int, int], None]
"""Called with (parts of the work done, all)."""


@dataclass(frozen=True)
class AnalysisSettings:
    """How much is looked at."""

    layers: Sequence[int] | None = None
    """Indices of linearized layers; None is all."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Name -> text of the attention maps; none: the first segment."""
    map_tokens: int = 96
    """Cells of a map's side at most; longer texts are pooled. 0 is no maps."""
    map_bytes: int = 1_500_000
    """Of all maps, before they are compressed: as many layers get maps as have room."""
    prompts: Sequence[str] = PROMPTS
    """What both models continue; none: nothing is written."""
    new_tokens: int = 40
    """Of a continuation."""


@dataclass
class Models:
    """What is analysed.

    `teacher` is converted as the student is, its mixers as conversion makes them; None: the student's own weights with
    softmax attention are the teacher.
    """

    name: str
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher_name: str | None = None
    teacher: PreTrainedModel | None = None
    stage_1: Mapping[str, Tensor] | None = None
    """What stage 1 left of all that the linearization added, by the names in the model."""
    lora: Sequence[LoraModule] = ()
    """See `lora_modules`."""


def analyse(
    models: Models,
    segments: Tensor,
    source: str,
    folder: Path,
    settings: AnalysisSettings | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Look into a linearized model, and write analysis.json and analysis.npz.

    Args:
        models: of which the teacher's mixers are changed here.
        segments: [S, N] tokens of text.
        source: what the text is called.
        folder: where the files go.
        settings: how much is looked at.
        progress: called now and then.

    Raises:
        LolcatsError: the models do not fit each other, nothing is linearized, or the folder cannot be written. What
            fails of maps and generations alone is a note.
    """
    return _Work(models, segments, settings or AnalysisSettings(), progress).done(source, folder)


class _Work:
    def __init__(self, models: Models, segments: Tensor, settings: AnalysisSettings, progress: Progress | None) -> None:
        self.models, self.segments, self.settings, self.progress = models, segments, settings, progress
        self.teacher = models.student if models.teacher is None else models.teacher
        self.stream = Stream(self.teacher, models.student, settings.layers)
        passes = 1 + (models.teacher is not None) + (models.teacher is not None and models.stage_1 is not None)
        texts = passes * len(segments) + (max(1, len(settings.texts)) if settings.map_tokens else 0)
        self.count = texts * len(self.stream.layers) + len(settings.prompts)
        self.finished = 0
        self.notes: dict[str, str] = {}

    def done(self, source: str, folder: Path) -> Analysis:
        models = self.models
        before, after = self._earlier_errors()
        layers, kept = self._layers(before, after)
        text = AnalysedText(source=source, segments=len(self.segments), length=self.segments.shape[1])
        analysis = Analysis(
            model=models.name,
            teacher=models.teacher_name,
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            device=describe_device(main_device(models.student)),
            dtype=str(models.student.dtype).removeprefix("torch."),
            text=text,
            layers=layers,
            kept=kept,
            notes=self.notes,
        )
        self._attempt("attention maps", lambda: setattr(analysis, "attention", self._maps(layers, folder)))
        self._attempt("generations", lambda: setattr(analysis, "generations", self._generations()))
        analysis.lora = self._lora(layers)
        write_analysis(folder, analysis)
        return analysis

    def _tick(self, parts: int = 1) -> None:
        self.finished += parts
        if self.progress is not None:
            self.progress(min(self.finished, self.count), self.count)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except LolcatsError as error:
            self.notes[what] = str(error)

    def _earlier_errors(self) -> tuple[dict[int, float], dict[int, float]]:
        """Errors of the training-free start and of what stage 1 left, where they are known."""
        teacher, only = self.models.teacher, self.stream.indices
        if teacher is None:
            self.notes["earlier errors"] = "the teacher is not known, so neither is how far its layers were at first"
            return {}, {}
        config = LinearizationConfig(**self.models.student.config.linearization)  # type: ignore[attr-defined]
        if config.starts_from_text:
            start_from_text(teacher, linearized_layers(teacher), self.segments)
        before = transfer_errors(teacher, self.segments, only, self._tick)
        if self.models.stage_1 is None:
            return before, {}
        put_in(teacher, self.models.stage_1)
        return before, transfer_errors(teacher, self.segments, only, self._tick)

    def _layers(
        self, before: Mapping[int, float], after: Mapping[int, float]
    ) -> tuple[list[LayerAnalysis], list[KeptAnalysis]]:
        meters = {index: LayerMeter() for index in self.stream.indices}
        kept: list[KeptAnalysis] = []
        tokens = token_texts(self.models.tokenizer, self.segments[0])

        def visit(seen: LayerPass) -> None:
            meters[seen.layer].add(seen)
            self._tick()

        def visit_first(seen: LayerPass) -> None:
            kept.extend(kept_pairs(seen, tokens))
            visit(seen)

        for number, text in enumerate(self.segments):
            self.stream.read(text, visit if number else visit_first)
        config = self.models.student.config.get_text_config(decoder=True)
        all_linearized = {layer.layer_idx for layer in linearized_layers(self.models.student)}
        found = []
        for index in range(int(config.num_hidden_layers)):
            if index in meters:
                errors = {"error_before": before.get(index), "error_transfer": after.get(index)}
                found.append(meters[index].found(index).model_copy(update=errors))
            elif index not in all_linearized:
                found.append(LayerAnalysis(layer=index, linearized=False))
        return found, kept

    def _maps(self, layers: Sequence[LayerAnalysis], folder: Path) -> AttentionSection | None:
        if not self.settings.map_tokens:
            return None
        tokenizer = self.models.tokenizer
        texts = {name: encode(tokenizer, text)[0] for name, text in self.settings.texts.items()}
        texts = texts or {"the first segment": self.segments[0]}
        pools = {name: Pooling.of(len(ids), self.settings.map_tokens) for name, ids in texts.items()}
        chosen, heads = choose_maps(layers, [pool.cells for pool in pools.values()], self.settings.map_bytes)
        stream = Stream(self.teacher, self.models.student, chosen)
        maps = [read_map(stream, texts[name], pools[name], heads, self._tick) for name in texts]
        if left := len(self.stream.layers) - len(chosen):  # of those that have no room there is nothing to do
            self._tick(len(texts) * left)
        shown = [text_in_cells(tokenizer, name, texts[name], pools[name]) for name in texts]
        digest = write_maps(folder, maps)
        return AttentionSection(file=MAPS, digest=digest, texts=shown, layers=stream.indices, heads=heads)

    def _generations(self) -> object:
        student = student_variants(self.models.student, [])["student"]
        teacher = teacher_variants(self.teacher)["teacher"]
        prompts, count = self.settings.prompts, self.settings.new_tokens
        return write_both(teacher, student, self.models.tokenizer, prompts, count, self._tick) or None

    def _lora(self, layers: Sequence[LayerAnalysis]) -> LoraSection | None:
        if not self.models.lora:
            return None
        linearized = [layer for layer in layers if layer.linearized]
        before: list[Number] = [layer.error_transfer for layer in linearized]
        return LoraSection(
            modules=list(self.models.lora),
            layers=[layer.layer for layer in linearized],
            error_before_lora=[] if None in before else before,
            error_after_lora=[layer.error for layer in linearized],
        )


def put_in(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give a model what a linearization added, by name.

    Raises:
        LolcatsError: some of it is missing.
    """
    held = {**added_parameters(model), **measured_buffers(model)}
    if missing := held.keys() - tensors.keys():
        raise LolcatsError(
            f"what stage 1 left does not fit the model: {len(missing)} tensors of {len(held)} are missing, "
            f"{sorted(missing)[0]} among them"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(tensors[name])
