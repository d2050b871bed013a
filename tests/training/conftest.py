"""Calibrations stop early where a test looks at what is done with them, not at what they say."""

import pytest

from modeling_dms.calibrate.calibration_mixin import CalibrationMixin


def calibrate_up_to(patch, highest):
    """No calibration goes beyond this level, whichever is asked for."""
    calibrate = CalibrationMixin.calibrate

    def lower(self, dataloader, level=3, *args, **kwargs):
        return calibrate(self, dataloader, min(level, highest), *args, **kwargs)

    patch.setattr(CalibrationMixin, "calibrate", lower)


@pytest.fixture
def first_level_alone(monkeypatch):
    calibrate_up_to(monkeypatch, 1)
