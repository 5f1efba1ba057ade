"""The exported code runs the Triton kernels where there is a GPU, without the package.

On a machine without one Triton interprets the kernels, and the process is made to believe that its device takes them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats import RunConfig, export_model
from lolcats.runs.artefact import save_artefact
from lolcats.runs.results import Results

pytest.importorskip("triton")
READER = """
import pickle, sys
sys.modules["lolcats"] = sys.modules["pydantic"] = None
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder, ids, out, device = sys.argv[1:]
ids = torch.load(ids).to(device)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().to(device)
code = {name.rpartition(".")[2]: module for name, module in sys.modules.items() if "lolcats_" in name}
assert not [name for name in code if "kernels" in name]  # they are imported when they are needed
if device == "cpu":  # the interpreter takes tensors of the CPU
    code["lolcats_ops_hybrid_step"].kernels_available = lambda device: True
    for module in model.modules():
        if hasattr(module, "eager_impl"):
            module.impl = module.eager_impl = "triton"

def answer(model):
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        return [model(input_ids=ids).logits.cpu(), text.cpu()]

found = answer(model)
kernels = {name.rpartition(".")[2] for name in sys.modules if "lolcats_ops_hybrid_kernels" in name}
loss = model(input_ids=ids, labels=ids, use_cache=False).loss
loss.backward()
gradient = next(p.grad for n, p in model.named_parameters() if "feature_q" in n).cpu()
again = answer(pickle.loads(pickle.dumps(model)))
assert all(torch.equal(a, b) for a, b in zip(found, again))
torch.save([*found, gradient, sorted(kernels)], out)
"""


@pytest.fixture
def exported(make_student: Any, tiny_tokenizer: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A tiny student, and the folder of its export with code."""
    student = make_student(window=6, sinks=2, layers=[1])
    save_artefact(tmp_path / "model", student, tiny_tokenizer, RunConfig(), Results())
    return student, export_model(tmp_path / "model", tmp_path / "out", "remote-code").folder


def read_elsewhere(folder: Path, ids: Tensor, place: Path, device: str) -> list[Any]:
    """Logits, greedy text, a gradient and the kernels' modules, from a process without the package."""
    torch.save(ids, place / "ids.pt")
    (place / "reader.py").write_text(READER)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("HF_")}
    environment |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    words = map(str, [folder, place / "ids.pt", place / "answer.pt", device])
    done = subprocess.run(
        [sys.executable, "-I", str(place / "reader.py"), *words],
        env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(place / "answer.pt")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled")
def test_kernels_interpreted(exported: tuple[Any, Path], tokens: Any, tmp_path: Path) -> None:
    check(*exported, tokens(1, 14), tmp_path, "cpu", 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(exported: tuple[Any, Path], tokens: Any, tmp_path: Path) -> None:
    check(*exported, tokens(2, 100), tmp_path, "cuda", 2e-3)


def check(student: Any, folder: Path, ids: Tensor, place: Path, device: str, tolerance: float) -> None:
    """What the kernels found in another process is what plain PyTorch computes on the CPU in this one."""
    logits, text, gradient, kernels = read_elsewhere(folder, ids, place, device)
    assert {f"lolcats_ops_hybrid_kernels_{name}" for name in ("attention", "backward", "decode", "tiles")} <= {*kernels}
    out = student(input_ids=ids, labels=ids, use_cache=False)
    expected = out.logits.detach()
    torch.testing.assert_close(logits, expected, atol=tolerance * float(expected.std()), rtol=tolerance)
    with torch.no_grad():
        expected = student.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(text, expected)
    out.loss.backward()
    grad = next(p.grad for n, p in student.named_parameters() if "feature_q" in n)
    torch.testing.assert_close(gradient, grad, atol=tolerance * float(grad.abs().max()), rtol=tolerance)
