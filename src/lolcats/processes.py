"""Several processes, one run folder."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lolcats.errors import LolcatsError


def on_main_process(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something in the main process while the others wait.

    Raises:
        LolcatsError: what `action` raised, in every process: none is left waiting for one that has ended.
    """
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except LolcatsError as error:
            if accelerator.num_processes == 1:
                raise
            failure = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(failure)
    if failure[0] is not None:
        raise LolcatsError(failure[0])
