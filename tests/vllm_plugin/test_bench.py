"""`lolcats bench --engine vllm`: rows of vLLM's engine, its pages counted, configurations without weights."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lolcats.cli import main
from lolcats.evaluation.speed import SpeedSettings, Subjects
from lolcats.modeling import linearized_layers
from lolcats.serving.vllm_bench import find_jobs
from lolcats.serving.vllm_bench.engine import explain
from lolcats.serving.vllm_plugin.layout import PageLayout
from vllm_plugin.equality import by_vllm
from vllm_plugin.test_offline import RECOMMENDED

pytestmark = pytest.mark.slow
PAGES, MANY = 6, 6
"""Pages, of which one is nobody's; and texts, for which they are too few."""
PIECES, BLOCK = 64, 32
"""Tokens that the engine takes in a step, so prompts are read in several; tokens in a page of keys and values."""
CONTEXT, TOKENS = 90, 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(linearized: Callable[..., Path]) -> Path:
    return linearized(**RECOMMENDED)


def state_bytes(folder: Path) -> int:
    """Of a text, from the layers themselves."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return PageLayout.of([layer.mixer.state_spec(torch.float32) for layer in linearized_layers(model)]).nbytes


def test_a_student_and_its_teacher(
    folder: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A text more than there are pages for is not timed. What a page takes is counted here from the layers."""
    options = f'{{"max_num_batched_tokens": {PIECES}, "num_gpu_blocks_override": {PAGES}, "block_size": {BLOCK}}}'
    words: list[Any] = ["bench", folder, "--teacher", teacher, "--engine", "vllm", "--vllm-options", options]
    words += ["--no-graphs", "--batch", f"1,{MANY}", "--context", CONTEXT, "--tokens", TOKENS, "--repeat", 1]
    assert main([str(word) for word in [*words, "--csv", tmp_path / "x.csv", "--dtype", "float32"]]) == 0
    out = capfd.readouterr().out
    with (tmp_path / "x.csv").open() as file:
        rows = {(line["variant"], int(line["batch"])): line for line in csv.DictReader(file)}
    assert list(rows) == [(variant, batch) for variant in ("student", "teacher") for batch in (1, MANY)]
    lead = math.ceil(CONTEXT / (PIECES - 1)) + 2
    token = 3 * 2 * 2 * 32 * 4  # layers, keys and values, key heads, their size, bytes
    blocks = math.ceil((CONTEXT + lead + TOKENS - 1) / BLOCK)  # the last token is never read
    expected = {
        "student": ("blend", state_bytes(folder), PAGES - 1),
        "teacher": ("CPU_ATTN", blocks * BLOCK * token, (PAGES - 1) // blocks),
    }
    for (variant, batch), line in rows.items():
        attention, memory, fit = expected[variant]
        assert (line["engine"], line["attention"], line["dtype"]) == ("vllm", attention, "float32")
        assert line["vllm"].startswith("0.32") and float(line["text_memory"]) >= float(line["text_memory_computed"])
        if batch > fit:
            assert line["step_seconds"] == line["first_token_seconds"] == line["steps"] == ""
            continue
        assert float(line["text_memory"]) == memory and int(line["texts_that_fit"]) == fit
        assert float(line["step_seconds"]) > 0 and float(line["first_token_seconds"]) > 0 and line["steps"] == "eager"
    assert "fit at once" in out and "vllm 0.32" in out


def test_what_vllm_refuses_is_said_in_a_line(folder: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        by_vllm(folder, kv_cache_memory_bytes=4096)
    assert re.fullmatch(r"the states of a request take .*and vLLM has about .*", explain(refusal.value))


def test_configurations_alone(teacher: Path, tmp_path: Path) -> None:
    """vLLM fills all parameters; what is no such number must not be lost, and nothing may be infinite."""
    subjects = Subjects(str(teacher), str(teacher), "recommended", True, CPU, "float32")
    for job in find_jobs(subjects, SpeedSettings((1,), (CONTEXT,)), tmp_path, {}):
        folder = Path(job.order.arguments["model"])
        for text in by_vllm(folder, lengths=(33, 131), load_format=job.order.arguments["load_format"])[0]:
            assert text.tokens and all(math.isfinite(x) for x in text.logprobs)
