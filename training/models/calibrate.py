"""A model calibrated on clean samples."""

from collections.abc import Iterable, Sequence
from typing import Any

from modeling_dms.calibrate.records import MIN_SAMPLES
from modeling_dms.training.data.collator import PromptCollator
from modeling_dms.training.data.samples import Sample, image_key


BATCH = 32  # of calibration


def calibrate(
    model: Any,
    collator: PromptCollator,
    samples: Sequence[Sample],
    count: int,
    show_progress: bool = True,
    level: int = 3,
    leave_out: Sequence[str] = (),
    max_asked: int = 100,
) -> Any:
    """Calibrates a DMS model (or a peft wrapper of one) on samples of distinct images, evenly spread over the data:
    the first ones of a sorted set would be of one kind. Where no sample has a context, images are weighed against the
    whole text of the prompts.

    In batches of a fixed size: the self-made corruptions are drawn batch by batch, and the same data must give the
    same statistics whatever the batch and the number of processes of a training step.

    Raises:
        ValueError: for too few images or contexts, or as `model.calibrate`.
    """
    distinct, plain = chosen(samples, count)
    if plain:
        print("no sample has a context: images are weighed against the whole text of the prompts")
    clean = PromptCollator(collator.processor, max_length=collator.max_length)
    batches: Iterable[dict[str, Any]] = (
        clean(distinct[start : start + BATCH]) for start in range(0, len(distinct), BATCH)
    )
    if plain:
        batches = ({name: value for name, value in batch.items() if name != "modality_ids"} for batch in batches)
    return model.calibrate(batches, level, count, show_progress, leave_out, max_asked)


def chosen(samples: Sequence[Sample], count: int) -> tuple[list[Sample], bool]:
    """At most `count` samples of distinct images, evenly spread over the data, and whether none has a context.

    Raises:
        ValueError: for too few images or contexts.
    """
    distinct = list({image_key(sample.image): sample for sample in reversed(samples)}.values())[::-1]
    images = sum(sample.image is not None for sample in distinct)
    count = min(count, len(distinct))
    distinct = [distinct[place * len(distinct) // count] for place in range(count)]
    with_image = sum(sample.image is not None for sample in distinct)
    with_context = sum(bool((sample.context or "").strip()) for sample in distinct)
    plain = not with_context
    if with_image < MIN_SAMPLES or (with_context < MIN_SAMPLES and not plain):
        hint = "" if images else "; without images there is nothing to weigh"
        if 0 < images < MIN_SAMPLES:
            hint += (
                "; these are of the training split, which holds four of five images of a table without a column "
                "'split': with 'train' there in every row all are taken"
            )
        if 0 < with_context < with_image:
            hint += "; without any contexts, images would be weighed against questions"
        raise ValueError(
            f"calibration needs {MIN_SAMPLES} different images and {MIN_SAMPLES} contexts to weigh them against, got "
            f"{with_image} and {with_context}{hint}"
        )
    return distinct, plain


def reads_whole_prompts(model: Any) -> bool:
    """Whether a model was calibrated on prompts all of whose words are the text."""
    return bool(model.dms.calibration.prompts.whole > 0)
