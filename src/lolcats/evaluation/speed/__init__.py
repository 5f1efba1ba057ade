"""Speed and memory of reading and decoding, against batch and context, beside what the bytes alone would take."""

from lolcats.evaluation.speed.clock import copy_bandwidth
from lolcats.evaluation.speed.limit import StepBytes, step_bytes
from lolcats.evaluation.speed.measure import Times, measure_times
from lolcats.evaluation.speed.rows import Row, to_csv
from lolcats.evaluation.speed.run import SpeedSettings, Subjects, measure_speed

__all__ = [
    "Row",
    "SpeedSettings",
    "StepBytes",
    "Subjects",
    "Times",
    "copy_bandwidth",
    "measure_speed",
    "measure_times",
    "step_bytes",
    "to_csv",
]
