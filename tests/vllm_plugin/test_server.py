"""`lolcats serve`, asked by OpenAI's client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_plugin.test_offline import RECOMMENDED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE = 300
"""Seconds that the server may take to start."""
OPTIONS = {
    "--dtype": "float32",
    "--max-model-len": "512",
    "--max-num-seqs": "4",
    "--max-num-batched-tokens": "64",
    "--generation-config": "vllm",
    "--host": "127.0.0.1",
}
PROMPT = "the cat sat on the mat and looked at the moon while"
NEW = 12


@pytest.fixture(scope="module")
def folder(linearized: Callable[..., Path]) -> Path:
    return linearized(**RECOMMENDED)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "lolcats.cli", "serve", str(folder), "--port", str(port), "--enforce-eager"]
    command += [word for option in OPTIONS.items() for word in option]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130, -signal.SIGINT), log.read_text()[-3000:]
    assert "whose states take" in log.read_text()


def wait_until_ready(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    process.kill()
    pytest.fail(f"the server did not start; it said:\n{log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def client(server: str) -> OpenAI:
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def complete(client: OpenAI, folder: Path) -> Callable[..., Any]:
    """Asks for a completion, greedy unless told otherwise."""

    def ask(prompt: Any = PROMPT, **options: Any) -> Any:
        given = {"max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
        return client.completions.create(model=str(folder), prompt=prompt, **given | options)

    return ask


def test_the_server_says_what_generate_says(complete: Callable[..., Any], folder: Path) -> None:
    """Two prompts at once, with log probabilities."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [PROMPT, "a long river ran"]
    answer = complete(texts, logprobs=1)
    for text, choice in zip(texts, answer.choices, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            result: Any = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        written = result.sequences[0, ids.shape[1] :]
        assert choice.text == tokenizer.decode(written, skip_special_tokens=True)
        best = [float(logits.log_softmax(-1).max()) for logits in result.logits]
        assert choice.logprobs.token_logprobs == pytest.approx(best, abs=0.15)


def test_a_conversation_in_pieces(client: OpenAI, folder: Path) -> None:
    """Streamed or not, and with what was said before."""
    talk: Any = [{"role": "user", "content": "hello"}]
    options: Any = {"model": str(folder), "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
    for _ in range(2):
        whole = client.chat.completions.create(messages=talk, **options).choices[0].message.content
        stream = client.chat.completions.create(messages=talk, stream=True, **options)
        pieces = [part.choices[0].delta.content or "" for part in stream if part.choices]
        assert "".join(pieces) == whole and len(pieces) > 3
        talk += [{"role": "assistant", "content": whole}, {"role": "user", "content": "go on"}]


def test_a_text_stops_where_it_is_told_to(complete: Callable[..., Any]) -> None:
    text = complete().choices[0].text
    word = text[len(text) // 2 : len(text) // 2 + 3]
    choice = complete(stop=[word]).choices[0]
    assert choice.finish_reason == "stop" and choice.text == text[: text.index(word)]


def test_a_seed_makes_one_text(complete: Callable[..., Any]) -> None:
    texts = [complete(temperature=1.0, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_clients_that_leave(complete: Callable[..., Any]) -> None:
    """More of them than run at once; those that stay get what they get alone."""
    prompts = [f"{PROMPT} {i} rivers" for i in range(12)]
    alone = [complete(prompt).choices[0].text for prompt in prompts]

    def ask(number: int) -> str | None:
        if number % 3:
            return complete(prompts[number]).choices[0].text
        stream = complete(prompts[number], stream=True, max_tokens=300)
        next(iter(stream))
        stream.close()
        return None

    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(ask, range(12)))
    assert [x for x in together if x is not None] == [x for i, x in enumerate(alone) if i % 3]


@pytest.mark.parametrize("body", [b'{"model": ', b"[]", b'{"prompt": 3', b"\xff\xfe"])
def test_malformed_requests_are_refused(body: bytes, server: str, complete: Callable[..., Any]) -> None:
    request = urllib.request.Request(f"{server}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert 400 <= caught.value.code < 500
    assert complete().choices[0].text


def test_a_prompt_that_is_too_long(complete: Callable[..., Any]) -> None:
    with pytest.raises(BadRequestError, match="512"):
        complete([7] * 600)
    assert complete().choices[0].text
