"""The lowest versions of other libraries, and what differs between the supported ones, one function a difference.

Imported first of all, here and in an exported copy, so that a version that is too old is named before it breaks
anything. Knows nothing of this package.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
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


def takes_cache(function: Callable) -> Callable:
    """Decorates a `forward` or `generate` whose argument is named `cache`: its users, and its signature, name it as
    transformers does, see `CACHE`."""
    if CACHE == "cache":
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE)(function)

    @functools.wraps(function)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return function(self, *args, **kwargs)

    own = inspect.signature(function)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in own.parameters.values()]
    renamed.__signature__ = own.replace(parameters=parameters)
    return renamed


def image_fields(encoded: Any, hidden_states: Any) -> dict[str, Any]:
    """What the output of LLaVA's shape says of its images: since 5.24 all that `get_image_features` returned, of which
    `image_hidden_states` became a property. Remove with transformers < 5.24."""
    return {"image_outputs": encoded} if _TRANSFORMERS >= (5, 24) else {"image_hidden_states": hidden_states}


def kept_hidden_states(layers: Sequence[int]) -> Sequence[int] | bool:
    """`output_hidden_states` that keeps at least those of some layers, where 0 is the embeddings and -1 the last.

    Since https://github.com/huggingface/transformers/pull/48081 it takes a list, but one that counted layers without
    the embeddings, and had no negative ones, before 5.23: all are kept there. Remove with transformers < 5.23.
    """
    return layers if _TRANSFORMERS >= (5, 23) else True
