"""A conversation with a model, whose state is kept from turn to turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lolcats.errors import LolcatsError
from lolcats.printable import reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """Messages so far, and the model's state after them.

    Args:
        model: any causal language model; the state of a linearized one stays small.
        tokenizer: one with a chat template.
        options: of `write_tokens`.

    Raises:
        LolcatsError: the tokenizer has no chat template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        if not tokenizer.chat_template:
            raise LolcatsError(
                "this model's tokenizer has no chat template; have it continue a text instead", hint="generate"
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict[str, str]] = []
        self.forget_state()

    def forget_state(self) -> None:
        """Drop the state; the next turn reads all messages again."""
        from transformers import DynamicCache

        self.seen: list[int] = []
        self.cache = DynamicCache(config=self.model.config)

    def reply(self, text: str, streamer: Any = None) -> str:
        """The model's answer to `text`.

        Raises:
            LolcatsError: the template fails, or what `write_tokens` raises.
        """
        from lolcats.models.generation import encode, write_tokens

        self.messages.append({"role": "user", "content": text})
        prompt = encode(self.tokenizer, render(self.tokenizer, self.messages), add_special_tokens=False)
        ids = prompt[0].tolist()
        if self.seen != ids[: len(self.seen)] or len(ids) <= len(self.seen):
            self.forget_state()  # the template writes earlier turns differently from what the model wrote
        written = write_tokens(
            self.model, self.tokenizer, prompt, past_key_values=self.cache, streamer=streamer, **self.options
        )[0]
        self.seen = written[: int(self.cache.get_seq_length())].tolist()
        answer = str(self.tokenizer.decode(written[len(ids) :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as the template writes them, up to where the answer begins.

    Raises:
        LolcatsError: the template fails; it came with the model, and may raise anything.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))  # type: ignore[arg-type]
    except Exception as error:
        raise LolcatsError(
            f"the chat template of this model failed: {reason(error)}; mend chat_template in its folder, or let it "
            "continue a text",
            hint="generate",
        ) from error
