"""Samples -> the tensors that a vision-language model takes, with `modality_ids`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Blip2Processor,
    Gemma3Processor,
    Glm4vProcessor,
    Idefics3Processor,
    InstructBlipProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_dms.observe.prompt import TEXT, VISION
from modeling_dms.training.data.samples import Sample, image_key


BEFORE = "context: "  # each passage
# what the families' processors differ in: the image is put in front of every text by itself; every image has as many
# tokens; a row without an image has blank ones
_PLACES_IMAGES = (Blip2Processor, InstructBlipProcessor)
_FIXED_LENGTH = (LlavaProcessor, Blip2Processor, InstructBlipProcessor, Gemma3Processor, PaliGemmaProcessor)
_FILLS_ROWS = (Idefics3Processor, SmolVLMProcessor)


def image_token(processor: ProcessorMixin) -> str:
    """The token that the features of an image take the place of."""
    # Gemma 3's processor calls the mark so that begins an image
    return str((processor.tokenizer if isinstance(processor, Gemma3Processor) else processor).image_token)


def placeholder(processor: ProcessorMixin) -> str:
    """What stands for an image in a text; empty if the processor puts images in front of every text."""
    if isinstance(processor, _PLACES_IMAGES):
        return ""
    if isinstance(processor, (Qwen2_5_VLProcessor, Qwen3VLProcessor)):
        return f"<|vision_start|>{processor.image_token}<|vision_end|>"
    if isinstance(processor, Glm4vProcessor):
        return f"<|begin_of_image|>{processor.image_token}<|end_of_image|>"
    return str(processor.image_token)  # in some families a mark that becomes many tokens


def as_text(processor: ProcessorMixin, text: str) -> str:
    """A text in which nothing is a special token, so that nobody types an image placeholder or an end token: each one
    gets a space behind its first character, as in `< image>`."""
    tokens = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {*processor.tokenizer.all_special_tokens, str(processor.image_token), image_token(processor)}
    found = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1 and token in text]
    return re.sub("|".join(found), lambda match: f"{match[0][0]} {match[0][1:]}", text) if found else text


@dataclass
class _Prompt:
    """A prompt as a processor gives it.

    Attributes:
        ids, modality_ids, source_ids: one a position.
        positions: what else it says of each position, such as `token_type_ids`.
        others: further texts, such as that of a Q-Former.
        images: the tensors of its images, which go one after the other through a batch.
    """

    ids: list[int]
    modality_ids: list[int]
    source_ids: list[int] = field(default_factory=list)
    positions: dict[str, list[int]] = field(default_factory=dict)
    others: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)

    def kept(self, places: Sequence[int]) -> "_Prompt":
        """Some of its positions."""

        def chosen(line: list[int]) -> list[int]:
            return [line[place] for place in places]

        positions = {name: chosen(line) for name, line in self.positions.items()}
        of = (chosen(line) for line in (self.ids, self.modality_ids, self.source_ids))
        return _Prompt(*of, positions, self.others, self.images)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """(n_i, ...) -> (sum n_i, ...), of which a smaller one is filled up with zeros."""
    sizes = torch.tensor([tensor.shape[1:] for tensor in tensors])
    largest = sizes.amax(0)
    padded = []
    for tensor, size in zip(tensors, sizes, strict=True):
        missing = (largest - size).tolist()
        padded.append(F.pad(tensor, [edge for count in reversed(missing) for edge in (0, count)]))
    return torch.cat(padded)


@dataclass
class PromptCollator:
    """Builds `context: ... question: ... answer:` prompts, tokenizes, pads and marks what each position holds.

    Image placeholders get modality 1, the tokens of the context passage 2, everything else (the question, special
    tokens, padding, the answer) 0: the scheduler weighs the image against the context and leaves the question alone.
    A sample without an image gets no placeholder, one without a context no passage, also mixed within a batch. Special
    tokens in a sample's texts are read as text, see `as_text`.

    Samples with several images or passages become `context: ... context: ... question: ... answer:` behind all images,
    and a batch that holds one has `source_ids` instead of `modality_ids`: 1 and on for each image, then for each
    passage.

    Attributes:
        processor: of any supported family.
        with_labels: append the first answer and the end token as labels and pad on the right (training); otherwise the
            prompt alone, padded on the left (generation).
        max_length: longest row. A longer one loses the end of its context; image, question and answer are never cut.
        schedule_temperature: also return `schedule_target` (B, 2), the softmax of minus the damage that a corruption
            is known to have done over this temperature.
        whole_text: where there is no context, all words of the prompt are the text that the image is weighed against,
            much as for a model that is given no `modality_ids`.
        with_ids: also return what a `DMSTrainer` reads and a model does not take: `sample_ids`, and `image_keys` that
            tell undamaged images apart (`None` for a damaged one), one for each row of `pixel_values`, where that is
            all that there is of an image.

    Raises:
        ValueError: for labels of a tokenizer without an end token.
    """

    processor: ProcessorMixin
    with_labels: bool = False
    max_length: int | None = None
    schedule_temperature: float | None = None
    with_ids: bool = False
    whole_text: bool = False

    def __post_init__(self) -> None:
        if self.with_labels and self.processor.tokenizer.eos_token_id is None:
            raise ValueError("answers to train on end with tokenizer.eos_token, which the processor's tokenizer lacks")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns `input_ids`, `attention_mask`, `modality_ids` or `source_ids` (B, L), `labels` (B, L) if asked for,
        and what the processor gives of images where there are any, mostly `pixel_values` (images, 3, H, W).

        Raises:
            ValueError: naming the sample that has more images than the processor takes, whose image cannot be read,
                which has neither image nor context, no answer to train on, or is longer than `max_length` even
                without its context.
        """
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        rows: list[dict[str, list[int]]] = []
        others, images, keys = [], [], []
        several = any(sample.has_several for sample in samples)
        for sample in samples:
            loaded = sample.load_images()
            prompt = self._encode(sample, loaded)
            if not loaded and not sample.passages:
                raise ValueError(f"sample {sample.id!r} has neither an image nor a context to answer from")
            answer = self._answer(sample)
            if self.max_length is not None:
                prompt = self._shortened(sample.id, prompt, self.max_length - len(answer), bool(sample.passages))
            others.append(prompt.others)
            images.append(prompt.images)
            if self.with_ids:
                key = None if sample.damage[0] or sample.images else image_key(sample.image)
                keys += [key and f"{key}#{number}" for number in range(len(prompt.images.get("pixel_values", ())))]
            row = {"input_ids": prompt.ids + answer, "attention_mask": [1] * (len(prompt.ids) + len(answer))}
            row |= {n: line + [0] * len(answer) for n, line in prompt.positions.items()}
            row["source_ids" if several else "modality_ids"] = (
                prompt.source_ids if several else prompt.modality_ids
            ) + [0] * len(answer)
            if self.with_labels:
                row["labels"] = [-100] * len(prompt.ids) + answer
            rows.append(row)

        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        length = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, Any] = {}
        for name in rows[0]:
            padding = [[fill.get(name, 0)] * (length - len(row[name])) for row in rows]
            padded = [r[name] + p if self.with_labels else p + r[name] for r, p in zip(rows, padding, strict=True)]
            batch[name] = torch.tensor(padded)
        for name in others[0]:
            lines = [torch.tensor(other[name]) for other in others]
            batch[name] = nn.utils.rnn.pad_sequence(lines, batch_first=True)
        given = next((found for found in images if found), {})
        if isinstance(self.processor, _FILLS_ROWS):
            blank = {name: tensor[:, :0] for name, tensor in given.items()}
            images = [found or blank for found in images]
        batch |= {name: _joined([found[name] for found in images if found]) for name in given}
        if self.schedule_temperature is not None:
            damage = torch.tensor([sample.damage for sample in samples])
            batch["schedule_target"] = (-damage / self.schedule_temperature).softmax(1)
        if self.with_ids:
            batch["sample_ids"] = [sample.id for sample in samples]
            if set(given) <= {"pixel_values"}:
                batch["image_keys"] = keys
        return batch

    def split_askable(self, samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, str]]:
        """The samples that a call takes, and of the others the error by id. Images, which `split_readable` checks, are
        read only where the number of their tokens depends on their size."""
        by_size = not isinstance(self.processor, _FIXED_LENGTH)
        lengths: dict[Any, int] = {}  # of texts and of images by their size: many are the same
        blank = Image.new("RGB", (32, 32))

        def least(sample: Sample) -> int:
            """Length of the row without its passages, of each of which `context:` is left."""
            passages = len(sample.passages)

            def encoded(*images: Any) -> _Prompt:
                one = sample.replace(context="a" if passages else None, contexts=("a",) * (passages - 1))
                return self._encode(one, images)

            text = (passages, sample.question, *sample.answers[:1])
            if text not in lengths:
                read = encoded().modality_ids
                lengths[text] = len(read) - read.count(TEXT) * bool(passages) + len(self._answer(sample))
            if sample.image is None:
                return lengths[text]
            images = sample.load_images() if by_size or sample.images else [blank]
            size = tuple(image.size for image in images)
            if size not in lengths:
                lengths[size] = len(encoded(*images).ids) - len(encoded().ids)
            return lengths[text] + lengths[size]

        good, failed = [], {}
        for sample in samples:
            try:
                if sample.image is None and not sample.passages:
                    raise ValueError(f"sample {sample.id!r} has neither an image nor a context to answer from")
                length = least(sample)
                if self.max_length is not None and length > self.max_length:
                    raise ValueError(
                        f"sample {sample.id!r} has {length} tokens even without its context, more than "
                        f"max_length={self.max_length}"
                    )
                good.append(sample)
            except ValueError as error:
                failed[sample.id] = str(error)
        return good, failed

    def _answer(self, sample: Sample) -> list[int]:
        """Ids of the answer and the end token where labels are asked for."""
        if not self.with_labels:
            return []
        if not sample.answers:
            raise ValueError(f"sample {sample.id!r} has no answer to train on")
        tokenizer = self.processor.tokenizer
        text = as_text(self.processor, sample.answers[0])
        return [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _shortened(self, name: str, prompt: _Prompt, length: int, has_context: bool) -> _Prompt:
        """The prompt without the end of its context, so that it has at most `length` tokens."""
        context = [place for place, modality in enumerate(prompt.modality_ids) if modality == TEXT and has_context]
        excess = max(0, len(prompt.ids) - length)
        if excess > len(context):
            raise ValueError(
                f"sample {name!r} has {len(prompt.ids)} tokens in front of its answer, {len(context)} of them "
                f"context; max_length={self.max_length} leaves room for {length}, and image and question are not cut"
            )
        cut = set(context[len(context) - excess :])
        return prompt.kept([place for place in range(len(prompt.ids)) if place not in cut])

    def _encode(self, sample: Sample, images: Sequence[Any]) -> _Prompt:
        """The prompt of a sample, and its images."""
        text, spans = "", []
        for passage in sample.passages:
            passage, begin = as_text(self.processor, passage), len(text) + len(BEFORE)
            text += f"{BEFORE}{passage} "
            spans.append((begin, begin + len(passage)))
        text += f"question: {as_text(self.processor, sample.question.strip())} answer:"
        if self.whole_text and not spans:
            spans = [(0, len(text))]
        if len(images) > 1 and isinstance(self.processor, _PLACES_IMAGES):
            raise ValueError(
                f"sample {sample.id!r} has {len(images)} images, {type(self.processor).__name__} takes one a prompt"
            )
        mark = placeholder(self.processor) * len(images)
        if not images and isinstance(self.processor, PaliGemmaProcessor):  # which takes no text alone
            line = f"{self.processor.tokenizer.bos_token}{text}\n"
            encoded = dict(self.processor.tokenizer([line], add_special_tokens=False, return_offsets_mapping=True))
            encoded["token_type_ids"] = [[0] * len(encoded["input_ids"][0])]
        else:
            given = None if not images else images[0] if len(images) == 1 else [images]
            encoded = dict(self.processor(images=given, text=mark + text, return_offsets_mapping=True))
        encoded.pop("attention_mask", None)
        encoded.pop("labels", None)  # of nothing but the prompt
        ids, offsets = encoded.pop("input_ids")[0], encoded.pop("offset_mapping")[0]
        tokenizer = self.processor.tokenizer
        vision, line_end = tokenizer.convert_tokens_to_ids([image_token(self.processor), "\n"])
        # the processor expands the placeholder in front of the text, and may end it with a line: so spans are counted
        # from the end of its words
        shift = max(end for i, (_, end) in zip(ids, offsets, strict=True) if i not in (vision, line_end)) - len(text)
        prompt = _Prompt(ids, [])
        for token, (start, end) in zip(ids, offsets, strict=True):
            inside = [
                number
                for number, (first, last) in enumerate(spans, len(images) + 1)
                if start < shift + last and end > shift + first and end > start
            ]
            prompt.modality_ids.append(VISION if token == vision else TEXT if inside else 0)
            prompt.source_ids.append(inside[0] if inside and token != vision else 0)
        if images:
            places = [place for place, token in enumerate(ids) if token == vision]
            for place, number in zip(places, self._numbers(sample, images, len(places)), strict=True):
                prompt.source_ids[place] = number
        for name, value in encoded.items():
            if name.startswith("qformer_"):
                prompt.others[name] = value[0]
            elif name.endswith("token_type_ids"):
                prompt.positions[name] = list(value[0])
            elif value is not None:
                prompt.images[name] = torch.as_tensor(np.asarray(value))
        return prompt

    def _numbers(self, sample: Sample, images: Sequence[Any], count: int) -> list[int]:
        """Which of a prompt's images, from 1, each of its image tokens is of; they come one image after the other."""
        each = [count // len(images)] * len(images)
        if len({image.size for image in images}) > 1:  # as many as each has alone
            one_each = [self._encode(sample.replace(context=None, contexts=()), [image]) for image in images]
            each = [prompt.modality_ids.count(VISION) for prompt in one_each]
        if sum(each) != count:
            raise ValueError(
                f"sample {sample.id!r}: its {len(images)} images have {count} tokens, {each} alone: which token is of "
                "which image cannot be told; give it images of one size"
            )
        return [number for number, tokens in enumerate(each, 1) for _ in range(tokens)]
