"""Conversations as data sets write them, and the chat templates that show them."""

from pathlib import Path
from typing import Any

import pytest

from lolcats.config import DataConfig, SourceConfig
from lolcats.data import build_datasets, iter_records, read_documents
from lolcats.errors import DataError

HI, HO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
WITH_TOOLS = (
    "{% if tools %}{{ '<start>tools ' + tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<start>' + m['role'] + '\n' + m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
    "{{ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": SHARED}, [HI, HO]),
        ({"conversations": [HI, HO]}, [HI, HO]),
        ({"conversations": SHARED, "system": "be kind"}, [{"role": "system", "content": "be kind"}, HI, HO]),
        ({"messages": [HI, HO], "system": ""}, [HI, HO]),
        ({"messages": [HI, HO], "text": None, "prompt": None, "tools": None}, [HI, HO]),
        ({"messages": [HI | {"content": [{"type": "text", "text": part} for part in "hi"]}, HO]}, [HI, HO]),
        ({"prompt": [HI], "completion": [HO]}, [HI, HO]),
        ({"prompt": "hi", "completion": [HO]}, [HI, HO]),
        ({"prompt": [HI], "completion": "ho"}, [HI, HO]),
        ({"messages": [HI, HO | {"name": "", "tool_calls": []}]}, [HI, HO]),
        ({"messages": [HI, CALLING | {"content": None}]}, [HI, CALLING]),
    ],
)  # fmt: skip
def test_conversations_of_every_shape(row: dict[str, Any], messages: list[Any], write_lines):
    assert list(iter_records(str(write_lines("a.jsonl", [row])))) == [{"messages": messages}]


@pytest.mark.parametrize(
    "tools", [[TOOL], '[{"type": "function", "function": {"name": "add", "description": "adds"}}]']
)
def test_tools_are_kept(tools, write_lines):
    path = write_lines("a.jsonl", [{"messages": [HI, HO], "tools": tools}])
    assert list(iter_records(str(path))) == [{"messages": [HI, HO], "tools": [TOOL]}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "\"from\" is 'narrator'; expected one of human"),
        ({"conversations": [{"from": "human"}]}, '"value" must be text, got None'),
        ({"messages": [HI | {"content": [{"type": "image", "url": "x"}]}]}, "part of type 'image'; only text"),
        ({"messages": [HI | {"content": [3]}]}, "part of type 3"),
        ({"messages": [HI | {"content": None}]}, '"content" must be text, got None'),
        ({"messages": [HO | {"function_call": {"name": "x"}}]}, 'a turn comes with "function_call"'),
        ({"messages": [HO | {"weight": 0}]}, 'a turn comes with "weight"'),
        ({"messages": [HO | {"tool_calls": 3}]}, '"tool_calls" must be a list of objects, got 3'),
        ({"messages": [HI, HO], "tools": "[broken"}, '"tools" is no JSON'),
        ({"messages": [HI, HO], "tools": [3]}, '"tools" must be a list of objects'),
        ({"messages": [HI, HO], "images": ["a.png"]}, 'comes with "images"'),
        ({"conversations": SHARED, "system": 3}, '"system" must be text'),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, r"columns: \{prompt: prompt, completion: chosen\}"),
        ({"chosen": [HI, HO], "rejected": [HI, HO]}, r"columns: \{messages: chosen\}"),
        ({"chosen": "x", "rejected": "y"}, r"columns: \{text: chosen\}"),
        ({"prompt": [HI], "completion": [HO, HI]}, "one message of the assistant, got assistant, user"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_line(row, said, write_lines):
    path = write_lines("a.jsonl", [{"text": "fine"}, row])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{said}"):
        list(iter_records(str(path)))


def test_columns_rename_inside_turns(write_lines):
    turns = [{"speaker": "human", "said": "hi"}, {"speaker": "gpt", "said": "ho"}]
    path = write_lines("a.jsonl", [{"dialog": turns}])
    settings = SourceConfig(name=str(path), columns={"messages": "dialog", "role": "speaker", "content": "said"})
    assert list(iter_records(settings)) == [{"messages": [HI, HO]}]


def test_what_was_preferred_is_read_as_the_refusal_says(write_lines):
    path = write_lines("a.jsonl", [{"chosen": [HI, HO], "rejected": [HI, HI]}])
    settings = SourceConfig(name=str(path), columns={"messages": "chosen"})
    assert list(iter_records(settings)) == [{"messages": [HI, HO]}]


def written(path: Path, template: Any, tokenizer: Any) -> str:
    (document,) = read_documents([str(path)], template, tokenizer)
    return tokenizer.decode(document.ids)


def test_templates_show_tools_and_their_calls(tokenizer, write_lines):
    tokenizer.chat_template = WITH_TOOLS
    path = write_lines("a.jsonl", [{"messages": [HI, {**HO, "content": None, "tool_calls": [CALL]}], "tools": [TOOL]}])
    text = written(path, "chat", tokenizer)
    assert text.startswith('<start>tools [{"type"') and '"adds"' in text and '"arguments": {"a": 1}' in text


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"messages": [HI, HO | {"content": None, "tool_calls": [CALL]}]}, "tool_calls"),
        ({"messages": [HI, HO], "tools": [TOOL]}, "tools"),
        ({"messages": [HI, HO | {"reasoning_content": "hm"}]}, "reasoning_content"),
    ],
)
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_templates_without_a_place_for_them_refuse(template, row, missing, tokenizer, write_lines):
    path = write_lines("a.jsonl", [{"messages": [HI, HO]}, row])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: the .*template has no place for {missing}"):
        read_documents([str(path)], template, tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 3 }}", "concatenate str"),
        ("{% if messages", "unexpected end of template"),
    ],
)
def test_a_template_that_raises_is_named_with_the_line(template, said, tokenizer, write_lines):
    tokenizer.chat_template = template
    path = write_lines("a.jsonl", [{"text": "the cat"}] * 300 + [{"messages": [HI, HO]}])
    with pytest.raises(DataError, match=rf"a\.jsonl:301: the tokenizer's chat template refuses .*{said}"):
        build_datasets(DataConfig(sources=[str(path)], template="chat", sequence_length=4), tokenizer, seed=0)
