"""`lolcats bench --engine vllm`: rows of vLLM's engine, its pages counted, configurations without weights."""

from __future__ import annotations

import csv
import json
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
from lolcats.serving.vllm_bench.engine import explain, measure
from lolcats.serving.vllm_plugin.layout import PageLayout
from vllm_plugin.equality import by_vllm
from vllm_plugin.test_offline import RECOMMENDED

pytestmark = pytest.mark.slow
PAGES, MANY = 6, 6
"""Pages, of which one is nobody's; and texts, for which they are too few."""
PIECES, BLOCK = 64, 32
"""Tokens that the engine takes in a step, so prompts are read in several; tokens in a page of keys and values."""
CONTEXT, TOKENS = 90, 16
OPTIONS = {"max_num_batched_tokens": PIECES, "num_gpu_blocks_override": PAGES, "block_size": BLOCK}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(linearized: Callable[..., Path]) -> Path:
    return linearized(**RECOMMENDED)


def state_bytes(folder: Path) -> int:
    """Of a text, from the layers themselves."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return PageLayout.of([layer.mixer.state_spec(torch.float32) for layer in linearized_layers(model)]).nbytes


def test_a_student(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the command line, in an engine's process. A text more than there are pages for is not timed."""
    words: list[Any] = ["bench", folder, "--teacher", "none", "--engine", "vllm", "--no-graphs", "--dtype", "float32"]
    words += ["--batch", f"1,{MANY}", "--context", CONTEXT, "--tokens", TOKENS, "--repeat", 1]
    words += ["--csv", tmp_path / "x.csv", "--vllm-options", json.dumps(OPTIONS)]
    assert main([str(word) for word in words]) == 0
    out = capfd.readouterr().out
    with (tmp_path / "x.csv").open() as file:
        one, many = csv.DictReader(file)
    each = state_bytes(folder)
    for line in one, many:
        assert (line["engine"], line["variant"], line["attention"]) == ("vllm", "student", "blend")
        assert float(line["text_memory"]) == each >= float(line["text_memory_computed"])
        assert int(line["texts_that_fit"]) == PAGES - 1 and line["vllm"].startswith("0.32")
    assert float(one["step_seconds"]) > 0 and float(one["first_token_seconds"]) > 0 and one["steps"] == "eager"
    assert many["step_seconds"] == many["first_token_seconds"] == many["steps"] == ""
    assert "fit at once" in out and "vllm 0.32" in out


def test_a_teacher(teacher: Path, tmp_path: Path) -> None:
    """Blocks of keys and values are counted as they are given out; the last token is never read."""
    subjects = Subjects(str(teacher), None, None, False, CPU, "float32")
    settings = SpeedSettings((1, MANY), (CONTEXT,), tokens=TOKENS, repeat=1, graphs=False)
    (job,) = find_jobs(subjects, settings, tmp_path, OPTIONS)
    one, many = measure(job.order)
    token = 3 * 2 * 2 * 32 * 4  # layers, keys and values, key heads, their size, bytes
    blocks = math.ceil((CONTEXT + job.order.cases[0].lead + TOKENS - 1) / BLOCK)
    assert (one.times.memory, one.fit, one.attention) == (blocks * BLOCK * token, (PAGES - 1) // blocks, "CPU_ATTN")
    assert one.times.step is not None and one.times.step > 0 and one.times.first_token is not None
    assert one.times.steps == "eager" and many.times.step is None and many.fit < MANY


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
