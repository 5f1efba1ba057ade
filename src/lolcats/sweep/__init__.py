"""Sweeps: many runs from one file, their cost beforehand, their results in one table."""

from lolcats.sweep.job import Sweep, SweepRun, choose_runs, do_job, find_job, hold_job
from lolcats.sweep.plan import Plan, Speed, calibrate, make_plan
from lolcats.sweep.plots import draw_plots
from lolcats.sweep.results import MEASUREMENTS, SweepMeasurement, Table, gather, read_failures, write_table
from lolcats.sweep.runner import check_measure, check_runs, run_sweep
from lolcats.sweep.settings import load_sweep

__all__ = [
    "MEASUREMENTS",
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
