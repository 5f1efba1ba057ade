"""Identities: those of version 0.1, so that its caches and half-done runs are still found; and what changes them."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.identity import digest, key_of, tokenizer_identity, weights_digest
from tiny import chat_tokenizer


def test_identities_are_those_of_earlier_versions() -> None:
    weights = [("b", torch.arange(300.0).view(3, 100) / 7), ("a", torch.ones(2, dtype=torch.bfloat16))]
    assert weights_digest(weights) == "85a6921196b9d0703289c7207f021436ccfcba430870b29d1ca2f30a8059a64d"
    assert digest({"b": [1, None], "a": "x"}) == "8ea2c0f31b799f047143"
    known = tokenizer_identity(chat_tokenizer(), "chat")
    assert known["eos"] == 0 and known["begin"] == [] and known["chat_template"] == "a870f4cd79dfaa9cf206"


def test_what_a_digest_of_weights_depends_on() -> None:
    def of(*weights: tuple[str, Tensor]) -> str:
        return weights_digest(weights)

    ones, twos = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert of(("a", ones), ("b", twos)) == of(("b", twos), ("a", ones)) == of(("b", twos.bfloat16()), ("a", ones))
    assert len({of(("a", ones)), of(("a", twos)), of(("b", ones)), of(("a", ones.view(3, 2)))}) == 4


def test_keys_are_of_all_parts_in_order() -> None:
    assert key_of("a", 1) == key_of("a", 1) and len({key_of("a", 1), key_of(1, "a"), key_of(["a", 1])}) == 3


def test_what_a_tokenizer_did_last_is_no_part_of_it() -> None:
    tokenizer = chat_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["the cat", "a"], max_length=1, truncation=True)
    assert tokenizer_identity(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_identity(tokenizer) != before
