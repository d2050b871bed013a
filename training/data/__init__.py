"""Samples, data sets and collation."""

from modeling_dms.training.data.collator import PromptCollator, as_text
from modeling_dms.training.data.easy_vqa import load_easy_vqa
from modeling_dms.training.data.folder import load_folder
from modeling_dms.training.data.hub import HUB_DATASETS, load_hub
from modeling_dms.training.data.noto import load_noto
from modeling_dms.training.data.openmoji import load_openmoji
from modeling_dms.training.data.samples import Sample, split_of
from modeling_dms.training.data.sources import load_samples, load_sources
from modeling_dms.training.data.stamps import load_stamps


__all__ = [
    "HUB_DATASETS",
    "PromptCollator",
    "Sample",
    "as_text",
    "load_easy_vqa",
    "load_folder",
    "load_hub",
    "load_noto",
    "load_openmoji",
    "load_samples",
    "load_sources",
    "load_stamps",
    "split_of",
]
