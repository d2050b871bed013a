"""Context-VQA and captions on the images and questions of the `easy-vqa` package (MIT): an image of one coloured
shape, a sentence that says the same, and a question that either of them answers."""

import zlib
from functools import cache
from pathlib import Path

from modeling_dms.training.data.samples import CAPTION_QUESTION, TASKS, Sample


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWERS = (*COLORS, *SHAPES, "yes", "no")
CONTEXTS = (
    "the picture shows a {color} {shape}.",
    "this image contains a {color} {shape}.",
    "there is a {color} {shape} in the picture.",
    "a {color} {shape} can be seen here.",
    "someone drew a {color} {shape} on paper.",
)


def _scene_of(questions: list[tuple[str, str]]) -> dict[str, str]:
    """Color and shape of an image, read off its questions and answers (some images do not tell both)."""
    scene = {}
    for question, answer in questions:
        words = set(question.rstrip("?").split())
        negated = bool(words & {"not", "no"})
        if answer not in ("yes", "no") or (answer == "yes") != negated:
            words.add(answer)
            for name, values in (("color", COLORS), ("shape", SHAPES)):
                scene |= {name: value for value in values if value in words}  # noqa: B035
    return scene


def load_easy_vqa(split: str, task: str = "vqa") -> list[Sample]:
    """The images of a split whose color and shape are known, in the package's order.

    Args:
        split: `"test"` is the package's own; `"validation"` takes every twentieth image number of the package's
            training split, `"train"` the others. No two share an image.
        task: `"vqa"` gives all questions on each image, `"caption"` and `"retrieval"` its color and shape as one text.

    Raises:
        ValueError: for another split.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return list(_samples(split, task))


@cache
def _samples(split: str, task: str) -> tuple[Sample, ...]:
    """Made once: it takes about half a second."""
    import easy_vqa

    source = "test" if split == "test" else "train"
    questions, answers, image_ids = getattr(easy_vqa, f"get_{source}_questions")()
    paths = getattr(easy_vqa, f"get_{source}_image_paths")()
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        by_image.setdefault(image_id, []).append((question, answer))
    samples = []
    for image_id, asked in by_image.items():
        scene = _scene_of(asked)
        if len(scene) < 2 or (source == "train" and (image_id % 20 == 0) != (split == "validation")):
            continue
        path = Path(paths[image_id])
        context = CONTEXTS[zlib.crc32(f"{source}-{image_id}".encode()) % len(CONTEXTS)].format(**scene)
        if task != "vqa":
            caption = f"a {scene['color']} {scene['shape']}"
            id_ = f"easy-vqa-{source}-{image_id}"
            samples.append(Sample(id_, path, context, CAPTION_QUESTION, (caption,), task))
            continue
        for number, (question, answer) in enumerate(asked):
            sample_id = f"easy-vqa-{source}-{image_id}-{number}"
            samples.append(Sample(sample_id, path, context, question, (answer,)))
    return tuple(samples)
