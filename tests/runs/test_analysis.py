"""The analysis of real short runs: what is written agrees with the runs, and can be limited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lolcats import LolcatsError, RunConfig, linearize
from lolcats.evaluation.analysis import AnalysisSettings, read_analysis, read_maps
from lolcats.runs.analysis import analyse_folder

BLEND = ("linearization.mixer=blend", "linearization.kept.pairs=5", "linearization.bits=8", "linearization.window=6",
         "linearization.sinks=1", "linearization.start=matched", "linearization.layers=[1]")  # fmt: skip
FEW = AnalysisSettings(map_tokens=6, prompts=("The river",), new_tokens=4)


@pytest.mark.slow
def test_a_run_with_lora(make_config: Callable[..., RunConfig]) -> None:
    """All sections, from one partly linearized run of both stages; errors fall in stage 1."""
    folder = linearize(make_config(*BLEND, "transfer.lr=3e-2"))
    seen: list[tuple[int, int]] = []
    found = analyse_folder(folder.path, length=24, settings=FEW, progress=lambda *parts: seen.append(parts))
    assert found == read_analysis(folder.path) and found.notes == {} and found.teacher == folder.config().model
    assert seen == [(n, seen[0][1]) for n in range(1, seen[0][1] + 1)]
    assert found.text is not None and (found.text.segments, found.text.length) == (2, 24)
    assert found.layers is not None and [layer.linearized for layer in found.layers] == [False, True]
    plain, layer = found.layers
    assert plain.error is None and plain.heads == [] and len(layer.heads) == 4
    assert layer.error_before is not None and layer.error_transfer is not None and layer.error is not None
    assert layer.error_transfer < layer.error_before and layer.error != layer.error_transfer
    assert found.kept is not None and [row.key_head for row in found.kept] == [0, 1]
    assert all(len(row.positions) == len(row.tokens) == 5 for row in found.kept)
    assert found.attention is not None and found.attention.layers == [1]
    for weights in read_maps(folder.path, found.attention)[0]:
        assert weights.shape == (1, 4, 6, 6)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=0.02)
    assert found.generations is not None and found.generations[0].prompt == "The river"
    lora = found.lora
    assert lora is not None and lora.layers == [1]
    assert (lora.error_before_lora, lora.error_after_lora) == ([layer.error_transfer], [layer.error])
    names = [f"{side}_proj" for side in "koqv"]
    assert [(module.layer, module.projection) for module in lora.modules] == [(1, name) for name in names]
    results = folder.results()
    assert all(module.steps[-1] == 5 and results.best["finetune"].step in module.steps for module in lora.modules)
    for module in lora.modules:
        assert all(norm is not None and norm > 0 for norm in module.norm)
        assert all(rank is not None and 1 <= rank <= 8 for rank in module.effective_rank)


@pytest.mark.slow
def test_a_run_without_a_second_stage(make_config: Callable[..., RunConfig]) -> None:
    """Its layers are as stage 1 left them, and there is no section of LoRA."""
    folder = linearize(make_config("finetune.enabled=false", "linearization.decay=gate"))
    limited = AnalysisSettings(layers=[1], map_tokens=0, prompts=())
    found = analyse_folder(folder.path, length=20, segments=1, settings=limited)
    assert found.lora is None and found.attention is None and found.generations is None and found.kept == []
    assert found.layers is not None and [layer.layer for layer in found.layers] == [1]
    assert found.layers[0].error == pytest.approx(found.layers[0].error_transfer, rel=1e-4)
    assert not (folder.path / "analysis.npz").exists()
    assert all(head.window_factor and head.decay and head.share for head in found.layers[0].heads)


@pytest.mark.slow
def test_a_model_alone(make_config: Callable[..., RunConfig], text_file: Path) -> None:
    """Its own softmax attention is the teacher where there is no other, and other text can be read."""
    folder = linearize(make_config(*BLEND[:6], "finetune.enabled=false"))
    few = AnalysisSettings(map_tokens=0, prompts=())
    own = analyse_folder(folder.model, teacher="none", sources=[str(text_file)], length=24, settings=few)
    assert own.teacher is None and "earlier errors" in own.notes and own.text is not None
    assert own.text.source == str(text_file)
    assert own.layers is not None and own.layers[0].error_before is None
    given = analyse_folder(folder.model, sources=[str(text_file)], length=24, settings=few)
    assert given.layers is not None and given.layers[0].error_before is not None
    assert given.layers[0].error == pytest.approx(
        own.layers[0].error, rel=1e-4
    )  # stage 1 left the weights as they were
    assert given == read_analysis(folder.model)


def test_what_cannot_be_analysed(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match="neither a finished run nor a saved model"):
        analyse_folder(tmp_path)
    with pytest.raises(LolcatsError, match="has no linearized layers"):
        analyse_folder(model_folder, device="cpu")
