"""Masks of all kinds: what they say is honoured exactly or refused, and never read as plain causal attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from lolcats import LolcatsError
from lolcats.modeling import attention_mode
from lolcats.modeling.masks import TokenFacts, softmax_mask

Students = Callable[..., Any]
Teachers = Callable[..., LlamaForCausalLM]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")

N = 20
LAYERS = pytest.mark.parametrize("layers", ["all", [1]], ids=str)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def patterns() -> dict[str, tuple[Tensor, str | None]]:
    """Name -> which keys [N, N] each query sees, and what a refusal says of it (None: honoured)."""
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    i, j = torch.arange(N)[:, None], torch.arange(N)
    some = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) > 0.3
    documents = causal & (i.div(7, rounding_mode="floor") == j.div(7, rounding_mode="floor"))
    tree = causal & ~((i >= 12) & (j >= 8) & (j < 12))
    hides, early = "hides some earlier tokens", "shows tokens to others before them"
    return {
        "causal": (causal, None),
        "documents": (documents, None),
        "padding left": (causal & (j >= 4), None),
        "padding right": (causal & (j < 15), None),
        "padding in the middle": (causal & ((j < 7) | (j >= 10)), None),
        "documents with padding between": (documents & ((j < 6) | (j >= 8)), None),
        "documents with padding inside": (documents & (j != 9), "in the middle of a packed text"),
        "documents of every other token": (causal & (i % 2 == j % 2), "in the middle of a packed text"),
        "sliding": (causal & (i - j < 5), hides),
        "sinks and sliding": (causal & ((i - j < 5) | (j < 2)), hides),
        "tree": (tree, hides),
        "random": (causal & some | (i == j), hides),
        "prefix": (causal | ((i < 6) & (j < 6)), early),
        "all": (torch.ones(N, N, dtype=torch.bool), early),
        "not itself": (causal & (i != j), "which do not see themselves"),
    }


@LAYERS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pattern", patterns())
def test_every_4d_mask_is_the_teachers_or_refused(
    make_teacher: Teachers, make_student: Students, tokens: Tokens, pattern: str, attention: str, layers: Any
) -> None:
    visible, refusal = patterns()[pattern]
    mask = visible[None, None] if attention == "sdpa" else torch.where(visible, 0.0, torch.finfo().min)[None, None]
    teacher, ids = make_teacher(attn_implementation=attention), tokens(2, N)
    student, real = make_student(teacher, window=N, layers=layers), visible.diagonal()
    expected = teacher(ids, attention_mask=mask).logits
    for use_cache in (False, True):
        with attention_mode(student, "softmax"):
            assert distance(student(ids, attention_mask=mask, use_cache=use_cache).logits, expected) < 1e-4
        if refusal is None:
            got = student(ids, attention_mask=mask, use_cache=use_cache).logits
            assert distance(got[:, real], expected[:, real]) < 1e-4
        else:
            with pytest.raises(LolcatsError, match=refusal):
                student(ids, attention_mask=mask, use_cache=use_cache)


@LAYERS
@pytest.mark.parametrize("use_cache", [False, True])
def test_documents_of_a_4d_mask_are_documents_alone(
    make_student: Students, tokens: Tokens, layers: Any, use_cache: bool
) -> None:
    student, ids = make_student(window=3, sinks=1, layers=layers), tokens(2, N)
    mask, position = patterns()["documents"][0][None, None], torch.arange(N)[None] % 7
    got = student(ids, attention_mask=mask, position_ids=position, use_cache=use_cache).logits
    alone = torch.cat([student(part).logits for part in ids.split(7, 1)], 1)
    assert distance(got, alone) < 2e-4


@LAYERS
def test_the_last_document_can_be_continued(make_student: Students, tokens: Tokens, layers: Any) -> None:
    student, ids, more = make_student(window=3, sinks=1, layers=layers), tokens(2, N), tokens(2, 1, 5)
    packed = {"attention_mask": patterns()["documents"][0][None, None], "position_ids": torch.arange(N)[None] % 7}
    visible = torch.ones(1, 1, 1, N + 1, dtype=torch.bool)
    visible[..., :14] = False  # the document that began at token 14
    cache = student(ids, **packed).past_key_values
    step = {"past_key_values": cache, "position_ids": torch.tensor([[6]])}
    expected = student(torch.cat([ids[:, 14:], more], 1)).logits[:, -1:]
    assert distance(student(more, attention_mask=visible, **step).logits, expected) < 2e-4
    for wrong in (torch.ones(2, N + 1), None):
        cache = student(ids, **packed).past_key_values
        with pytest.raises(LolcatsError, match=r"some of them were padding or of another text"):
            student(more, attention_mask=wrong, **(step | {"past_key_values": cache}))


@LAYERS
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (-torch.rand(1, 1, N, N).tril() - 0.1, "adds a bias"),
        (torch.rand(1, 6, N, N, generator=torch.Generator().manual_seed(0)) > 0.5, "not the same for all heads"),
        (torch.ones(1, 1, N, N, dtype=torch.long), "bool .* or additive"),
        (torch.ones(2, 1, 1, N, dtype=torch.bool), "expected an attention mask"),
        (torch.ones(1, 1, N, N - 1, dtype=torch.bool), f"of {N} columns"),
        (torch.ones(1, 1, N, N + 1, dtype=torch.bool).tril(), f"of {N} columns"),
        (torch.ones(3, N), "expected an attention mask"),
        (torch.ones(2, N, N), "expected an attention mask"),
        (torch.ones(N), "expected an attention mask"),
        (torch.ones(2, N - 1), f"of {N} columns"),
        (torch.arange(N).div(5, rounding_mode="floor").expand(2, -1), "numbers other than 0 and 1"),
    ],
    ids=["bias", "heads", "integers", "one row", "short", "long", "rows", "3D", "1D", "short 2D", "documents 2D"],
)
def test_other_forms_are_refused_in_words(
    make_student: Students, tokens: Tokens, layers: Any, mask: Tensor, says: str
) -> None:
    student = make_student(window=N, layers=layers)
    with pytest.raises(LolcatsError, match=says):
        student(tokens(2, N), attention_mask=mask, use_cache=True)


@pytest.mark.parametrize("mode", ["hybrid", "softmax"])
@pytest.mark.parametrize("kind", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@LAYERS
def test_2d_padding_with_a_cache(
    teacher: Any, make_student: Students, tokens: Tokens, layers: Any, static: bool, kind: str, mode: Any
) -> None:
    student, ids = make_student(window=N, layers=layers), tokens(2, N)
    mask = torch.ones(2, N, dtype=torch.long)
    mask[0, {"none": [], "left": [0, 1, 2], "right": [17, 18, 19], "middle": [6, 7]}[kind]] = 0
    position, real = (mask.cumsum(-1) - 1).clamp_min(0), mask.bool()
    cache = StaticCache(config=student.config, max_cache_len=30) if static else DynamicCache(config=student.config)
    with attention_mode(student, mode):
        parts = [
            student(
                ids[:, a:b], attention_mask=mask[:, :b], position_ids=position[:, a:b], past_key_values=cache
            ).logits
            for a, b in ((0, 12), (12, 18), (18, 19), (19, N))
        ]
    expected = teacher(ids, attention_mask=mask, position_ids=position).logits
    assert distance(torch.cat(parts, 1)[real], expected[real]) < 1e-4


@LAYERS
def test_a_mask_that_contradicts_the_cache_is_refused(make_student: Students, tokens: Tokens, layers: Any) -> None:
    student, ids, ones = make_student(window=8, layers=layers), tokens(2, N), torch.ones(2, N, dtype=torch.long)
    padded, hidden = ones.clone(), torch.ones(2, 1, 1, 13, dtype=torch.bool)
    padded[0, :4], hidden[..., :5] = 0, False
    for before, after, says in [
        (None, padded[:, :13], "hides tokens that are in the state"),
        (None, hidden, "hides tokens that are in the state"),
        (padded[:, :12], ones[:, :13], "some of them were padding"),
        (padded[:, :12], None, "some of them were padding"),
        (None, ones[:, :1], "of 13 columns"),
        (None, hidden[..., 1:], "of 13 columns"),
    ]:
        cache = student(ids[:, :12], attention_mask=before).past_key_values
        with pytest.raises(LolcatsError, match=says):
            student(ids[:, 12:13], attention_mask=after, past_key_values=cache)


def test_rows_without_padding_go_on_without_a_mask(make_student: Students, tokens: Tokens) -> None:
    student, ids, mask = make_student(window=4), tokens(2, N), torch.ones(2, N)
    mask[0, :4] = 0
    cache = student(ids, attention_mask=mask).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    got = student(ids[1:, :1], past_key_values=cache).logits
    assert distance(got, student(torch.cat([ids[1:], ids[1:, :1]], 1)).logits[:, -1:]) < 2e-4


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any) -> Any:
    """As flash attention: a 2D mask, and texts told by positions where one row is packed."""
    n, keys = query.shape[2], key.shape[2]
    visible = torch.ones(n, keys, dtype=torch.bool).tril(keys - n)[None, None]
    position = others.pop("position_ids", None)
    if mask is not None:
        visible = visible & mask[:, None, None] | torch.eye(keys, dtype=torch.bool)[None, None, -n:]
    elif position is not None and position.shape[0] == 1 and n == keys > 1:
        text = (position == position.min()).cumsum(-1)
        visible = visible & (text[:, None, :, None] == text[:, None, None])
    return sdpa_attention_forward(module, query, key, value, visible, **others)


AttentionInterface.register("varlen", varlen)
AttentionMaskInterface.register("varlen", flash_attention_mask)


@LAYERS
def test_texts_that_only_positions_tell(
    make_teacher: Teachers, make_student: Students, tokens: Tokens, layers: Any
) -> None:
    student, ids = make_student(make_teacher(attn_implementation="varlen"), window=3, layers=layers), tokens(1, N)
    position, bounds = torch.arange(N)[None] % 7, torch.tensor([0, 7, 14, N], dtype=torch.int32)
    alone = torch.cat([student(part).logits for part in ids.split(7, 1)], 1)
    flat = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    for more in ({}, flat):
        assert distance(student(ids, position_ids=position, use_cache=False, **more).logits, alone) < 2e-4
        with pytest.raises(LolcatsError, match=r"use_cache=False"):
            student(ids, position_ids=position, **more)
    with pytest.raises(LolcatsError, match=r"cu_seq_lens from 0 to 20"):
        student(ids, position_ids=position, use_cache=False, **(flat | {"cu_seq_lens_q": bounds + 1}))
    with pytest.raises(LolcatsError, match=r"is_causal=False"):
        student(ids, is_causal=False)


def test_bounds_that_softmax_layers_would_not_see_are_refused(make_student: Students, tokens: Tokens) -> None:
    bounds = torch.tensor([0, 7, N])
    with pytest.raises(LolcatsError, match=r"cu_seq_lens"):
        make_student(window=3, layers=[1])(tokens(1, N), cu_seq_lens_q=bounds, use_cache=False)


@pytest.mark.parametrize("mode", ["hybrid", "softmax"])
def test_block_masks(teacher: Any, make_student: Students, tokens: Tokens, mode: Any) -> None:
    student, ids = make_student(window=N), tokens(2, N)

    def documents(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query // 7 == key // 7)

    block = create_block_mask(documents, None, None, N, N, device="cpu")
    with attention_mode(student, mode):
        got = student(ids, attention_mask=block).logits
    assert distance(got, teacher(ids, attention_mask=patterns()["documents"][0][None, None]).logits) < 1e-4
    sliding = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 5), None, None, N, N, device="cpu")
    with pytest.raises(LolcatsError, match=r"hides some earlier tokens"):
        student(ids, attention_mask=sliding)


def test_a_mask_is_looked_at_once_in_a_pass(
    make_student: Students, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lolcats.modeling import facts

    looks: list[tuple[int, ...]] = []
    judged = facts._judged
    monkeypatch.setattr(facts, "_judged", lambda mask, *rest: (looks.append(tuple(mask.shape)), judged(mask, *rest))[1])
    student, ids = make_student(window=4), tokens(2, N)
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    student(ids, attention_mask=mask)
    cache = student(ids, attention_mask=mask).past_key_values
    student(ids[:, :1], attention_mask=torch.ones(1, 1, 1, N + 1, dtype=torch.bool), past_key_values=cache)
    assert looks == [(1, 1, N, N), (1, 1, N, N), (1, 1, 1, N + 1)]


def test_a_mask_changed_in_place_is_looked_at_again(make_student: Students, tokens: Tokens) -> None:
    student, mask = make_student(window=4), torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    student(tokens(2, N), attention_mask=mask, use_cache=False)
    mask[..., 5, 3] = False
    with pytest.raises(LolcatsError, match=r"hides some earlier tokens"):
        student(tokens(2, N), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
@pytest.mark.parametrize("beams", [1, 2])
def test_softmax_mode_with_a_static_cache_generates_like_the_teacher(
    teacher: Any, make_student: Students, tokens: Tokens, layers: Any, beams: int
) -> None:
    student, ids = make_student(window=4, layers=layers), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with attention_mode(student, "softmax"):
        got = student.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, teacher.generate(ids, cache_implementation="static", **options))


def test_a_mask_is_made_where_the_tokens_are() -> None:
    """Also where nothing is known of them that lies there: a text in pieces on a GPU."""
    mask = softmax_mask(TokenFacts(None, None), None, 3, 10, 7, torch.device("meta"))
    assert mask is not None and mask.device.type == "meta" and mask.shape == (1, 1, 3, 10)
