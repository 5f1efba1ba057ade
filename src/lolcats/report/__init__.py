"""Reports: one page of what runs and models kept and lost, from their folders."""

from lolcats.report.analysing import Wanted, add_analyses
from lolcats.report.gather import gather
from lolcats.report.subject import Subject
from lolcats.report.verdict import Finding, verdict
from lolcats.report.write import check_report, write_report

__all__ = ["Finding", "Subject", "Wanted", "add_analyses", "check_report", "gather", "verdict", "write_report"]
