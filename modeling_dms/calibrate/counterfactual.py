"""What the backbone answers to samples that calibration damages or mismatches itself, and to each source alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from modeling_dms.calibrate.records import GainRecord, Record
from modeling_dms.observe.images import Images
from modeling_dms.observe.prompt import TEXT, ModalityFeatures, Prompt
from modeling_dms.weigh.second_look import BOTH, first_tokens_compared


NONE = -1  # the family of what is not damaged
LOWERED = 3  # of the answers: that to both, with what is damaged at `weight_floor`


@dataclass
class Copy:
    """How a copy of a batch differs from it.

    Attributes:
        changed: inputs of `forward`.
        image_content, text_content: (B, F) each, see `ModalityFeatures`.
        families: the numbers of those that image and text are damaged by, or `NONE`.
        shifts: for image and text 1 where they are those of the row before, else 0.
    """

    changed: dict[str, Any]
    image_content: Tensor
    text_content: Tensor
    families: tuple[int, int] = (NONE, NONE)
    shifts: tuple[int, int] = (0, 0)


@dataclass
class Answers(Record):
    """First tokens of answers to n samples, compared with those to the same samples as they were.

    Attributes:
        sources: (n, M), the place among the samples of the calibration of the one that each source is of.
        families: (n, M), the number of the family that each source was damaged by, or `NONE`.
        numbers: (n, `FIRST_TOKENS`), of `first_tokens_compared`.
        agrees: (n, 4), 1 where the likeliest token is that of the answer to the sample as it was: to the image alone,
            the text alone, both, and to both with what is damaged at the rule's weight.
        sureness: (n, 2), the probability of the likeliest token of the last two.
        image_content, text_content: (n, F) each, see `ModalityFeatures`.
        gain: (n,), likewise; `None` where it is not asked for.
    """

    sources: Tensor
    families: Tensor
    numbers: Tensor
    agrees: Tensor
    sureness: Tensor
    image_content: Tensor
    text_content: Tensor
    gain: Tensor | None = None


def swapped_images(inputs: dict[str, Any], images: Images, batch: int) -> dict[str, Any] | None:
    """Image inputs with those of the row before in place of each row's own; `None` where rows differ in their images.

    Args:
        inputs: of `get_image_features`.
        images: theirs.
    """
    lengths = images.lengths
    if batch < 2 or len(lengths) % batch or bool((lengths != lengths[0]).any()):
        return None
    parts = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if any(len(value) % batch for value in parts.values()):
        return None
    return {name: value.unflatten(0, (batch, -1)).roll(1, 0).flatten(0, 1) for name, value in parts.items()}


def swapped_texts(input_ids: Tensor, is_text: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and places of the text (B, L) with the text of the row before in place of each row's own: as much of it as
    there is room for; places that are left over are no longer text."""
    ids, still = input_ids.clone(), is_text.clone()
    for row in range(len(ids)):
        own, other = is_text[row].nonzero()[:, 0], input_ids[row - 1, is_text[row - 1]]
        count = min(len(own), len(other))
        ids[row, own[:count]] = other[:count]
        still[row, own[max(count, min(1, len(own))) :]] = False
    return ids, still


def as_text(inputs: dict[str, Any], modality_ids: Tensor, input_ids: Tensor, still: Tensor) -> dict[str, Any]:
    """Inputs of `forward` with another text, of which those tokens count that are `still` there: (B, L) each."""
    there, mask = still | (modality_ids != TEXT), inputs.get("attention_mask")
    mask = torch.ones_like(modality_ids) if mask is None else mask
    return {"input_ids": input_ids, "attention_mask": mask * there, "modality_ids": modality_ids * there}


class CounterfactualMixin:
    """Adds to a model that continues prompts what calibration asks it."""

    config: Any
    _has_matching_head = False  # which tells how far an image and a text belong together

    def _first_tokens(self, inputs: dict[str, Any], labels: Tensor | None, weights: Tensor) -> Tensor:
        """Distributions (B, K) of the first token that follows prompts, in float32.

        Args:
            inputs: of `forward`, their images encoded; ids and mask (B, P).
            labels: (B, P), where the answers follow the prompts within `inputs`.
            weights: (B, M).
        """
        ids = inputs["input_ids"]
        asked = {**inputs, "modality_weights": weights, "use_cache": False}
        if self.config.get_text_config().is_encoder_decoder:
            start = self.config.get_text_config(decoder=True).decoder_start_token_id
            return self(**asked, decoder_input_ids=torch.full_like(ids[:, :1], start)).logits[:, 0].float().softmax(-1)
        places = self._answer_places(ids, inputs["attention_mask"], labels)
        kept, which = places.unique(return_inverse=True)
        logits = self(**asked, logits_to_keep=kept).logits
        if logits.shape[1] == ids.shape[1]:
            which = places
        return logits[torch.arange(len(ids), device=ids.device), which].float().softmax(-1)

    def _gain(self, prompt: Prompt, inputs: dict[str, Any]) -> Tensor:
        """`ModalityFeatures.gain` (B,) of prompts, on the CPU.

        Args:
            inputs: of `forward` with `modality_ids`, their images encoded.
        """
        read = {name: value for name, value in inputs.items() if name != "modality_ids"}
        ids, modality_ids = inputs["input_ids"], inputs["modality_ids"]
        changed = replace(prompt, input_ids=ids, attention_mask=inputs["attention_mask"], modality_ids=modality_ids)
        within = cast(ModalityFeatures, self._text_within(changed, read))
        within.closer = torch.arange(len(ids)), self._text_features(ids, None, modality_ids)
        return cast(Tensor, within.gain).float().cpu()

    def _gains(self, prompt: Prompt, clean: dict[str, Any], rows: Tensor, first: int) -> GainRecord:
        """Those of a batch, and of its images with the text of the row before.

        Args:
            clean: see `_answers`.
            rows: (B,), which of the rows, and of those before them, have all sources.
            first: the place of the batch's first sample.
        """
        is_text = prompt.modality_ids == TEXT
        changed = as_text(clean, prompt.modality_ids, *swapped_texts(clean["input_ids"], is_text))
        gains = [self._gain(prompt, {**clean, **other}).masked_fill(~rows, torch.nan) for other in ({}, changed)]
        count = len(rows)
        return GainRecord(*gains, first + (torch.arange(count) - 1) % count)

    def _copies(
        self,
        prompt: Prompt,
        inputs: dict[str, Any],
        other_image: dict[str, Any],
        other_text: dict[str, Any],
        contents: tuple[Tensor, Tensor, Tensor],
        families: tuple[int, int],
    ) -> list[Copy]:
        """Copies of a batch with images: itself, with its image, its text or both damaged, and with the text or the
        image of the row before.

        Args:
            inputs: inputs of `forward`.
            other_image, other_text: what of them damage has changed.
            contents: of image, text, and the damaged text, (B, F) each.
            families: the numbers of those that damaged image and text.
        """
        image, text, bad_text = contents
        ids = prompt.modality_ids

        def encoded(changed: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
            seen = {**inputs, **changed}
            content = self._vision_features(replace(prompt, images=self._observed_images(seen))).content
            return {name: seen.get(name) for name in (*changed, "mm_encoder_outputs")}, content

        other_image, bad_image = encoded(other_image)
        copies = [
            Copy({}, image, text),
            Copy(other_image, bad_image, text, (families[0], NONE)),
            Copy(other_text, image, bad_text, (NONE, families[1])),
            Copy({**other_image, **other_text}, bad_image, bad_text, families),
        ]
        if len(ids) > 1:  # there are others
            of_others = as_text(inputs, ids, *swapped_texts(inputs["input_ids"], ids == TEXT))
            copies.append(Copy(of_others, image, text.roll(1, 0), shifts=(0, 1)))
        of_images = {name: inputs[name] for name in self._image_parameters if isinstance(inputs.get(name), Tensor)}
        of_images["pixel_values"] = inputs["pixel_values"]
        swapped = swapped_images(of_images, cast(Images, prompt.images), len(ids))
        if swapped is not None:
            copies.append(Copy(*encoded(swapped), text, shifts=(1, 0)))
        return copies

    def _answers(
        self,
        clean: dict[str, Any],
        copies: Sequence[Copy],
        labels: Tensor | None,
        rows: Tensor,
        first: int,
        prompt: Prompt | None = None,
    ) -> Answers:
        """Answers to copies of a batch, the first of which is the batch itself.

        Args:
            clean: inputs of `forward` with `modality_ids`, its images encoded.
            labels: see `_first_tokens`.
            rows: (B,), which of them have all sources.
            first: the place of the first among the samples of the calibration.
            prompt: the batch's, if gains are asked for as well.
        """
        count, found, truth, low = len(rows), [], None, self.config.dms_config.weight_floor
        places, device = rows.nonzero()[:, 0], clean["input_ids"].device
        # what has no weight has no say: copies of the same image, or text, share the answer to it alone, unless the
        # words are fewer, which moves the positions of what follows, or the prompt ends in another word
        alone: dict[tuple[Any, ...], Tensor] = {}
        ends = self._answer_places(clean["input_ids"], clean["attention_mask"], labels)[:, None]
        for copy in copies:
            inputs, (image, text) = {**clean, **copy.changed}, copy.families

            def answer(*weights: float, inputs=inputs) -> Tensor:
                return self._first_tokens(inputs, labels, torch.tensor([weights], device=device).expand(count, -1))

            said, kept = [], torch.equal(inputs["attention_mask"], clean["attention_mask"])
            kept = kept and torch.equal(inputs["input_ids"].gather(1, ends), clean["input_ids"].gather(1, ends))
            for source, weights in enumerate(((1.0, 0.0), (0.0, 1.0))):
                own = source, copy.families[source], copy.shifts[source], None if kept else (text, copy.shifts[1])
                if own not in alone:
                    alone[own] = answer(*weights)
                said.append(alone[own])
            said.append(answer(0.5, 0.5))
            truth = said[BOTH].argmax(-1) if truth is None else truth
            weighed = said[BOTH]
            if (image == NONE) != (text == NONE):
                weighed = answer(1 - low, low) if image == NONE else answer(low, 1 - low)
            agrees = torch.stack([(p.argmax(-1) == truth).float() for p in (*said, weighed)], 1)
            sure = torch.stack([p.amax(-1) for p in (said[BOTH], weighed)], 1)
            sources = first + torch.stack([(places - shift) % count for shift in copy.shifts], 1)
            parts = first_tokens_compared(*said), agrees, sure, copy.image_content, copy.text_content
            of = torch.tensor(copy.families).expand(len(places), -1)
            gain = None if prompt is None else self._gain(prompt, inputs)[rows]
            found.append(Answers(sources, of, *(part.float().cpu()[rows] for part in parts), gain))
        return Answers.cat(found)
