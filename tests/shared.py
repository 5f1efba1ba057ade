"""Fixtures of all tests: tiny models, tokens and tokenizers. Nothing is downloaded."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lolcats
from interpreter import hasten, rounded_to_nearest
from lolcats.config import LinearizationConfig, RunConfig, load_config
from lolcats.data import PackedDataset
from lolcats.files import write_bytes
from lolcats.modeling import AttentionCall, LinearizedAttention, convert, linearized_layers
from lolcats.training import TrainingData
from tiny import TEXT, perturb, save_teacher, train_tokenizer

VOCABULARY = 97


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 asks transformers 5.23 a question by its old name.
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    # What torch.compile of torch 2.11 causes in torch itself.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests neither read nor fill the cache of whoever runs them. The processes of pytest-xdist share one.

    The index of lm-eval's tasks takes ten seconds, so pytest keeps it for the code that made it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    code = b"".join(
        file.read_bytes() for file in sorted((Path(lolcats.__file__).parent / "evaluation" / "harness").glob("*.py"))
    )
    kept = Path(request.config.rootpath) / ".pytest_cache" / f"lm-eval-{hashlib.sha256(code).hexdigest()[:16]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOLCATS_CACHE", str(base / "cache"))
        copy_whole(kept, base / "cache" / "lm-eval")
        yield
        copy_whole(base / "cache" / "lm-eval", kept)


def copy_whole(source: Path, target: Path) -> None:
    """Copy the files that are not there yet; other processes may do the same."""
    for file in source.glob("*.json"):
        if not (target / file.name).exists():
            target.mkdir(parents=True, exist_ok=True)
            write_bytes(target / file.name, file.read_bytes())


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> Iterator[None]:
    """The tensors are tiny: threads that wait for each other would cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fast_interpreter() -> None:
    """For tests that run Triton's kernels: its interpreter, where there is no GPU, wastes two thirds of its time."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        hasten()


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of kernels to the last bit: has the interpreter round to bfloat16 as compiled kernels do."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_convert_float", rounded_to_nearest(interpreter._convert_float))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For modules that only look at outputs: `pytestmark = pytest.mark.usefixtures("no_gradients")`."""
    with torch.no_grad():
        yield


def llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama whose attention is far from uniform; the same one for the same settings."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # texts of a fixed length
    return model


@pytest.fixture(scope="session")
def _llama() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def make_teacher() -> Callable[..., LlamaForCausalLM]:
    """Build a tiny Llama with other settings."""
    return llama


@pytest.fixture
def teacher(_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """A tiny Llama of 3 layers, 6 query heads and 2 key heads."""
    return copy.deepcopy(_llama)


@pytest.fixture
def make_student(_llama: LlamaForCausalLM) -> Callable[..., PreTrainedModel]:
    """Convert a copy of the teacher with the given settings and perturb what was added."""

    def make(model: PreTrainedModel | None = None, **settings: Any) -> PreTrainedModel:
        converted = convert(copy.deepcopy(_llama if model is None else model), LinearizationConfig(**settings), seed=0)
        return perturb(converted)

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random token ids [rows, length], none of them special."""

    def make(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (rows, length), generator=generator)

    return make


@pytest.fixture
def record_calls() -> Callable[[PreTrainedModel, Tensor], list[tuple[LinearizedAttention, AttentionCall, Tensor]]]:
    """Run a model as its teacher; return (layer, what reached its attention, softmax output) of each layer."""

    def run(model: PreTrainedModel, ids: Tensor) -> list[tuple[LinearizedAttention, AttentionCall, Tensor]]:
        found: list[tuple[LinearizedAttention, AttentionCall, Tensor]] = []
        for layer in linearized_layers(model):
            layer.observer = lambda *args: found.append(args)
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        finally:
            for layer in linearized_layers(model):
                layer.observer = None
        return found

    return run


def quadratic(layer: Any, call: AttentionCall) -> Tensor:
    """The hybrid [B, H, N, D] query by query, straight from the formula; for sliding windows without decay."""
    heads, n = call.q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (call.k, call.v))
    phi_q, phi_k = layer.mixer.feature_q(call.q), layer.mixer.feature_k(call.k)
    phi_q = phi_q * layer.mixer.query_scale.exp()[:, None, None]
    phi_k = phi_k.repeat_interleave(heads // phi_k.shape[1], 1)
    gate = layer.mixer.window_factor.sigmoid()[:, None]
    rows = []
    for i in range(n):
        near = [j for j in range(i + 1) if j > i - layer.mixer.settings.window or j < layer.mixer.settings.sinks]
        far = [j for j in range(i + 1) if j not in near]
        scores = torch.einsum("bhd,bhjd->bhj", call.q[:, :, i], k[:, :, near]) * call.scale
        soft = gate * (scores - scores.amax(-1, keepdim=True)).exp()
        linear = torch.einsum("bhf,bhjf->bhj", phi_q[:, :, i], phi_k[:, :, far])
        weights = torch.cat([soft, linear], -1)
        values = torch.cat([v[:, :, near], v[:, :, far]], 2)
        rows.append(torch.einsum("bhj,bhjd->bhd", weights, values) / weights.sum(-1, keepdim=True))
    return torch.stack(rows, 2)


@pytest.fixture(name="quadratic")
def quadratic_fixture() -> Callable[[Any, AttentionCall], Tensor]:
    """See `quadratic`."""
    return quadratic


def packed(ids: np.ndarray, document: np.ndarray | None = None, loss_mask: np.ndarray | None = None) -> PackedDataset:
    """Sequences as a dataset; by default one document a sequence and every token counted."""
    document = np.zeros_like(ids) if document is None else document
    loss_mask = np.ones(ids.shape, bool) if loss_mask is None else loss_mask
    return PackedDataset(ids.astype(np.int32), loss_mask, document.astype(np.int32))


@pytest.fixture(name="packed")
def packed_fixture() -> Callable[..., PackedDataset]:
    """See `packed`."""
    return packed


@pytest.fixture
def training_data(tokens: Callable[..., Tensor]) -> TrainingData:
    """Ten sequences of 20 tokens to train on, three to validate on."""
    return TrainingData(packed(tokens(10, 20, 7).numpy()), packed(tokens(3, 20, 8).numpy()))


@pytest.fixture(scope="session")
def text() -> str:
    """A few kilobytes of English."""
    return TEXT * 40


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, <end> among them."""
    return train_tokenizer([TEXT], pad_token="<end>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A teacher of two layers with its tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A few kilobytes of English in a file."""
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text(text)
    return path


@pytest.fixture
def make_config(model_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Settings of a run of five steps a stage; a test adds its own."""

    def make(*overrides: str) -> RunConfig:
        settings = [
            f"model={model_folder}", "name=try", f"runs_dir={tmp_path / 'runs'}", "device=cpu", "dtype=float32",
            "linearization.window=6", "linearization.sinks=1", "linearization.start=matched",
            f"data.sources=[{text_file}]", "data.sequence_length=24", "data.validation_sequences=3",
            "transfer.tokens=480", "transfer.batch_size=4", "transfer.warmup_steps=1", "transfer.checkpoint_every=2",
            "transfer.validate_every=2",
            "finetune.tokens=480", "finetune.batch_size=4", "finetune.warmup_steps=1", "finetune.checkpoint_every=2",
            "finetune.validate_every=2", "finetune.lr=1e-2", "finetune.kl_factor=1", "finetune.dropout=0.1",
            "evaluation.controls=[near_only,window_only,linear_only,no_attention,training_free,equal_window]",
        ]  # fmt: skip
        return load_config(None, [*settings, *overrides])

    return make
