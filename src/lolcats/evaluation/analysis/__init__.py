"""What was kept and what was lost inside a model: errors, attention, kept pairs and updates by layer and head."""

from lolcats.evaluation.analysis.file import Analysis, read_analysis, write_analysis

__all__ = ["Analysis", "read_analysis", "write_analysis"]
