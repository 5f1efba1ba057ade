"""How a record becomes text: a prompt, which the model is given, and a response, which it learns to write."""

from typing import TYPE_CHECKING, Literal, get_args

import jinja2

from lolcats.data.records import ChatRecord, CompletionRecord, InstructionRecord, Message, Record
from lolcats.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["plain", "alpaca", "chat", "raw"]

# The wording of Stanford Alpaca, which models trained on such data expect to the letter.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def render(record: Record, template: Template, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Write a record as (prompt, response); the document is one followed by the other, without anything between.

    Records with only "text" have an empty prompt under every template.

    Args:
        record: what `iter_records` yields.
        template: "plain" puts a line break between the parts; "alpaca" is the Stanford Alpaca format; "chat" is the
            tokenizer's own chat template, where the response is the last message if the assistant wrote it; "raw" puts
            nothing between prompt and completion.
        tokenizer: read by "chat" only.

    Raises:
        DataError: an unknown template, "alpaca" with a conversation, or a chat template that is missing or refuses.
    """
    if template not in get_args(Template):
        raise DataError(f"unknown template {template!r}; expected plain, alpaca or chat")
    if "text" in record:
        return "", record["text"]
    if template == "chat":
        return _render_chat(_conversation(record), tokenizer)
    if template == "alpaca":
        return _render_alpaca(record)
    if template == "raw" and "prompt" in record:
        return record["prompt"], record["completion"]
    *before, last = [turn["content"] for turn in _conversation(record)]
    return "".join(f"{text}\n" for text in before), last


def _render_alpaca(record: InstructionRecord | CompletionRecord | ChatRecord) -> tuple[str, str]:
    if "messages" in record:
        raise DataError("the alpaca template has no place for a conversation; set data.template to chat or plain")
    if "prompt" in record:
        return _ALPACA.format(instruction=record["prompt"]), record["completion"]
    form = _ALPACA_WITH_INPUT if record["input"] else _ALPACA
    return form.format(instruction=record["instruction"], input=record["input"]), record["output"]


def _conversation(record: InstructionRecord | CompletionRecord | ChatRecord) -> list[Message]:
    if "messages" in record:
        return record["messages"]
    if "prompt" in record:
        question, answer = record["prompt"], record["completion"]
    else:
        question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
        answer = record["output"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _render_chat(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set data.template to alpaca or plain")
    whole = _apply(messages, tokenizer, for_generation=False)
    if tokenizer.eos_token and whole.rstrip().endswith(str(tokenizer.eos_token)):
        # Generation stops at the end token, so what the template writes after it is never produced.
        whole = whole.rstrip()
    if messages[-1]["role"] != "assistant":
        return whole, ""
    if len(messages) == 1:
        return "", whole
    asked = _apply(messages[:-1], tokenizer, for_generation=True)
    # Some templates add text only when they ask for a reply (an empty "thinking" block), so `asked` need not be how
    # `whole` begins: the prompt is what the two share.
    shared = next((i for i, (left, right) in enumerate(zip(asked, whole, strict=False)) if left != right), len(asked))
    return whole[:shared], whole[shared:]


def _apply(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", for_generation: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation))
    except jinja2.TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses a conversation: {error}") from error
