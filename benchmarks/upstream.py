"""The tests that transformers has for its own models, run on the vanilla classes and on the DMS classes.

Give a source tree of transformers, of the version that is installed: its tests are imported, nothing is copied. They
need `parameterized`, and a working directory without a package `tests` of its own:

    cd /tmp
    TRANSFORMERS_TREE=... python -m pytest -c /dev/null --rootdir /tmp -W ignore .../benchmarks/upstream.py -k Llava

Every test class is there twice, as `Vanilla...` and as `DMS...`: what passes in the first and fails in the second is a
fault of ours, or looks at what a DMS class adds on purpose. `DMS_SCHEDULER` names the scheduler, `rule` by default,
which without calibration is the static model; `entropy` weighs every prompt.
"""

import functools
import importlib
import os
import sys
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import transformers

from modeling_dms.auto import CLASSES
from modeling_dms.modeling_dms_blip_2 import DMSBlip2ForImageTextRetrieval


sys.path.insert(0, os.environ["TRANSFORMERS_TREE"])

_DMS = {"scheduler": os.environ.get("DMS_SCHEDULER", "rule"), "shared_size": 8, "mc_samples": 2, "mc_tokens": 8}


def _test_classes(vanilla: type) -> Iterator[type]:
    """The test classes of transformers that test a class."""
    *_, folder, name = vanilla.__module__.split(".")
    module = importlib.import_module(f"tests.models.{folder}.test_{name}")
    for found in vars(module).values():
        if isinstance(found, type) and found.__module__ == module.__name__:
            tested = getattr(found, "all_model_classes", ())
            if tested is None:  # left to the tester
                tested = (getattr(found.model_tester_class, "conditional_generation_class", None),)
            if hasattr(found, "setUp") and vanilla in tested:
                yield found


def _converting(method: Callable, config_class: type) -> Callable:
    """A method of transformers' testers that returns a configuration, or one and inputs, with that of a DMS class."""
    vanilla = config_class.__bases__[-1]

    def converted(value: Any) -> Any:
        if isinstance(value, tuple):
            return (converted(value[0]), *value[1:])
        return config_class(**{**value.to_dict(), "dms_config": _DMS}) if type(value) is vanilla else value

    return functools.wraps(method)(lambda *args, **kwargs: converted(method(*args, **kwargs)))


def _testing(found: type, vanilla: type, ours: type | None) -> type:
    """A test class of transformers that tests `vanilla` alone, or `ours` in its place."""

    def set_up(self: Any) -> None:
        found.setUp(self)
        if ours is not None:
            if hasattr(self, "config_tester"):
                self.config_tester.config_class = ours.config_class
            for name in ("get_config", "prepare_config_and_inputs", "prepare_config_and_inputs_for_common"):
                if hasattr(self.model_tester, name):
                    setattr(self.model_tester, name, _converting(getattr(self.model_tester, name), ours.config_class))

    classes = (vanilla if ours is None else ours,)
    generative = tuple(cls for cls in classes if cls.can_generate())
    body = {"setUp": set_up, "all_model_classes": classes, "all_generative_model_classes": generative}
    # those of pipelines want models from the Hub
    body |= {"pipeline_model_mapping": {}, "__module__": __name__}
    bases = (found,) if issubclass(found, unittest.TestCase) else (found, unittest.TestCase)
    return type(("Vanilla" if ours is None else "DMS") + found.__name__, bases, body)


def _all() -> Iterator[type]:
    for ours in (*CLASSES.values(), DMSBlip2ForImageTextRetrieval):
        vanilla = getattr(transformers, ours.__name__.removeprefix("DMS"))
        for found in _test_classes(vanilla):
            yield _testing(found, vanilla, None)
            yield _testing(found, vanilla, ours)


globals().update({cls.__name__: cls for cls in _all()})
