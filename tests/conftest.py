"""Whole suite: no network, few answers in each calibration, the longest files first, and no search for garbage in what
was imported."""

import gc
import os

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")

from modeling_dms.calibrate.calibration_mixin import CalibrationMixin
from modeling_dms.training.models import calibrate


FEW, BATCH = 16, calibrate.BATCH
_calibration_data = CalibrationMixin._calibration_data


def _of_few(self, dataloader, level, max_samples, show_progress, max_asked):
    return _calibration_data(self, dataloader, level, max_samples, show_progress, min(max_asked, FEW))


def pytest_configure():
    """The third level of a calibration is most of its time; so few answers are enough for all but what they say. They
    are asked for batch by batch."""
    CalibrationMixin._calibration_data, calibrate.BATCH = _of_few, FEW


def ask_as_many(patch):
    """Calibrations ask about as many samples as they do outside the tests."""
    patch.setattr(CalibrationMixin, "_calibration_data", _calibration_data)
    patch.setattr(calibrate, "BATCH", BATCH)


@pytest.fixture
def as_many_are_asked(monkeypatch):
    ask_as_many(monkeypatch)


# the files that take longest: the last one to begin would keep one process busy while the other has nothing to do
LONGEST = {
    "test_families",
    "test_docs",
    "test_run",
    "test_trainer",
    "test_calibration",
    "test_resume",
    "test_torch_export",
    "test_assemble",
}


def pytest_collection_modifyitems(items):
    """Processes take files in this order, where xdist is told not to reorder them (`make test`)."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish():
    """All modules are there by now, with their many objects. Trainers and exporters collect garbage again and again,
    which takes tenths of a second each time."""
    gc.collect()
    gc.freeze()
