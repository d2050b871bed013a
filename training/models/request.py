"""By which request the results or the checkpoints in a folder were made, so that nothing of another one is taken for
them: a name alone does not tell, what it stands for may have changed."""

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from modeling_dms import __version__
from modeling_dms.training.data.samples import AnyImage, Sample, StoredImage
from modeling_dms.training.models.loading import folders_of


REQUEST = "request.json"
# what `load` reads of any folder, and of the Hub it fetches all of these
_READ = re.compile(
    r"(adapter_)?(config\.json|model.*\.safetensors)|generation_config\.json|(pre)?processor_config\.json"
    r"|tokenizer(_config)?\.json"
)


def versions() -> dict[str, str]:
    """Of all that results depend on."""
    return {
        "modeling_dms": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of the weights, configuration and processor of a checkpoint or an adapter; of an adapter's base there is
    nothing in it but the name."""
    read = sorted(path for path in folder.iterdir() if _READ.fullmatch(path.name) and path.is_file())
    return hashlib.sha256("".join(f"{path.name} {file_digest(path)}\n" for path in read).encode()).hexdigest()


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of samples, in their order: of their texts, and of their images, of which a file counts by its name and
    size."""
    found, sizes = hashlib.sha256(), dict[Path, int]()

    def content(image: AnyImage) -> bytes:
        if isinstance(image, Path):
            if image not in sizes:
                sizes[image] = image.stat().st_size if image.exists() else 0
            return f"{image.name} {sizes[image]}".encode()
        if isinstance(image, StoredImage):
            return image.read()
        return image if isinstance(image, bytes) else image.tobytes()

    for sample in samples:
        images = [content(image) for image in (sample.image, *sample.images) if image is not None]
        texts = [sample.id, sample.context, sample.question, sample.answers, sample.task, *sample.contexts]
        found.update(json.dumps(texts).encode())
        found.update(b"".join(hashlib.sha256(image).digest() for image in images))
    return found.hexdigest()


def model_request(name: str) -> dict[str, Any]:
    """A checkpoint that was loaded: its name, and what it was, of an adapter with its base."""
    return {"name": name, "sha256": [checkpoint_digest(folder) for folder in folders_of(name)]}


def data_request(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """A data set that was loaded: its name, and what it held."""
    return {"name": name, "sha256": samples_digest(samples)}


def write_request(folder: Path, request: dict[str, Any] | None) -> None:
    """Says that what a folder holds was made by this request, or that nothing is known of it; whole or not at all."""
    if request is None:
        (folder / REQUEST).unlink(missing_ok=True)
        return
    draft = folder / f"{REQUEST}.part"
    draft.write_text(json.dumps(request, indent=1, default=str) + "\n", encoding="utf-8")
    draft.replace(folder / REQUEST)


def read_request(folder: Path) -> dict[str, Any] | None:
    """What `write_request` wrote; `None` where there is nothing of it that can be read."""
    try:
        return dict(json.loads((folder / REQUEST).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def whats_different(folder: Path, request: dict[str, Any]) -> str | None:
    """What in a folder's request differs from this one, `None` if nothing does. Choices that only one of them has do
    not count: it did without."""
    made = read_request(folder)
    if made is None:
        return f"there is no {REQUEST} in it that says by which request it was made; version 0.1 wrote none"
    asked = json.loads(json.dumps(request, default=str))  # as it would be read
    differing = [name for name in asked if name in made and _plain(made[name]) != _plain(asked[name])]
    if not differing:
        return None
    before, now = (", ".join(f"{name} {_named(of[name])}" for name in differing) for of in (made, asked))
    changed = ", which has changed since" if before == now else ""
    return f"it was made with {before}, this run asks for {now}{changed}"


def _plain(value: Any) -> Any:
    """What counts of a choice: of a checkpoint or data set not how it was named."""
    return value["sha256"] if isinstance(value, dict) and "sha256" in value else value


def _named(value: Any) -> str:
    return repr(value["name"] if isinstance(value, dict) and "sha256" in value else value)
