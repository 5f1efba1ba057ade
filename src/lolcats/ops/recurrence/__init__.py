"""Linear recurrences with a state of constant size: linear attention with or without decay, and the delta rule."""

from lolcats.ops.recurrence.api import RECURRENCE_IMPLEMENTATIONS, recurrence, recurrence_step, resolve_recurrence
from lolcats.ops.recurrence.types import RecurrenceOutput, RecurrentState

__all__ = [
    "RECURRENCE_IMPLEMENTATIONS",
    "RecurrenceOutput",
    "RecurrentState",
    "recurrence",
    "recurrence_step",
    "resolve_recurrence",
]
