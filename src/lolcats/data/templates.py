"""How a record becomes text: a prompt, which the model is given, and a response, which it learns to write."""

from typing import TYPE_CHECKING, Any, Literal, get_args

from lolcats.data.records import ChatRecord, CompletionRecord, InstructionRecord, Message, Record
from lolcats.data.turns import EXTRAS
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
        DataError: an unknown template, a conversation that it has no place for, or a chat template that is missing or
            refuses.
    """
    if template not in get_args(Template):
        raise DataError(f"unknown template {template!r}; expected plain, alpaca or chat")
    if "text" in record:
        return "", record["text"]
    if template == "chat":
        return _render_chat(_conversation(record), record.get("tools"), tokenizer)
    if "messages" in record and (parts := _chat_only(record)):
        raise DataError(f"the {template} template has no place for {', '.join(parts)}; set data.template to chat")
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


def _chat_only(record: ChatRecord) -> list[str]:
    """Parts of a conversation that are neither roles nor contents."""
    names = [name for name in EXTRAS if any(name in turn for turn in record["messages"])]
    return [*names, "tools"] if record.get("tools") else names


def _render_chat(
    messages: list[Message], tools: list[dict[str, Any]] | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set data.template to alpaca or plain")
    parts = _chat_only({"messages": messages, "tools": tools or []})
    if unknown := [name for name in parts if name not in str(tokenizer.chat_template)]:
        raise DataError(f"the tokenizer's chat template has no place for {', '.join(unknown)}; leave such records out")
    whole = _apply(messages, tools, tokenizer, for_generation=False)
    if tokenizer.eos_token and whole.rstrip().endswith(str(tokenizer.eos_token)):
        # Generation stops at the end token, so what the template writes after it is never produced.
        whole = whole.rstrip()
    if messages[-1]["role"] != "assistant":
        return whole, ""
    if len(messages) == 1:
        return "", whole
    asked = _apply(messages[:-1], tools, tokenizer, for_generation=True)
    # Some templates add text only when they ask for a reply (an empty "thinking" block), so `asked` need not be how
    # `whole` begins: the prompt is what the two share.
    shared = next((i for i, (left, right) in enumerate(zip(asked, whole, strict=False)) if left != right), len(asked))
    return whole[:shared], whole[shared:]


def _apply(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    tokenizer: "PreTrainedTokenizerBase",
    for_generation: bool,
) -> str:
    given: dict[str, Any] = {"tools": tools} if tools else {}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation, **given)
    except Exception as error:  # a template is a program: what its author raises, and what goes wrong in it
        raise DataError(f"the tokenizer's chat template refuses a conversation: {error}") from error
    return str(text)
