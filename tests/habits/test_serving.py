"""The server of transformers with a linearized model, started as docs/habits.md says, asked by the client of OpenAI."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

PAGE = (Path(__file__).parents[2] / "docs" / "habits.md").read_text()
PATIENCE = 60
"""Seconds that the server may take to start."""

pytestmark = pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"')


def command_line(folder: str, port: int) -> list[str]:
    """The page's command for a folder and a port."""
    found = re.search(r"^```sh serve\n(.*?)^```$", PAGE, re.M | re.S)
    assert found is not None
    return shlex.split(found[1].replace("FOLDER", shlex.quote(folder)).replace("8000", str(port)))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until_ready(server: subprocess.Popen[str], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the server did not start; it said:\n{log.read_text()[-3000:]}")


@pytest.fixture
def port(folder: str, tmp_path: Path) -> Iterator[int]:
    """The server that the page starts, on a free port."""
    number = free_port()
    command = command_line(folder, number)
    assert command[0] == "python"
    log = tmp_path / "server.log"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, *command[1:], "--host", "127.0.0.1", "--device", "cpu", "--continuous-batching"],
            stdout=file, stderr=subprocess.STDOUT, env=offline, text=True,
        )  # fmt: skip
        try:
            wait_until_ready(server, f"http://127.0.0.1:{number}", log)
            yield number
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def greedy(folder: str, prompt: str, **options: Any) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", **options)
    text = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return tokenizer.decode(text[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_the_server_says_what_generate_says(folder: str, port: int) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "Who lived beside the river?"}]
    chat = client.chat.completions.create(model=folder, messages=messages, max_tokens=8, temperature=0)
    said = chat.choices[0].message.content
    chunks = client.chat.completions.create(model=folder, messages=messages, max_tokens=8, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    prompt = "The river runs through"
    completion = client.completions.create(model=folder, prompt=prompt, max_tokens=8, temperature=0)
    client.close()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert said == streamed == greedy(folder, text) != ""
    assert completion.choices[0].text == greedy(folder, prompt) != ""
    assert chat.usage is not None and chat.usage.completion_tokens == 8
