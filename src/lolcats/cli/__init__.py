"""The command line: a file for each verb, or for two that belong together.

Torch is imported by the verbs, not here, so `--help` answers at once.
"""

from lolcats.cli.app import main

__all__ = ["main"]
