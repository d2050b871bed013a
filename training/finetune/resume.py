"""Which checkpoint of a run is complete, and made by the same request.

`Trainer` writes a checkpoint file by file, and its own search takes the highest number without looking inside. Here
the last file of a checkpoint lists all others with their sizes and checksums, so a run that was killed in the middle
of a save, or lost a shard, resumes from the one before. A checkpoint of `dms train` also holds the choices that its
weights depend on: one that another run left in the folder is passed over.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from modeling_dms.training.models.request import file_digest, whats_different


logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def write_manifest(checkpoint: Path) -> None:
    """Declares a checkpoint complete: the name, size and SHA-256 of each of its files, renamed into place at once."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
    listed = {str(p.relative_to(checkpoint)): {"size": p.stat().st_size, "sha256": file_digest(p)} for p in files}
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
        if file_digest(path) != wanted["sha256"]:
            return f"{name} is damaged"
    return None


def last_complete_checkpoint(output_dir: str | Path, request: dict[str, Any] | None = None) -> Path | None:
    """The newest complete checkpoint of a run, with a warning for each newer one that is not; `None` without any.

    Args:
        request: of `training_request`: checkpoints of other runs are passed over, with a warning too.

    Raises:
        ValueError: if there are complete checkpoints, but none of this request.
    """
    found = [
        (int(match[1]), p) for p in Path(output_dir).glob("checkpoint-*") if (match := _CHECKPOINT.search(p.name))
    ]
    others: list[str] = []
    for _, path in sorted(found, reverse=True):
        problem = whats_wrong(path)
        if problem is None and request is not None:
            problem = whats_different(path, request)
            if problem is not None:
                others.append(f"{path}: {problem}")
        if problem is None:
            return path
        logger.warning(f"{path} is skipped: {problem}")
    if others:
        raise ValueError(
            f"no checkpoint of this run to resume from, only of others: {others[0]}; use another output_dir, or leave "
            "out --resume to begin anew"
        )
    return None
