"""The lowest versions of other libraries, and what differs between the supported ones, one function a difference.

Imported first of all, here and in an exported copy, so that a version that is too old is named before it breaks
anything. Knows nothing of this package.
"""

import importlib.metadata
from typing import Any

from packaging.version import Version


# setup.py asks for these, and `make test-lower` runs with them (torch apart)
FLOORS = {"torch": "2.10", "transformers": "5.20", "peft": "0.20", "accelerate": "1.10"}


def require(package: str) -> None:
    """Raises ImportError, with the command that mends it, where a package of `FLOORS` is missing or too old."""
    needed = f"{package}>={FLOORS[package]}"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    # the release alone: vendors of hardware build alphas of torch
    if found == "none" or Version(found).release < Version(FLOORS[package]).release:
        raise ImportError(f'modeling_dms needs {needed}, found {found}: pip install "{needed}"')


require("torch")
require("transformers")

_TRANSFORMERS = Version(importlib.metadata.version("transformers")).release

# What transformers calls the cache, as an argument and in outputs. It is renamed in 5.24, where the old name still
# works, with a warning. Remove with transformers < 5.24.
CACHE = "cache" if _TRANSFORMERS >= (5, 24) else "past_key_values"

# Whether `generate` repeats images that are encoded already for every beam. Remove with transformers < 5.24.
EXPANDS_IMAGES = _TRANSFORMERS >= (5, 24)


def cache_of(inputs: dict[str, Any]) -> Any:
    """The cache of a call, whichever of its names the library uses: in 5.20 continuous batching has the later one."""
    return inputs.get("past_key_values") if inputs.get("cache") is None else inputs["cache"]
