"""`dms predict`: what a checkpoint answers to one question about an image and a context, and what it heard."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.data.samples import FIELDS
from modeling_dms.training.models.calibrate import calibrate, reads_whole_prompts
from modeling_dms.training.models.loading import load, on_accelerator, room_for_prompts, shipped


@dataclass(frozen=True)
class Answer:
    """What a model says of one sample.

    Attributes:
        text: the generated answer.
        weights: of image and context, or of each image and then each passage.
        signals: by name, of the same; empty where nothing needed them (uniform scheduler, caller's weights).
        reliability: how far the answer can be relied on, from 0 to 1; `None` where nothing is known of it.
        names: of what the weights are of.
    """

    text: str
    weights: list[float]
    signals: dict[str, list[float]]
    reliability: float | None = None
    names: tuple[str, ...] = FIELDS


def load_for_answers(name: str, max_new_tokens: int, calibration_samples: int = 300) -> tuple[Any, PromptCollator]:
    """A model and a collator whose prompts leave room for an answer. What this package ships is calibrated first, on
    training samples of easy-VQA; any other checkpoint has its own calibration, or uniform weights.

    Raises:
        ValueError: for a checkpoint that cannot generate.
    """
    model, processor = load(name)
    if not model.can_generate():
        raise ValueError(f"{name} is a {type(model).__name__}, which generates no answers")
    model = on_accelerator(model.eval())
    collator = PromptCollator(processor, max_length=room_for_prompts(model, processor, max_new_tokens))
    collator.whole_text = reads_whole_prompts(model)
    if model.dms.calibration.is_calibrated or model.config.dms_config.scheduler != "rule":
        return model, collator
    if not Path(name).exists() and name in shipped():
        calibrate(model, collator, load_easy_vqa("train"), calibration_samples)
    else:
        print("not calibrated: the weights stay uniform (see `model.calibrate`)")
    return model, collator


def check_answerable(sample: Sample) -> None:
    """Raises ValueError for a sample without a question, or with nothing to answer from."""
    if not sample.question.strip():
        raise ValueError("the question is empty")
    if sample.image is None and not sample.passages:
        raise ValueError("there is neither an image nor a context to answer from")


def answer(
    model: Any,
    collator: PromptCollator,
    sample: Sample,
    max_new_tokens: int,
    modality_weights: Sequence[float] | None = None,
) -> Answer:
    """The greedy answer. Safe to call from several threads.

    Args:
        modality_weights: of image and context, or of each source, instead of the scheduler's.

    Raises:
        ValueError: if the question is empty, there is neither image nor context, the image cannot be read, or the
            prompt is too long even without its context.
    """
    check_answerable(sample)
    inputs = {name: value.to(model.device) for name, value in collator([sample]).items()}
    if modality_weights is not None:
        inputs["modality_weights"] = torch.tensor([modality_weights])
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1] if not model.config.is_encoder_decoder else 0
    text = collator.processor.tokenizer.decode(generated.sequences[0, prompt:], skip_special_tokens=True).strip()
    found = {name: values[0] for name, values in (generated.modality_signals or {}).items()}
    # of pairs of sources there is no one number a source
    signals = {name: values.tolist() for name, values in found.items() if values.ndim == 1}
    reliability = None if generated.reliability is None else float(generated.reliability[0])
    return Answer(text, generated.modality_weights[0].tolist(), signals, reliability, sample.source_names)


def predict_one(
    question: str, images: Sequence[Path], contexts: Sequence[str], name: str, max_new_tokens: int
) -> Answer:
    """Answers one sample and prints answer, weights and signals, of several images or passages a column each.

    Raises:
        ValueError: as `answer`.
    """
    first = images[0] if images else None
    passages = [context for context in contexts if context.strip()]
    sample = Sample(str(first or "prompt"), first, passages[0] if passages else None, question)
    check_answerable(sample)
    loaded = sample.replace(images=tuple(images[1:])).load_images()
    sample = sample.replace(
        image=loaded[0] if loaded else None, images=tuple(loaded[1:]), contexts=tuple(passages[1:])
    )
    model, collator = load_for_answers(name, max_new_tokens)
    if sample.source_names != FIELDS and not any(bool(clean.count > 0) for clean in model.dms.calibration.clean_sets):
        print("calibrated on single images and passages: how far several agree is not known (see docs/sources.md)")
    given = answer(model, collator, sample, max_new_tokens)
    print(f"answer: {given.text}")
    if given.reliability is not None:
        print(f"reliability: {given.reliability:.2f}, how surely it is the answer that undamaged inputs would give")
    print(f"{'':<14}" + "".join(f"{column:>11}" for column in given.names))
    for row, values in {"weight": given.weights, **given.signals}.items():
        print(f"{row:<14}" + "".join(f"{value:>11.3f}" for value in values))
    return given
