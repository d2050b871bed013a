"""Whole suite: no network, and no search for garbage in what was imported."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish():
    """All modules are there by now, with their many objects. Trainers and exporters collect garbage again and again,
    which takes tenths of a second each time."""
    gc.collect()
    gc.freeze()
