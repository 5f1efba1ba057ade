"""Text to sequences of tokens: sources, templates, packing. The same result for the same seed."""

from lolcats.data.build import build_datasets as build_datasets
from lolcats.data.build import check_sources as check_sources
from lolcats.data.build import local_names as local_names
from lolcats.data.packing import PackedDataset as PackedDataset
from lolcats.data.packing import epoch_order as epoch_order
from lolcats.data.packing import long_texts as long_texts
from lolcats.data.passkey import PasskeySample as PasskeySample
from lolcats.data.passkey import passkey_sample as passkey_sample
from lolcats.data.reading import read_documents as read_documents
from lolcats.data.sources import iter_records as iter_records
from lolcats.data.templates import render as render
