from itertools import pairwise

import numpy as np
import pytest

from lolcats.data.documents import Documents, EncodedDocument


def table(*lengths: int, first: int = 0) -> Documents:
    """Documents of the given lengths whose tokens count up from `first`; two tokens of each are the prompt."""
    edges = np.cumsum([first, *lengths])
    pairs = pairwise(edges)
    return Documents.of(EncodedDocument(np.arange(a, b, dtype=np.int32), 2) for a, b in pairs)


def flat(documents: Documents) -> list[int]:
    return [token for document in documents for token in document.ids.tolist()]


@pytest.mark.parametrize("tokens", range(13))
def test_split_cuts_before_any_token(tokens):
    documents = Documents.join([table(3, 4), table(5, first=7)])
    head, tail = documents.split(tokens)
    assert flat(head) == list(range(12))[:tokens]
    assert flat(tail) == list(range(12))[tokens:]
    assert all(len(document.ids) for document in [*head, *tail])
    whole = sum(document.prompt_length for document in documents)
    assert sum(document.prompt_length for document in [*head, *tail]) == whole


def test_choosing_does_not_read():
    documents = Documents.join([table(3, 4), table(5, first=7)])
    chosen = documents[np.array([2, 0])]
    assert flat(chosen) == [7, 8, 9, 10, 11, 0, 1, 2]
    assert all(left is right for left, right in zip(chosen.shards, documents.shards, strict=True))
    assert chosen.tokens == 8
    assert len(Documents.join([])) == 0
