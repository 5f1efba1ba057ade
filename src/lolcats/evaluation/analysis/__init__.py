"""What was kept and what was lost inside a model: errors, attention, kept pairs and updates by layer and head."""

from lolcats.evaluation.analysis.file import Analysis, read_analysis, write_analysis
from lolcats.evaluation.analysis.maps import Maps, read_maps
from lolcats.evaluation.analysis.run import AnalysisSettings, Models, analyse

__all__ = [
    "Analysis",
    "AnalysisSettings",
    "Maps",
    "Models",
    "analyse",
    "read_analysis",
    "read_maps",
    "write_analysis",
]
