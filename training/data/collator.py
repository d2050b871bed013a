"""Samples -> the tensors a BLIP-2, LLaVA or InternVL class takes, with `modality_ids`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Processor, InternVLProcessor, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_dms.observe.prompt import TEXT, VISION
from modeling_dms.training.data.samples import Sample, image_key


def as_text(processor: ProcessorMixin, text: str) -> str:
    """A text in which nothing is a special token, so that nobody types an image placeholder or an end token: each one
    gets a space behind its first character, as in `< image>`."""
    tokens = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {*processor.tokenizer.all_special_tokens, str(processor.image_token)}
    found = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1 and token in text]
    return re.sub("|".join(found), lambda match: f"{match[0][0]} {match[0][1:]}", text) if found else text


@dataclass
class PromptCollator:
    """Builds `context: ... question: ... answer:` prompts, tokenizes, pads and marks what each position holds.

    Image placeholders get modality 1, the tokens of the context passage 2, everything else (the question, special
    tokens, padding, the answer) 0: the scheduler weighs the image against the context and leaves the question alone.
    A sample without an image gets no placeholder, one without a context no passage, also mixed within a batch. Special
    tokens in a sample's texts are read as text, see `as_text`.

    Attributes:
        processor: a `LlavaProcessor`, `InternVLProcessor` or `Blip2Processor`.
        with_labels: append the first answer and the end token as labels and pad on the right (training); otherwise the
            prompt alone, padded on the left (generation).
        max_length: longest row. A longer one loses the end of its context; image, question and answer are never cut.
        schedule_temperature: also return `schedule_target` (B, 2), the softmax of minus the damage that a corruption
            is known to have done over this temperature.
        with_ids: also return what a `DMSTrainer` reads and a model does not take: `sample_ids`, and `image_keys` that
            tell undamaged images apart (`None` for a damaged one), one for each row of `pixel_values`.

    Raises:
        ValueError: for labels of a tokenizer without an end token.
    """

    processor: ProcessorMixin
    with_labels: bool = False
    max_length: int | None = None
    schedule_temperature: float | None = None
    with_ids: bool = False

    def __post_init__(self) -> None:
        if self.with_labels and self.processor.tokenizer.eos_token_id is None:
            raise ValueError("answers to train on end with tokenizer.eos_token, which the processor's tokenizer lacks")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns `input_ids`, `attention_mask`, `modality_ids` (B, L), `pixel_values` (images, 3, H, W) where there
        is an image, and `labels` (B, L) if asked for.

        Raises:
            ValueError: naming the sample whose image cannot be read, which has neither image nor context, no answer to
                train on, or is longer than `max_length` even without its context.
        """
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        rows: list[dict[str, list[int]]] = []
        pixels, keys = [], []
        for sample in samples:
            image = sample.load_image()
            ids, modality_ids, tiles = self._encode(sample, image)
            if not any(modality_ids):
                raise ValueError(f"sample {sample.id!r} has neither an image nor a context to answer from")
            answer = self._answer(sample)
            if self.max_length is not None:
                ids, modality_ids = self._shortened(sample.id, ids, modality_ids, self.max_length - len(answer))
            pixels += tiles
            if self.with_ids:
                key = None if sample.damage[0] else image_key(sample.image)
                keys += [key and f"{key}#{number}" for number in range(len(tiles))]
            labels = [-100] * len(ids) + answer
            ids, modality_ids = ids + answer, modality_ids + [0] * len(answer)
            rows.append(
                {"input_ids": ids, "attention_mask": [1] * len(ids), "modality_ids": modality_ids, "labels": labels}
            )

        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "modality_ids": 0, "labels": -100}
        names = list(fill) if self.with_labels else list(fill)[:3]
        length = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, Any] = {}
        for name in names:
            padding = [[fill[name]] * (length - len(row[name])) for row in rows]
            padded = [r[name] + p if self.with_labels else p + r[name] for r, p in zip(rows, padding, strict=True)]
            batch[name] = torch.tensor(padded)
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        if self.schedule_temperature is not None:
            damage = torch.tensor([sample.damage for sample in samples])
            batch["schedule_target"] = (-damage / self.schedule_temperature).softmax(1)
        if self.with_ids:
            batch["sample_ids"] = [sample.id for sample in samples]
            batch["image_keys"] = keys
        return batch

    def split_askable(self, samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, str]]:
        """The samples that a call takes, and of the others the error by id. Images, which `split_readable` checks, are
        read only where the number of their tokens depends on their size."""
        tiles = isinstance(self.processor, InternVLProcessor)
        lengths: dict[Any, int] = {}  # of texts and of images by their size: many are the same

        def least(sample: Sample, has_context: bool) -> int:
            """Length of the row without its context, of which `context:` is left."""
            some, text = sample.replace(context="a" * has_context), (has_context, sample.question, *sample.answers[:1])
            if text not in lengths:
                lengths[text] = self._encode(some, None)[1].count(0) + len(self._answer(sample))
            if sample.image is None:
                return lengths[text]
            image = sample.load_image() if tiles else Image.new("RGB", (32, 32))
            if image.size not in lengths:
                lengths[image.size] = len(self._encode(some, image)[0]) - len(self._encode(some, None)[0])
            return lengths[text] + lengths[image.size]

        good, failed = [], {}
        for sample in samples:
            try:
                has_context = bool((sample.context or "").strip())
                if sample.image is None and not has_context:
                    raise ValueError(f"sample {sample.id!r} has neither an image nor a context to answer from")
                length = least(sample, has_context)
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

    def _shortened(self, name: str, ids: list[int], modality_ids: list[int], length: int) -> tuple[list, list]:
        """The prompt without the end of its context, so that it has at most `length` tokens."""
        context = [position for position, modality in enumerate(modality_ids) if modality == TEXT]
        excess = max(0, len(ids) - length)
        if excess > len(context):
            raise ValueError(
                f"sample {name!r} has {len(ids)} tokens in front of its answer, {len(context)} of them context; "
                f"max_length={self.max_length} leaves room for {length}, and image and question are not cut"
            )
        cut = set(context[len(context) - excess :])
        keep = [position for position in range(len(ids)) if position not in cut]
        return [ids[i] for i in keep], [modality_ids[i] for i in keep]

    def _encode(self, sample: Sample, image: Any) -> tuple[list[int], list[int], list[Tensor]]:
        """Ids and modality ids of a prompt, and its image (3, H, W), or the tiles that the processor cuts it into."""
        before = "context: "
        context = as_text(self.processor, (sample.context or "").strip())
        prompt = f"{before}{context} " if context else ""
        prompt += f"question: {as_text(self.processor, sample.question.strip())} answer:"
        is_blip2 = isinstance(self.processor, Blip2Processor)
        placeholder = "" if image is None or is_blip2 else self.processor.image_token
        encoded = self.processor(images=image, text=placeholder + prompt, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"][0], encoded["offset_mapping"][0]
        image_token = self.processor.tokenizer.convert_tokens_to_ids(str(self.processor.image_token))
        # the processor expands the placeholder in front of the prompt, so spans are counted from the prompt's end
        shift = max(end for token, (_, end) in zip(ids, offsets, strict=True) if token != image_token) - len(prompt)
        first, last = shift + len(before), shift + len(before) + len(context)
        modality_ids = []
        for token, (start, end) in zip(ids, offsets, strict=True):
            inside = bool(context) and start < last and end > first and end > start
            modality_ids.append(VISION if token == image_token else TEXT if inside else 0)
        return ids, modality_ids, [torch.as_tensor(tile) for tile in encoded.get("pixel_values", [])]
