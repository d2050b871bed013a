"""Whole suite: no network, and deterministic kernels on few threads."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
