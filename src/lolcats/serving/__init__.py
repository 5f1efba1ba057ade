"""Linearized models behind serving engines."""
