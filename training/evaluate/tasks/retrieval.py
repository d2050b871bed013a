"""Image-text retrieval: by the likelihood of texts, or by a model that matches images and texts."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from modeling_dms.training.data import PromptCollator, Sample
from modeling_dms.training.data.collator import as_text
from modeling_dms.training.evaluate.methods import Batch, Method
from modeling_dms.training.evaluate.metrics.retrieval import recall_at_k
from modeling_dms.training.evaluate.tasks.base import score_candidates


KS = (1, 5, 10)
# what texts that are not matched lose, as in LAVIS: no match logit is that low
NOT_MATCHED = 100.0


@dataclass
class _Retrieval:
    """All texts of a data set, compared with each image.

    The texts are the answers of the samples that it is made with; an answer that several samples have is one text,
    which matches all of their images. They stay as they are when samples are corrupted, since `corrupt` changes images
    and contexts. For corrupted texts make it with samples whose answers are.

    Attributes:
        processor: of the checkpoint.
        samples: the whole data set, each with at least one answer.
        texts: T different ones.
        texts_of: by sample id, indices of its texts.

    Raises:
        ValueError: naming a sample without an answer, or an id that two samples have.
    """

    reads_contexts: ClassVar[bool] = True

    processor: ProcessorMixin
    samples: InitVar[Sequence[Sample]]
    name: str = "retrieval"
    metric: str = "R@1"
    texts: list[str] = field(init=False)
    texts_of: dict[str, list[int]] = field(init=False)

    def __post_init__(self, samples: Sequence[Sample]) -> None:
        numbers: dict[str, int] = {}
        self.texts_of = {}
        for sample in samples:
            if not sample.answers:
                raise ValueError(f"sample {sample.id!r} has no text to retrieve")
            if sample.id in self.texts_of:
                raise ValueError(f"two samples have the id {sample.id!r}")
            self.texts_of[sample.id] = [numbers.setdefault(text, len(numbers)) for text in sample.answers]
        self.texts = list(numbers)

    def scores(self, answers: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """`score`: image-to-text R@1, whether a text of the image is the most similar of all T. Also R@5 and R@10, and
        text-to-image, of the n images, recalls of a sample's texts in the mean.

        Raises:
            ValueError: if there is no sample, or one that is not of the data set.
        """
        unknown = [sample.id for sample in samples if sample.id not in self.texts_of]
        if unknown:
            raise ValueError(f"sample {unknown[0]!r} is not of the data set whose texts are compared")
        similarity = np.array([answer["similarity"] for answer in answers])  # (n, T)
        texts_of = [self.texts_of[sample.id] for sample in samples]
        images_of: dict[int, list[int]] = {}
        for place, own in enumerate(texts_of):
            for text in own:
                images_of.setdefault(text, []).append(place)
        to_text = recall_at_k(similarity, texts_of, KS)
        of_texts = recall_at_k(similarity.T[list(images_of)], list(images_of.values()), KS)
        to_image = dict(zip(images_of, of_texts, strict=True))
        by_sample = np.array([np.mean([to_image[text] for text in own], 0) for own in texts_of])
        found = {f"image_to_text_recall@{k}": recall for k, recall in zip(KS, to_text.T, strict=True)}
        found |= {f"text_to_image_recall@{k}": recall for k, recall in zip(KS, by_sample.T, strict=True)}
        return {"score": found.pop("image_to_text_recall@1"), **found}


@dataclass
class ImageTextRetrieval(_Retrieval):
    """With a generative model: an image and a text are as similar as the text is likely after the image's prompt, in
    the mean over its tokens, without an end token.

    The decision is one a prompt, made before any text is seen: the modalities are image and context. A prompt without
    context holds one modality alone, and weights change nothing, unless the question is the text.

    Attributes:
        max_length, whole_text: of the prompts, see `PromptCollator`.
    """

    max_length: int | None = field(default=None, kw_only=True)
    whole_text: bool = field(default=False, kw_only=True)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return PromptCollator(self.processor, max_length=self.max_length, with_ids=True, whole_text=self.whole_text)(
            samples
        )

    def tokens(self) -> list[list[int]]:
        """Of each text, as it follows a prompt."""
        texts = [f" {as_text(self.processor, text)}" for text in self.texts]
        return self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def longest_answer(self) -> int:
        """In tokens."""
        return max(map(len, self.tokens()))

    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        """`similarity` (T,)."""
        similarity = score_candidates(method, model, batch, decision, self.tokens(), normalize=True)
        return [{"similarity": row} for row in similarity.tolist()]


@dataclass
class ImageTextMatching(_Retrieval):
    """With `DMSBlip2ForImageTextRetrieval`, as BLIP-2 does (Li et al., ICML 2023, `compute_sim_matrix` of LAVIS): the
    texts most similar to an image in the contrastive branch are ranked by their match logit plus that similarity, all
    others come behind them.

    Matching is steered by the weights of each pair, which the method decides from image and text together. The weights
    of a batch are those of the samples' own pairs, to be looked at: answers do not depend on them. Text-to-image goes
    by the same pairs: those whose text is among the best of their image.

    Attributes:
        matched: texts an image that are matched; all if there are no more.
        max_length: longest text, in tokens; what is longer loses its end.
        rows: pairs or texts at once.
    """

    reads_contexts: ClassVar[bool] = False  # and texts stay as they are when samples are damaged

    matched: int = 128
    max_length: int = 35
    rows: int = 64

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Each sample's image with its first text. A missing image is black and masked out."""
        images = [sample.load_image() for sample in samples]
        blank = Image.new("RGB", (32, 32))
        pixels = [
            self.processor.image_processor(blank if image is None else image, return_tensors="pt")["pixel_values"]
            for image in images
        ]
        return {
            **self._encoded([sample.answers[0] for sample in samples]),
            "pixel_values": torch.cat(pixels),
            "modality_mask": torch.tensor([[image is not None, True] for image in images]),
            "sample_ids": [sample.id for sample in samples],
        }

    def _encoded(self, texts: list[str]) -> Batch:
        """`input_ids` and `attention_mask`, behind image placeholders if the processor makes them."""
        encoded = self.processor.tokenizer(
            [as_text(self.processor, text) for text in texts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        queries = self.processor.num_query_tokens or 0
        image_token = self.processor.tokenizer.convert_tokens_to_ids(str(self.processor.image_token))
        fill = {"input_ids": image_token, "attention_mask": 1}
        return {name: F.pad(encoded[name], (queries, 0), value=value) for name, value in fill.items()}

    @torch.no_grad()
    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        """`similarity` (T,); of a missing image equal throughout, and below that of any other.

        Raises:
            ValueError: for a method without modality weights.
        """
        if method.weights(decision) is None:
            raise ValueError(f"{method.name} has no modality weights, and nothing else steers matching")
        pixels = batch["pixel_values"]
        texts = {name: value.to(pixels.device) for name, value in self._encoded(self.texts).items()}
        contrasted = self._contrasted(model, pixels, texts)  # (B, T)
        none = torch.full_like(contrasted[0], -NOT_MATCHED - 1)
        rows = [
            self._matched(method, model, image, row, texts) if present else none
            for image, row, present in zip(pixels, contrasted, batch["modality_mask"][:, 0].tolist(), strict=True)
        ]
        return [{"similarity": row.tolist()} for row in rows]

    def _matched(
        self, method: Method, model: PreTrainedModel, image: Tensor, contrasted: Tensor, texts: Batch
    ) -> Tensor:
        """The similarities (T,) of an image, the best of them matched."""
        row = contrasted - NOT_MATCHED
        best = contrasted.topk(min(self.matched, len(contrasted))).indices
        for start in range(0, len(best), self.rows):
            chosen = best[start : start + self.rows]
            pairs = {"pixel_values": image[None], **{name: value[chosen] for name, value in texts.items()}}
            weights = method.decide(model, pairs)
            out = model(**pairs, modality_weights=weights, use_image_text_matching_head=True)
            row[chosen] = contrasted[chosen] + out.logits_per_image[:, 1].float()
        return row

    def _contrasted(self, model: PreTrainedModel, pixels: Tensor, texts: Batch) -> Tensor:
        """Similarities of the contrastive branch, each image and text encoded once: (B, T)."""

        def encoded(pixels: Tensor, start: int, stop: int) -> Any:
            given = {name: value[start:stop] for name, value in texts.items()}
            even = torch.full((max(len(pixels), stop - start), 2), 0.5)
            return model(pixel_values=pixels, **given, modality_weights=even)

        images = encoded(pixels, 0, 1).image_embeds  # (B, queries, D)
        stops = range(0, len(self.texts), self.rows)
        embeds = [encoded(pixels[:1], start, min(start + self.rows, len(self.texts))).text_embeds for start in stops]
        return (images @ torch.cat(embeds).T).amax(1).float()
