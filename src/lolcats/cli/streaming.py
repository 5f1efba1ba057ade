"""Text as it is written, and how fast."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from lolcats.printable import without_controls


class CountingStreamer(TextStreamer):
    """Prints tokens as they come (unless `silent`) and counts them.

    Args:
        tokenizer: turns tokens into text.
        silent: count only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, silent: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.silent = silent
        self.tokens = 0
        self.text = ""
        self.start = self.first = self.latest = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt at the first call, then a token a call."""
        if not self.next_tokens_are_prompt:
            self.tokens += 1
            self.latest = time.perf_counter()
            self.first = self.latest if self.tokens == 1 else self.first
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text, without what a terminal would obey."""
        self.text += text
        if not self.silent:
            super().on_finalized_text(without_controls(text), stream_end)

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, whose time is the prompt's."""
        seconds = self.latest - self.first if self.tokens > 1 else self.latest - self.start
        return max(self.tokens - 1, 1) / seconds if seconds else 0.0
