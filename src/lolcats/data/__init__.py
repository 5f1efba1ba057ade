"""Text to sequences of tokens: sources, templates, packing. Plain numpy, the same result for the same seed."""

from lolcats.data.packing import PackedDataset as PackedDataset
from lolcats.data.packing import build_datasets as build_datasets
from lolcats.data.packing import epoch_order as epoch_order
from lolcats.data.sources import iter_records as iter_records
from lolcats.data.templates import render as render
