"""Greedy texts of vLLM and of `generate`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

LENGTHS = (1, 3, 16, 17, 33, 64, 65, 131, 257)
FEW = (1, 33, 131)
"""Of prompts where other tests have the rest."""
NEW = 24


class Text(NamedTuple):
    """What was written after a prompt."""

    tokens: list[int]
    logprobs: list[float]
    """Of these tokens."""
    every: list[Tensor]
    """Of all tokens of the vocabulary, at each place; empty where it is not known."""
    cached: int = 0
    """Tokens of the prompt that were not read again."""


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Of these lengths, no two alike."""
    return [[(7 * i * i + 3 * i + 11 * j) % 240 + 5 for i in range(n)] for j, n in enumerate(lengths)]


def by_generate(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[Text]:
    """What transformers writes, a prompt at a time."""
    return written_by(AutoModelForCausalLM.from_pretrained(folder), lengths)


@torch.no_grad()
def written_by(model: Any, lengths: tuple[int, ...] = LENGTHS) -> list[Text]:
    """The same of a model in memory."""
    texts = []
    for prompt in prompts(lengths):
        ids = torch.tensor([prompt])
        result: Any = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = result.sequences[0, len(prompt) :].tolist()
        every = [logits[0].log_softmax(-1) for logits in result.logits]
        texts.append(Text(tokens, [float(x[t]) for x, t in zip(every, tokens, strict=True)], every))
    return texts


def by_vllm(
    folder: Path,
    passes: int = 1,
    lengths: tuple[int, ...] = LENGTHS,
    adapters: tuple[Path | None, ...] = (None,),
    **options: Any,
) -> list[list[Text]]:
    """What vLLM writes, all prompts at once, in pieces of 64 tokens and five requests.

    As often as asked, with each of the LoRA adapters.
    """
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    gc.freeze()  # what is imported is a million objects, and vLLM has garbage collected often
    given = {
        "enforce_eager": True, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 5,
        "max_num_batched_tokens": 64, "enable_prefix_caching": False, "skip_tokenizer_init": True,
    }  # fmt: skip
    engine = LLM(model=str(folder), **given | options)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=1)
    found = []
    asked = [{"prompt_token_ids": p} for p in prompts(lengths)]
    for number, adapter in enumerate(adapters * passes):
        request = None if adapter is None else LoRARequest(adapter.name, number + 1, str(adapter))
        results = engine.generate(asked, params, use_tqdm=False, lora_request=request)
        found.append([_text(result) for result in results])
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    return found


def _text(result: Any) -> Text:
    written = result.outputs[0]
    tokens = list(written.token_ids)
    chosen = [float(place[token].logprob) for place, token in zip(written.logprobs, tokens, strict=True)]
    return Text(tokens, chosen, [], result.num_cached_tokens or 0)


def assert_same(got: list[Text], expected: list[Text], tolerance: float) -> None:
    """Equal tokens with log probabilities within `tolerance`, up to a place where two tokens are as close as that."""
    compared = 0
    for number, (one, two) in enumerate(zip(got, expected, strict=True)):
        for place, (token, wanted) in enumerate(zip(one.tokens, two.tokens, strict=True)):
            every = two.every[place]
            where = f"prompt {number}, token {place}"
            assert float(every[wanted] - every[token]) <= tolerance, f"{where}: another token"
            assert abs(one.logprobs[place] - float(every[token])) <= tolerance, f"{where}: another probability"
            compared += 1
            if token != wanted:
                break
    assert compared > 0.9 * sum(len(text.tokens) for text in expected), "ties everywhere"


def beginning(texts: list[Text], count: int) -> list[Text]:
    """The first tokens of each."""
    return [Text(t.tokens[:count], t.logprobs[:count], t.every[:count], t.cached) for t in texts]
