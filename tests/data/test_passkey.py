import numpy as np
import pytest

from lolcats.data.passkey import passkey_sample, passkey_samples
from lolcats.errors import DataError


@pytest.mark.parametrize("depth", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("length", [500, 2000])
def test_the_number_is_said_at_its_depth_and_asked_for(length, depth, begin_tokenizer):
    sample = passkey_sample(np.random.default_rng(0), begin_tokenizer, length, depth)
    assert sample.prompt.count(sample.key) == 2
    assert len(sample.key) == 5
    assert sample.answer == f" {sample.key}"
    assert sample.prompt.endswith("What is the pass key? The pass key is")
    before, _, after = (part.count("s ") + part.count("s\n") for part in sample.prompt.partition(sample.key))
    assert abs(sample.depth - depth) < 0.05
    assert (before < after) == (depth < 0.5)
    tokens = len(begin_tokenizer(sample.prompt + sample.answer)["input_ids"])
    assert sample.tokens == tokens
    assert length - 25 < tokens <= length


def test_samples_depend_on_seed_and_number_alone(tokenizer):
    first = list(passkey_samples(tokenizer, 500, seed=1, count=5))
    assert list(passkey_samples(tokenizer, 500, seed=1, count=3)) == first[:3]
    assert len({sample.key for sample in first}) == 5
    assert list(passkey_samples(tokenizer, 500, seed=2, count=1)) != first[:1]


def test_no_room_and_impossible_depths(tokenizer):
    with pytest.raises(DataError, match=r"passkey question has .* 20 are too few"):
        passkey_sample(np.random.default_rng(0), tokenizer, 20, 0.5)
    with pytest.raises(DataError, match=r"between 0 and 1, got 1\.5"):
        passkey_sample(np.random.default_rng(0), tokenizer, 500, 1.5)
