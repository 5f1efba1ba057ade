"""Imported last, it has collections of garbage leave alone all that is imported by then: a million objects."""

import gc

gc.collect()
gc.freeze()
