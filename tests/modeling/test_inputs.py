"""What a linearized model adds to its family's forward pass and generation: positions, attention weights, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, HrmTextConfig, LlamaForCausalLM

from lolcats import LolcatsError, attention_mode
from lolcats.modeling import LinearizedLayer
from lolcats.modeling.passes import check_first_visit

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float], ids=str)
@pytest.mark.parametrize("pad", [1, 40])
def test_a_row_does_not_depend_on_how_far_it_is_padded(
    make_student: Students, tokens: Tokens, layers: Any, dtype: torch.dtype, pad: int
) -> None:
    student, ids = make_student(window=4, sinks=1, layers=layers), tokens(1, 20)
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], 1)
    mask, alone = (padded > 0).to(dtype), student(ids).logits
    assert distance(student(padded, attention_mask=mask).logits[:, pad:], alone) < 2e-4
    assert distance(student.model(padded, mask).last_hidden_state[:, pad:], student.model(ids).last_hidden_state) < 2e-4
    cache = DynamicCache(config=student.config)
    parts = [
        student(part, attention_mask=mask[:, : end + pad], past_key_values=cache).logits
        for part, end in ((padded[:, : pad + 12], 12), (padded[:, pad + 12 : -1], 19), (padded[:, -1:], 20))
    ]
    assert distance(torch.cat(parts, 1)[:, pad:], alone) < 2e-4


def test_positions_of_the_caller_are_kept(make_student: Students, tokens: Tokens) -> None:
    student, ids, mask = make_student(window=4), tokens(2, 20), torch.ones(2, 20)
    expected = student(ids, position_ids=torch.arange(20)[None] + 7).logits
    assert torch.equal(student(ids, attention_mask=mask, position_ids=torch.arange(20)[None] + 7).logits, expected)
    assert torch.equal(student(ids, attention_mask=mask).logits, student(ids).logits)
    mask[0, :5] = 0
    with attention_mode(student, "softmax"):  # the teacher does not mind
        given = student(ids, attention_mask=mask, position_ids=torch.arange(20)[None]).logits
        assert distance(student(ids, attention_mask=mask).logits[mask.bool()], given[mask.bool()]) < 1e-4


def test_attention_weights_stand_at_their_layers(
    make_teacher: Callable[..., LlamaForCausalLM], make_student: Students, tokens: Tokens
) -> None:
    teacher = make_teacher(attn_implementation="eager")
    student = make_student(teacher, window=30, layers=[1])
    expected = teacher(tokens(), output_attentions=True).attentions
    got = student(tokens(), output_attentions=True).attentions
    assert [weights is None for weights in got] == [False, True, False]
    assert all(distance(got[i], expected[i]) < 1e-4 for i in (0, 2))
    out = student.generate(tokens(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert [len(step) for step in out.attentions] == [3, 3]


def test_a_layer_that_runs_twice_in_a_pass_is_refused(make_student: Students, tokens: Tokens) -> None:
    student, layer = make_student(window=4), LinearizedLayer()
    for _ in range(2):  # two passes
        check_first_visit((torch.zeros(1), torch.zeros(1)), layer, 0)
    student.model.layers.append(student.model.layers[0])  # the first layer once more, after the last
    student.config.num_hidden_layers = 4
    with pytest.raises(LolcatsError, match=r"layer 0 is run several times in one forward pass"):
        student(tokens(), use_cache=True)
    assert student(tokens(), use_cache=False).logits.isfinite().all()


def test_a_family_that_loops_over_its_layers_is_refused_with_a_cache(make_student: Students, tokens: Tokens) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = HrmTextConfig(vocab_size=97, num_layers_per_stack=1, H_cycles=2, L_cycles=2, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(LolcatsError, match=r"expected one call of the attention interface .* it makes 6"):
        make_student(model, window=4)(tokens(), use_cache=True)
