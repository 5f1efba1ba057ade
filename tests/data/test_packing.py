import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lolcats.config import DataConfig
from lolcats.data import PackedDataset, build_datasets, epoch_order, long_texts
from lolcats.data.packing import EncodedDocument, encode, pack, read_documents, tokens_file
from lolcats.data.sources import Record
from lolcats.errors import DataError

TEXTS: list[Record] = [{"text": "the cat sat"}, {"text": "a river"}]
PAIR: Record = {"prompt": "the cat", "completion": "sat on the mat"}


def documents(*lengths: int, prompt: int = 0) -> list[EncodedDocument]:
    """Documents of the given lengths; document i holds the ids 100 i, 100 i + 1, ..."""
    return [EncodedDocument(np.arange(n, dtype=np.int32) + 100 * i, prompt) for i, n in enumerate(lengths)]


def write_texts(path: Path, texts: Iterable[str]) -> list[str]:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:03}.txt").write_text(text)
    return [str(path)]


# encode


def test_documents_end_with_the_end_token(tokenizer):
    encoded = list(encode(TEXTS, "plain", tokenizer))
    assert [tokenizer.decode(document.ids) for document in encoded] == ["the cat sat<end>", "a river<end>"]
    assert all(document.ids.dtype == np.int32 and document.prompt_length == 0 for document in encoded)


def test_without_end_token(tokenizer):
    encoded = list(encode([*TEXTS, {"text": ""}], "plain", tokenizer, add_eos=False))
    assert [tokenizer.decode(document.ids) for document in encoded] == ["the cat sat", "a river"]


def test_many_records_keep_their_order(tokenizer):
    encoded = encode(({"text": str(n)} for n in range(1000)), "plain", tokenizer)
    assert [tokenizer.decode(document.ids[:-1]) for document in encoded] == [str(n) for n in range(1000)]


def test_begin_token_is_added_where_the_tokenizer_adds_it(begin_tokenizer):
    tokenizer = begin_tokenizer
    plain, pair, own = encode([TEXTS[0], PAIR, {"text": "<begin>x"}], "plain", tokenizer)
    assert tokenizer.decode(plain.ids) == "<begin>the cat sat<end>"
    assert tokenizer.decode(pair.ids[: pair.prompt_length]) == "<begin>the cat\n"
    assert tokenizer.decode(own.ids) == "<begin>x<end>"


@pytest.mark.parametrize("template", ["plain", "alpaca", "chat"])
def test_prompt_length_is_where_the_response_begins(template, tokenizer):
    (document,) = encode([PAIR], template, tokenizer)
    assert tokenizer.decode(document.ids[document.prompt_length :]) == "sat on the mat<end>"


def test_prompts_and_plain_texts_may_be_mixed(tokenizer):
    lengths = [document.prompt_length for document in encode([*TEXTS, PAIR], "plain", tokenizer)]
    assert lengths[:2] == [0, 0]
    assert lengths[2] > 0


def test_response_gets_no_space_that_the_text_does_not_have():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "\u2581a": 2, "\u2581b": 3, "b": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
    (document,) = encode([{"prompt": "a", "completion": "b"}], "plain", tokenizer)
    assert document.ids.tolist() == [2, 4, 1]
    assert document.prompt_length == 1


def test_chat_documents_do_not_end_twice(tokenizer):
    (document,) = encode([PAIR], "chat", tokenizer)
    assert tokenizer.decode(document.ids).endswith("sat on the mat<end>")


def test_long_texts_give_no_warning(tokenizer, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (document,) = encode([{"text": "the cat " * 50}], "plain", tokenizer)
    assert len(document.ids) > tokenizer.model_max_length
    assert not caplog.records


def test_an_end_token_is_needed(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        list(encode(TEXTS, "plain", tokenizer))


# pack


def test_stream_joins_and_cuts():
    packed = pack(documents(3, 4, 4), 5, "stream", pad_id=9)
    assert packed.ids.tolist() == [[0, 1, 2, 100, 101], [102, 103, 200, 201, 202]]
    assert packed.document.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert packed.loss_mask.all()


def test_stream_masks_prompts_across_a_cut():
    packed = pack(documents(4, 6, prompt=3), 5, "stream", pad_id=9)
    assert packed.loss_mask.astype(int).tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]


def test_documents_go_to_the_first_sequence_with_room():
    packed = pack(documents(3, 4, 2, 1), 5, "documents", pad_id=9)
    assert packed.ids.tolist() == [[0, 1, 2, 200, 201], [100, 101, 102, 103, 300]]
    assert packed.document.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]


def test_documents_are_padded_and_long_ones_divided():
    packed = pack(documents(7, 4, prompt=6), 5, "documents", pad_id=9)
    assert packed.ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 9, 9, 9], [100, 101, 102, 103, 9]]
    assert packed.document.tolist() == [[0, 0, 0, 0, 0], [0, 0, -1, -1, -1], [0, 0, 0, 0, -1]]
    assert packed.loss_mask.astype(int).tolist() == [[0] * 5, [0, 1, 0, 0, 0], [0] * 5]


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("length", [2, 7, 64, 100])
def test_no_token_is_lost_or_invented(packing, length):
    rng = np.random.default_rng(length)
    given = documents(*rng.integers(1, 90, size=60).tolist())
    packed = pack(given, length, packing, pad_id=-7)
    everything = np.concatenate([document.ids for document in given])
    kept = packed.ids[packed.document >= 0]
    assert packed.ids.dtype == packed.document.dtype == np.int32
    assert packed.loss_mask.dtype == bool
    if packing == "stream":
        assert kept.tolist() == everything[: len(everything) // length * length].tolist()
    else:
        assert sorted(kept.tolist()) == sorted(everything.tolist())
        assert (packed.ids[packed.document < 0] == -7).all()


@pytest.mark.parametrize(("packing", "lengths"), [("stream", (2, 2)), ("documents", ())])
def test_too_little_to_pack(packing, lengths):
    with pytest.raises(DataError, match="data too small"):
        pack(documents(*lengths), 5, packing, pad_id=0)


def test_packed_dataset_refuses_arrays_that_do_not_fit():
    with pytest.raises(DataError, match="one shape"):
        PackedDataset(np.zeros((2, 3), np.int32), np.zeros((2, 3), bool), np.zeros((2, 4), np.int32))


def test_packed_dataset_is_indexed_by_sequence():
    packed = pack(documents(12), 4, "stream", pad_id=0)
    assert len(packed) == 3
    assert packed[np.array([2, 0])].ids[:, 0].tolist() == [8, 0]
    assert len(packed[:2]) == 2


# build_datasets


def small(sources: list[str], **changes: Any) -> DataConfig:
    return DataConfig(**{"sources": sources, "sequence_length": 8, "validation_sequences": 2, **changes})


def rows(packed: PackedDataset) -> list[list[int]]:
    return packed.ids.tolist()


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_no_document_is_in_both_parts(packing, tokenizer, tmp_path: Path):
    # Every document repeats one character of its own, so that a token tells its document.
    characters = [chr(ord("A") + n) for n in range(26)]
    sources = write_texts(tmp_path / "texts", (" ".join([c] * 9) for c in characters))
    train, validation = build_datasets(small(sources, packing=packing, validation_sequences=6), tokenizer, seed=1)
    seen = [{c for c in tokenizer.decode(part.ids.ravel()) if c in characters} for part in (train, validation)]
    assert len(validation) == 6
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]


@pytest.mark.slow
def test_same_seed_same_data(tokenizer):
    config = DataConfig(sequence_length=64, validation_sequences=4, max_tokens=20_000)
    once, again, other = (build_datasets(config, tokenizer, seed) for seed in (3, 3, 4))
    assert [rows(part) for part in once] == [rows(part) for part in again]
    assert rows(once[1]) != rows(other[1])


def test_one_text_is_divided_its_end_is_held_out(tokenizer, tmp_path: Path):
    text = " ".join(str(n) for n in range(100))
    sources = write_texts(tmp_path / "texts", [text])
    (document,) = read_documents(sources, "plain", tokenizer)
    train, validation = build_datasets(small(sources), tokenizer, seed=0)
    assert validation.ids.ravel().tolist() == document.ids[-16:].tolist()
    used = len(train) * 8
    assert train.ids.ravel().tolist() == document.ids[:used].tolist()
    assert len(document.ids) - 16 - used < 8


@pytest.mark.parametrize("seed", range(4))
def test_a_long_text_beside_a_short_one_still_trains(seed, tokenizer, tmp_path: Path):
    sources = write_texts(tmp_path / "texts", ["a b c", "x y z " * 200])
    train, validation = build_datasets(small(sources), tokenizer, seed)
    assert len(validation) == 2
    assert len(train) > 50


def test_just_enough_and_one_token_less(tokenizer, tmp_path: Path):
    path = tmp_path / "t.u16"
    np.full(24, 5, "<u2").tofile(path)
    train, validation = build_datasets(small([str(path)]), tokenizer, seed=0)
    assert (len(train), len(validation)) == (1, 2)
    np.full(23, 5, "<u2").tofile(path)
    with pytest.raises(DataError, match=r"data too small: 23 tokens, need 24 .*lower data\.sequence_length"):
        build_datasets(small([str(path)]), tokenizer, seed=0)


def test_padding_uses_the_pad_token_if_there_is_one(tokenizer, tmp_path: Path):
    sources = write_texts(tmp_path / "texts", ["a b c"] * 20)
    config = small(sources, packing="documents", sequence_length=10)
    for pad_token, pad_id in ((None, tokenizer.eos_token_id), ("<start>", tokenizer.convert_tokens_to_ids("<start>"))):
        tokenizer.pad_token = pad_token
        train, _ = build_datasets(config, tokenizer, seed=0)
        padding = train.ids[train.document < 0]
        assert len(padding)
        assert (padding == pad_id).all()


@pytest.mark.parametrize("cap", [1, 10, 1000])
def test_the_cap_counts_tokens_over_all_sources(cap, tokenizer, tmp_path: Path):
    sources = [*write_texts(tmp_path / "a", ["the cat sat", "a b c"]), *write_texts(tmp_path / "b", ["x " * 40])]
    everything = np.concatenate([d.ids for d in read_documents(sources, "plain", tokenizer)])
    capped = np.concatenate([d.ids for d in read_documents(sources, "plain", tokenizer, cap)])
    assert capped.tolist() == everything[:cap].tolist()


# token files


def test_token_file_documents_end_at_the_end_token(tokenizer, tmp_path: Path):
    end = tokenizer.eos_token_id
    path = tmp_path / "t.u16"
    np.array([5, 6, end, 7, end, 8], "<u2").tofile(path)
    assert [d.ids.tolist() for d in tokens_file(path, tokenizer)] == [[5, 6, end], [7, end], [8]]
    assert [d.ids.tolist() for d in tokens_file(path, tokenizer, max_tokens=4)] == [[5, 6, end], [7]]


def test_token_files_mix_with_text_and_globs(tokenizer, tmp_path: Path):
    for name in ("b.bin", "a.bin"):
        np.frombuffer(name.encode()[:1] * 2, "u1").astype("<u2").tofile(tmp_path / name)
    (tmp_path / "c.txt").write_text("the cat")
    read = read_documents([f"{tmp_path}/*.bin", f"{tmp_path}/c.txt"], "plain", tokenizer)
    assert [d.ids.tolist() for d in read[:2]] == [[97, 97], [98, 98]]
    assert tokenizer.decode(read[2].ids) == "the cat<end>"


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "0 bytes"), (b"abc", "3 bytes"), (b"\xff\xff", "holds token 65535")]
)
def test_broken_token_files(content, said, tokenizer, tmp_path: Path):
    (tmp_path / "t.u16").write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(tokens_file(tmp_path / "t.u16", tokenizer))


def test_a_missing_token_file(tokenizer, tmp_path: Path):
    with pytest.raises(DataError, match="matches no file"):
        read_documents([f"{tmp_path}/none.u16"], "plain", tokenizer)


# epochs


def test_epoch_order_is_a_permutation_that_depends_on_everything():
    order = epoch_order(50, 0, 7)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() == epoch_order(50, 0, 7).tolist()
    assert order.tolist() != epoch_order(50, 1, 7).tolist()
    assert order.tolist() != epoch_order(50, 0, 8).tolist()


# long texts


@pytest.mark.parametrize(
    ("packing", "follows"),
    [
        # 12 tokens, 13, 5, 10, in sequences of 4: the stream has them at 0-12, 12-25, 25-30, 30-40.
        ("stream", [0, 1, 1, 0, 1, 1, 0, 0, 0, 1]),
        # Pieces of 4, 4, 4 | 4, 4, 4, 1 | 4, 1 | 4, 4, 2; the last ones share a sequence.
        ("documents", [0, 1, 1, 0, 1, 1, 0, 0, 0, 1]),
    ],
)
def test_sequences_that_go_on_in_one_document_are_known(packing, follows):
    packed = pack(documents(12, 13, 5, 10), 4, packing, pad_id=9)
    assert packed.follows is not None
    assert packed.follows.astype(int).tolist() == follows
    for row in np.flatnonzero(packed.follows):
        joined = packed.ids[row - 1 : row + 1].reshape(-1)
        assert joined.tolist() == list(range(joined[0], joined[0] + 8))


def test_long_texts_do_not_overlap():
    packed = pack(documents(12, 13, 5, 10), 4, "stream", pad_id=9)
    assert long_texts(packed, 3).tolist() == [0, 3]
    assert long_texts(packed, 2).tolist() == [0, 3, 8]
    assert long_texts(packed[1:], 2).tolist() == [0, 2, 7]
    assert len(long_texts(packed, 4)) == 0


def test_torn_sequences_make_no_long_texts():
    packed = pack(documents(12, 13, 5, 10), 4, "stream", pad_id=9)
    assert len(long_texts(packed[np.arange(10)], 2)) == len(long_texts(packed[::2], 2)) == 0
    assert len(long_texts(PackedDataset(packed.ids, packed.loss_mask, packed.document), 2)) == 0
    with pytest.raises(DataError, match=r"follows must have the shape \[10\].*\(3,\)"):
        PackedDataset(packed.ids, packed.loss_mask, packed.document, np.zeros(3, bool))


def test_long_texts_of_data_on_disk_are_the_same(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    for packing in ("stream", "documents"):
        here = pack(documents(*lengths), 8, packing, pad_id=9)
        with monkeypatch.context() as patch:
            patch.setattr("lolcats.data.packing.IN_MEMORY", 0)
            there = pack(documents(*lengths), 8, packing, pad_id=9)
        assert not isinstance(there.ids, np.ndarray)
        assert long_texts(here, 3).tolist() == long_texts(there, 3).tolist() != []
        for first in long_texts(here, 3):
            text = here.ids[first : first + 3].reshape(-1)
            assert np.array_equal(text, np.arange(text[0], text[0] + 24))
