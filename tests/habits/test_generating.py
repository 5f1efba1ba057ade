"""`generate` as people use it."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer, TextStreamer, pipeline, set_seed


def test_greedy(model: Any, inputs: Any) -> None:
    text = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    with torch.no_grad():
        full_pass = model(text, use_cache=False).logits.argmax(-1)
    new = inputs["input_ids"].shape[1]
    assert torch.equal(text[:, new:], full_pass[:, new - 1 : -1])


@pytest.mark.slow
def test_sampling_with_a_seed(model: Any, inputs: Any) -> None:
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 20, "num_return_sequences": 3}
    set_seed(1)
    first = model.generate(**inputs, **options)
    set_seed(1)
    assert torch.equal(first, model.generate(**inputs, **options))
    assert first.shape[0] == 3


@pytest.mark.slow
def test_beam_search(model: Any, inputs: Any) -> None:
    beams = model.generate(**inputs, num_beams=4, num_return_sequences=2, do_sample=False, max_new_tokens=12)
    slow = model.generate(
        **inputs, num_beams=4, num_return_sequences=2, do_sample=False, max_new_tokens=12, use_cache=False
    )
    assert torch.equal(beams, slow)


@pytest.mark.slow
def test_prompts_of_different_lengths(model: Any, tokenizer: Any) -> None:
    prompts = ["The river", "A miller lived there with his daughter", "Every star above it"]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, do_sample=False, max_new_tokens=12)[:, -12:]
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=12)
        assert torch.equal(alone[0, -12:], row)


def test_a_padded_batch_without_positions(model: Any, tokenizer: Any) -> None:
    """Positions count from a row's first real token, as `generate` counts them: feature maps would notice a shift."""
    tokenizer.padding_side = "left"
    prompts = ["The river", "A miller lived there with his daughter"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch).logits
        alone = model(**tokenizer(prompts[0], return_tensors="pt")).logits
    assert torch.allclose(logits[0, -alone.shape[1] :], alone[0], atol=1e-3)


@pytest.mark.slow
def test_stopping(model: Any, tokenizer: Any, inputs: Any) -> None:
    long = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    stop = tokenizer.decode(long[0, -8:-6])
    text = model.generate(**inputs, do_sample=False, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    assert text.shape[1] < long.shape[1] and stop in tokenizer.decode(text[0])

    def enough(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 24)

    rules = StoppingCriteriaList([enough])  # type: ignore[list-item]
    assert model.generate(**inputs, max_new_tokens=20, do_sample=False, stopping_criteria=rules).shape[1] == 24


@pytest.mark.slow
def test_streaming(model: Any, tokenizer: Any, inputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model.generate(**inputs, streamer=TextStreamer(tokenizer), do_sample=False, max_new_tokens=12)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = dict(inputs, streamer=streamer, do_sample=False, max_new_tokens=12)
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(whole)
    assert tokenizer.decode(inputs["input_ids"][0]) + "".join(pieces) in capsys.readouterr().out


def test_chat(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Who lived beside the river?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert answer.shape == (12,)


def test_pipeline(model: Any, tokenizer: Any, inputs: Any, folder: str) -> None:
    pipe = pipeline("text-generation", model=folder)
    [result] = pipe("The river runs through", do_sample=False, max_new_tokens=8, return_full_text=False)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert result["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.slow
def test_long_prompt_in_chunks(model: Any, tokenizer: Any) -> None:
    long = tokenizer("The river runs through a green valley. " * 8, return_tensors="pt")
    text = model.generate(**long, do_sample=False, max_new_tokens=8, prefill_chunk_size=16)
    assert torch.equal(text, model.generate(**long, do_sample=False, max_new_tokens=8))


def test_embeddings_instead_of_tokens(model: Any, inputs: Any) -> None:
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    text = model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=8)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert torch.equal(text, expected[:, -8:])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
def test_static_cache(model: Any, inputs: Any) -> None:
    """On a GPU each decoding step is then one CUDA graph; the state stays where it is in memory."""
    options = {"do_sample": False, "max_new_tokens": 20}
    static = model.generate(**inputs, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(**inputs, **options))
