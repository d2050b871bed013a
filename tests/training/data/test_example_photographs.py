"""Photographs that another package carries."""

import sys

import pytest

from modeling_dms.training.data import load_example_photographs


def test_without_the_package_it_is_said_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"modeling-dms\[parts\]"):
        load_example_photographs()
