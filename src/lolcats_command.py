"""The command `lolcats`: a module beside the package, so that `lolcats --help` does not wait for torch.

`import lolcats` teaches transformers to load linearized models, for which it must import both. A process that begins
here does so when a verb runs.
"""

from __future__ import annotations

from lolcats.cli import main

__all__ = ["main"]
