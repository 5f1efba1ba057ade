"""Sharing a linearized model: whole, as an adapter, or with the code that runs it."""

from lolcats.export.adapter import load_adapter
from lolcats.export.api import FORMATS, Exported, export_model
from lolcats.export.card import model_card

__all__ = ["FORMATS", "Exported", "export_model", "load_adapter", "model_card"]
