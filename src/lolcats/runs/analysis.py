"""The analysis of a run or a saved model: what `lolcats.evaluation.analysis` needs, from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lolcats.config import RunConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis import Analysis, AnalysisSettings, Models, analyse
from lolcats.evaluation.analysis.file import LoraModule
from lolcats.evaluation.analysis.lora import lora_modules
from lolcats.evaluation.analysis.run import Progress
from lolcats.evaluation.compare import Loaded, held_out_segments, load_variants, read_segments
from lolcats.models.context import check_context
from lolcats.models.vocabulary import vocabulary_size
from lolcats.runs.artefact import RECIPE_FILE
from lolcats.runs.folder import CHECKPOINTS, RunFolder
from lolcats.runs.trained import PARAMETER, added_file
from lolcats.training.checkpoint import load_tensors

SEGMENTS, LENGTH = 2, 1024
"""Where neither the caller nor a recipe says otherwise."""


def analyse_folder(
    source: str | Path,
    *,
    teacher: str | Path | None = None,
    sources: Sequence[str] = (),
    local: Mapping[str, str] | None = None,
    segments: int = SEGMENTS,
    length: int | None = None,
    settings: AnalysisSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Analysis:
    """Analyse a finished run, or a linearized model on disk; the files go into its folder.

    Args:
        source: the folder of a run, or of a model.
        teacher: None is that of its recipe; "none" compares with softmax attention on the model's own weights.
        sources, local: text to read; none is the text that the run held out, else "python-docs". As in `compare`.
        segments: how many to read at most.
        length: tokens of each; None is as the recipe measures, else 1,024.
        settings: how much is looked at.
        device, dtype: as in `compare`.
        progress: called with (parts of the work done, all).

    Raises:
        LolcatsError: there is no such folder, no finished model in it, or nothing linearized; a teacher or text that
            cannot be used.
    """
    place = Path(source)
    run, model = _find(place)
    recipe = load_config(file) if (file := model / RECIPE_FILE).is_file() else None
    if teacher is None and recipe is not None:
        teacher = recipe.model
    teacher = None if teacher in (None, "none") else teacher
    loaded = load_variants(model, teacher=teacher, controls=(), device=device, dtype=dtype)
    if "student" not in loaded.variants:
        raise LolcatsError(f"{model} has no linearized layers, so there is nothing to compare its attention with")
    held_out = recipe if not sources else None
    sources = list(sources) or ["python-docs"]
    length = length or (LENGTH if recipe is None else recipe.evaluation.segment_length or recipe.data.sequence_length)
    text = _segments(loaded, held_out, sources, local, segments, length)
    found = Models(
        name=str(source),
        student=loaded.variants["student"].model,
        tokenizer=loaded.tokenizer,
        teacher_name=None if teacher is None else str(teacher),
        teacher=None if loaded.teacher is None else loaded.teacher.model,
        stage_1=None if run is None or not added_file(run).is_file() else load_tensors(added_file(run))[0],
        lora=[] if run is None else updates_of(run),
    )
    name = ", ".join(sources) if held_out is None else f"held out: {', '.join(held_out.data.source_names)}"
    return analyse(found, text, name, place, settings, progress)


def _find(place: Path) -> tuple[RunFolder | None, Path]:
    """The run in a folder, if it is one, and the folder of its model."""
    run = RunFolder(place) if (place / "config.yaml").is_file() else None
    model = place if run is None else run.model
    if not (model / "config.json").is_file():
        raise LolcatsError(f"{place} is neither a finished run nor a saved model; finish it first", hint="finish_run")
    return run, model


def _segments(
    loaded: Loaded,
    held_out: RunConfig | None,
    sources: Sequence[str],
    local: Mapping[str, str] | None,
    count: int,
    length: int,
) -> Tensor:
    model = loaded.variants["student"].model
    check_context(model, length, "a segment")
    if held_out is not None:
        copies = {**held_out.data.local, **(local or {})}
        return held_out_segments(held_out, loaded.tokenizer, copies, length, None, count)
    return read_segments(sources, local, loaded.tokenizer, vocabulary_size(model), length, count)


def updates_of(run: RunFolder) -> list[LoraModule]:
    """What LoRA had made of the weights at the checkpoints of stage 2; nothing where it trained none.

    Raises:
        LolcatsError: a checkpoint cannot be read.
    """
    config = run.config().finetune
    if not config.enabled or config.method != "lora":
        return []
    steps: dict[int, dict[str, Tensor]] = {}
    for file in (run.checkpoints("finetune") / name for name in CHECKPOINTS):
        if file.is_file():
            tensors, metadata = load_tensors(file)
            steps[metadata["step"]] = {n: t for n, t in tensors.items() if n.startswith(PARAMETER)}
    return lora_modules(steps, config.alpha / config.rank)
