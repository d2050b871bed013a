"""Writes the code of a model class beside its weights, flat, so that `trust_remote_code=True` loads it without this
package."""

import re
import sys
from pathlib import Path
from typing import Any


# `from modeling_dms.weigh.losses import x` in the package, `from .losses import x` in an exported copy
_IMPORT = re.compile(r"^from (modeling_dms(?:\.\w+)*)?\.(\w+) import", re.MULTILINE)


def auto_map(model_class: type, config_class: type, auto_class: str) -> dict[str, str]:
    """The `auto_map` of a configuration: where the exported classes stand."""

    def place(cls: type) -> str:
        return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"

    return {"AutoConfig": place(config_class), auto_class: place(model_class)}


def export_code(model_class: type, config_class: type, directory: Any) -> list[Path]:
    """Copies the modules of both classes and all they import of this package, rewritten to import each other as
    siblings.

    Returns:
        The files written.
    """
    waiting = [cls.__module__ for cls in (model_class, config_class)]
    written: dict[str, Path] = {}
    while waiting:
        module = waiting.pop()
        package, _, name = module.rpartition(".")
        if name in written:
            continue
        text = Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8")
        waiting += [f"{parent or package}.{found}" for parent, found in _IMPORT.findall(text)]
        written[name] = Path(directory) / f"{name}.py"
        written[name].write_text(_IMPORT.sub(r"from .\2 import", text), encoding="utf-8")
    return list(written.values())
