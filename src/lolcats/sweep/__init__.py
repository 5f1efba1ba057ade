"""Sweeps: many runs from one file, their cost beforehand, their results in one table."""

from lolcats.sweep.calibration import calibrate
from lolcats.sweep.job import check_measure, do_job, find_job
from lolcats.sweep.measure import MeasureConfig
from lolcats.sweep.measured import MEASUREMENTS, SweepMeasurement
from lolcats.sweep.plan import Plan, Speed, make_plan
from lolcats.sweep.plots import draw_plots
from lolcats.sweep.results import Table, gather, read_failures, write_table
from lolcats.sweep.runner import run_sweep
from lolcats.sweep.settings import Sweep, SweepRun, load_sweep
from lolcats.sweep.state import check_runs, choose_runs, hold_job

__all__ = [
    "MEASUREMENTS",
    "MeasureConfig",
    "Plan",
    "Speed",
    "Sweep",
    "SweepMeasurement",
    "SweepRun",
    "Table",
    "calibrate",
    "check_measure",
    "check_runs",
    "choose_runs",
    "do_job",
    "draw_plots",
    "find_job",
    "gather",
    "hold_job",
    "load_sweep",
    "make_plan",
    "read_failures",
    "run_sweep",
    "write_table",
]
