"""Samples, data sets and collation. A data set is imported when it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from modeling_dms.training.data.collator import PromptCollator, as_text
    from modeling_dms.training.data.easy_vqa import load_easy_vqa
    from modeling_dms.training.data.example_photographs import load_example_photographs
    from modeling_dms.training.data.flickr8k import load_flickr8k
    from modeling_dms.training.data.folder import load_folder
    from modeling_dms.training.data.hub import HUB_DATASETS, load_hub
    from modeling_dms.training.data.noto import load_noto
    from modeling_dms.training.data.openmoji import load_openmoji
    from modeling_dms.training.data.samples import Sample, split_of
    from modeling_dms.training.data.sources import load_samples, load_sources
    from modeling_dms.training.data.stamps import load_stamps

_MODULES = {
    "collator": ("PromptCollator", "as_text"),
    "easy_vqa": ("load_easy_vqa",),
    "example_photographs": ("load_example_photographs",),
    "flickr8k": ("load_flickr8k",),
    "folder": ("load_folder",),
    "hub": ("HUB_DATASETS", "load_hub"),
    "noto": ("load_noto",),
    "openmoji": ("load_openmoji",),
    "samples": ("Sample", "split_of"),
    "sources": ("load_samples", "load_sources"),
    "stamps": ("load_stamps",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "HUB_DATASETS",
    "PromptCollator",
    "Sample",
    "as_text",
    "load_easy_vqa",
    "load_example_photographs",
    "load_flickr8k",
    "load_folder",
    "load_hub",
    "load_noto",
    "load_openmoji",
    "load_samples",
    "load_sources",
    "load_stamps",
    "split_of",
]
