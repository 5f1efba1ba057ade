"""Logits, scores, masks and what lm-eval makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lolcats import LolcatsError


def test_lm_eval(model: Any, tokenizer: Any, folder: str) -> None:
    """As the object, and by where it lies."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [("The river", " runs through"), ("A miller", " lived there")]
    for pretrained in (model, folder):
        options: Any = {
            "pretrained": pretrained,
            "tokenizer": tokenizer,
            "device": "cpu",
            "max_length": 64,
            "batch_size": 2,
        }
        lm = HFLM(**options)
        scores = lm.loglikelihood([Instance("loglikelihood", {}, r, i) for i, r in enumerate(requests)])
        until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        assert len(lm.generate_until([Instance("generate_until", {}, ("The river", until), 0)])) == 1
        for (context, continuation), (score, _) in zip(requests, scores, strict=True):
            ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
            start = len(tokenizer(context)["input_ids"])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
            assert score == pytest.approx(float(logp.gather(-1, ids[0, start:, None]).sum()), abs=1e-3)


def test_hidden_states_and_attention_weights(model: Any, inputs: Any) -> None:
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    output = model(**inputs, output_attentions=True)
    assert not output.attentions


def test_loss_and_scores(model: Any, inputs: Any) -> None:
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    logp = model(**inputs).logits[:, :-1].log_softmax(-1)
    assert torch.allclose(loss, -logp.gather(-1, inputs["input_ids"][:, 1:, None]).mean(), atol=1e-5)

    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=5,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    full = model(out.sequences).logits[:, -6:-1].log_softmax(-1)
    assert torch.allclose(scores, full.gather(-1, out.sequences[:, -5:, None])[..., 0], atol=1e-3)


def test_packed_texts(model: Any, tokenizer: Any, inputs: Any) -> None:
    """By positions that begin again, or by a mask of blocks."""
    ids = torch.cat([inputs["input_ids"], tokenizer("A miller lived there", return_tensors="pt")["input_ids"]], 1)
    first = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(first), torch.arange(ids.shape[1] - first)])[None]
    documents = torch.block_diag(*(torch.ones(n, n).tril() for n in (first, ids.shape[1] - first))).bool()
    with torch.no_grad():
        alone = model(ids[:, first:]).logits
        packed: dict[str, Any]
        for packed in ({"use_cache": False}, {"attention_mask": documents[None, None]}):
            logits = model(ids, position_ids=positions, **packed).logits
            assert torch.allclose(logits[:, first:], alone, atol=1e-3)


def test_masks_that_say_more_are_refused(model: Any, inputs: Any) -> None:
    """A sliding window; tests/modeling/test_masks.py has the others."""
    length = inputs["input_ids"].shape[1]
    sliding = torch.ones(1, 1, length, length).tril().triu(-2).bool()
    with pytest.raises(LolcatsError):
        model(inputs["input_ids"], attention_mask=sliding)
