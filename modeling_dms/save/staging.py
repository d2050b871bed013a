"""Saving so that nothing is lost on the way."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


# a whole checkpoint's, in one file or in shards, and an adapter's
_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|adapter_(model\.(safetensors|bin)|config\.json)"
)


@contextmanager
def staged(directory: Any) -> Iterator[Path]:
    """A folder within `directory` to write to. Its files are moved to their places when all are written: a save that
    fails on the way, on a full disk, leaves what was saved there before.

    Raises:
        OSError: if weights cannot be written.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as folder:
        try:
            yield Path(folder)
        except SafetensorError as error:
            raise OSError(f"the weights cannot be saved: {error}") from error
        written = {path.name for path in Path(folder).iterdir()}
        for path in Path(folder).iterdir():
            path.replace(target / path.name)
    if any(_WEIGHTS.fullmatch(name) for name in written):
        # what is left of other shards, or of an adapter where now is a whole checkpoint, would be loaded instead
        for path in target.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()


def check_writable(directory: Any) -> None:
    """Finds out before hours of work whether their result can be saved. Nothing is left behind, nor made.

    Raises:
        OSError: if nothing can be written to the folder, or it cannot be made.
    """
    target = Path(directory)
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=there):
            pass
    except OSError as error:
        raise OSError(f"{directory} cannot be written to ({there}: {error.strerror})") from error
