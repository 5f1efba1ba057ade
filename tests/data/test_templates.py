import pytest

from lolcats.data import render
from lolcats.data.sources import Record
from lolcats.errors import DataError

INSTRUCTION: Record = {"instruction": "Add {these}.", "input": "1 2", "output": "3"}
NO_INPUT: Record = {"instruction": "Say hi.", "input": "", "output": "hi"}
PAIR: Record = {"prompt": "Say hi.", "completion": "hi"}
CHAT: Record = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say hi."},
        {"role": "assistant", "content": "hi"},
    ]
}
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hi.\n\n### Response:\n"
)


@pytest.mark.parametrize("template", ["plain", "alpaca", "chat"])
def test_text_stays_as_it_is(template, tokenizer):
    assert render({"text": " as it is\n"}, template, tokenizer) == ("", " as it is\n")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (PAIR, ("Say hi.\n", "hi")),
        (NO_INPUT, ("Say hi.\n", "hi")),
        (INSTRUCTION, ("Add {these}.\n\n1 2\n", "3")),
        (CHAT, ("Be brief.\nSay hi.\n", "hi")),
    ],
)
def test_plain(record, expected, tokenizer):
    assert render(record, "plain", tokenizer) == expected


@pytest.mark.parametrize("record", [NO_INPUT, PAIR])
def test_alpaca_without_input(record, tokenizer):
    assert render(record, "alpaca", tokenizer) == (WITHOUT_INPUT, "hi")


def test_alpaca_with_input(tokenizer):
    prompt, response = render(INSTRUCTION, "alpaca", tokenizer)
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert response == "3"


def test_alpaca_refuses_conversations(tokenizer):
    with pytest.raises(DataError, match=r"set data\.template to chat"):
        render(CHAT, "alpaca", tokenizer)


@pytest.mark.parametrize("record", [NO_INPUT, PAIR])
def test_chat_of_a_single_question(record, tokenizer):
    assert render(record, "chat", tokenizer) == ("<start>user\nSay hi.<end>\n<start>assistant\n", "hi<end>")


def test_chat_keeps_the_whole_conversation(tokenizer):
    prompt, response = render(CHAT, "chat", tokenizer)
    assert prompt == "<start>system\nBe brief.<end>\n<start>user\nSay hi.<end>\n<start>assistant\n"
    assert response == "hi<end>"


def test_chat_without_a_last_answer_is_all_prompt(tokenizer):
    record: Record = {"messages": [{"role": "user", "content": "hi"}]}
    assert render(record, "chat", tokenizer) == ("<start>user\nhi<end>", "")


def test_chat_of_an_answer_alone_has_no_prompt(tokenizer):
    record: Record = {"messages": [{"role": "assistant", "content": "hi"}]}
    assert render(record, "chat", tokenizer) == ("", "<start>assistant\nhi<end>")


def test_text_that_a_template_adds_only_for_generation_is_not_in_the_document(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<start>assistant\n", "<start>assistant\n<think></think>")
    prompt, response = render(PAIR, "chat", tokenizer)
    assert (prompt, response) == ("<start>user\nSay hi.<end>\n<start>assistant\n", "hi<end>")


def test_what_follows_the_end_token_stays_if_it_is_not_blank(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] + '<end>.\n' }}"
    assert "".join(render(PAIR, "chat", tokenizer)) == "Say hi.<end>.\n"


@pytest.mark.parametrize("template", [None, ""])
def test_chat_needs_a_template(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"no chat template; set data\.template"):
        render(PAIR, "chat", tokenizer)


def test_a_template_that_refuses_is_a_data_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        render(PAIR, "chat", tokenizer)


def test_unknown_template(tokenizer):
    with pytest.raises(DataError, match="unknown template 'chatml'; expected plain, alpaca or chat"):
        render(PAIR, "chatml", tokenizer)  # type: ignore[arg-type]
