"""Which checkpoint of a run is complete.

`Trainer` writes a checkpoint file by file, and its own search takes the highest number without looking inside. Here
the last file of a checkpoint lists all others with their sizes and checksums, so a run that was killed in the middle
of a save, or lost a shard, resumes from the one before.
"""

import hashlib
import json
import logging
import re
from pathlib import Path


logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(checkpoint: Path) -> None:
    """Declares a checkpoint complete: the name, size and SHA-256 of each of its files, renamed into place at once."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
    listed = {str(p.relative_to(checkpoint)): {"size": p.stat().st_size, "sha256": _digest(p)} for p in files}
    draft = checkpoint / f"{MANIFEST}.tmp"
    draft.write_text(json.dumps(listed, indent=1), encoding="utf-8")
    draft.replace(checkpoint / MANIFEST)


def whats_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` if it can."""
    try:
        listed = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "it was not saved to its end"
    except (OSError, TypeError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, wanted in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {wanted['size']}"
        if _digest(path) != wanted["sha256"]:
            return f"{name} is damaged"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, with a warning for each newer one that is not; `None` without any."""
    found = [
        (int(match[1]), p) for p in Path(output_dir).glob("checkpoint-*") if (match := _CHECKPOINT.search(p.name))
    ]
    for _, path in sorted(found, reverse=True):
        problem = whats_wrong(path)
        if problem is None:
            return path
        logger.warning(f"{path} is skipped: {problem}")
    return None
