"""What a run takes before it runs: memory, disk, time, and the layout that is cheapest. No weights are read."""

from lolcats.planning.commands import commands
from lolcats.planning.disk import disk_bytes
from lolcats.planning.estimate import Estimate, accuracy, estimate, speed_as_set
from lolcats.planning.hardware import GPUS, Machine, choose_machine
from lolcats.planning.layout import in_words

__all__ = [
    "GPUS",
    "Estimate",
    "Machine",
    "accuracy",
    "choose_machine",
    "commands",
    "disk_bytes",
    "estimate",
    "in_words",
    "speed_as_set",
]
