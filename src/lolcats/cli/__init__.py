"""The command line: one file a verb. Torch is imported by the verbs, not here, so `--help` answers at once."""

from lolcats.cli.app import main

__all__ = ["main"]
