"""Writes the code of a model class beside its weights, flat, so that `trust_remote_code=True` loads it without this
package."""

import re
import sys
from pathlib import Path
from typing import Any


# `from modeling_dms.signals import x` in the package, `from .signals import x` in an exported copy
_IMPORT = re.compile(r"^from (?:modeling_dms\.(?:configuration\.)?|\.)(\w+) import", re.MULTILINE)


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
    folders = {Path(sys.modules[cls.__module__].__file__ or "").parent for cls in (*_own(model_class), config_class)}
    waiting = [cls.__module__.rsplit(".", 1)[-1] for cls in (model_class, config_class)]
    written: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        if name in written:
            continue
        source = next(folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file())
        text = source.read_text(encoding="utf-8")
        waiting += _IMPORT.findall(text)
        written[name] = Path(directory) / source.name
        written[name].write_text(_IMPORT.sub(r"from .\1 import", text), encoding="utf-8")
    return list(written.values())


def _own(model_class: type) -> list[type]:
    """The classes of this package that a model class is made of."""
    package = model_class.__module__.rsplit(".", 1)[0]
    return [cls for cls in model_class.__mro__ if cls.__module__.startswith(package)]
