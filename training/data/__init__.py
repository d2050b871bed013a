"""Samples, data sets and collation."""

from modeling_dms.training.data.collator import PromptCollator
from modeling_dms.training.data.easy_vqa import load_easy_vqa
from modeling_dms.training.data.samples import Sample


__all__ = ["PromptCollator", "Sample", "load_easy_vqa"]
