"""Ways to weigh modalities that DMS is compared with, and DMS itself, behind one interface.

Baselines have their published hyperparameters as defaults; `search` tries others on validation data, so that none is
straw.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.prompt import VISION
from modeling_dms.scheduler import ModalityScheduler
from modeling_dms.training.stages import is_language


# what a `PromptCollator` adds for bookkeeping
BOOKKEEPING = ("sample_ids", "image_keys")
Batch = dict[str, Any]
IMPLAUSIBLE = 1e4


def forward(model: PreTrainedModel, batch: Batch, **kwargs: Any) -> Tensor:
    """Logits (B, L, K) of a batch, which may hold encoded images beside the pixels."""
    inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    if "mm_encoder_outputs" in inputs:
        inputs.pop("pixel_values", None)
    return model(**inputs, **kwargs).logits


@dataclass(frozen=True)
class Method:
    """Decides once a prompt, and answers by that decision.

    This one is the static model: equal weights. A decision is a tensor of one row a sample, so that it can be repeated
    for several candidate answers of a prompt.
    """

    name: str = "static"

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """From prompts without answers: here the modality weights (B, M)."""
        return torch.full((len(prompt["input_ids"]), len(MODALITIES)), 1 / len(MODALITIES))

    def logits(self, model: PreTrainedModel, batch: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, K)."""
        return forward(model, batch, modality_weights=decision, **kwargs)

    def generate(self, model: PreTrainedModel, prompt: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        """Token ids, greedily."""
        inputs = {k: v for k, v in prompt.items() if k not in (*BOOKKEEPING, "mm_encoder_outputs")}
        return model.generate(**inputs, modality_weights=decision, do_sample=False, **kwargs)

    def weights(self, decision: Tensor) -> Tensor | None:
        """Modality weights (B, M), `None` for a method that has none."""
        return decision


@dataclass(frozen=True)
class Fixed(Method):
    """The same weights for every sample: fitted to training data the mean-prior baseline, told which modality is
    damaged the oracle."""

    name: str = "mean prior"
    vision: float = 0.5

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        return torch.tensor([[self.vision, 1 - self.vision]]).repeat(len(prompt["input_ids"]), 1)


@dataclass(frozen=True)
class Scheduled(Method):
    """Weights of a scheduler; `None` is the model's own. Rule and trained schedulers are DMS, `entropy` (MLA, Zhang et
    al., 2024) and `energy` (QMF, Zhang et al., 2023) published baselines."""

    name: str = "rule"
    scheduler: ModalityScheduler | None = None

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        names = ("input_ids", "attention_mask", "modality_ids", "modality_mask")
        inputs = {name: prompt[name] for name in names if name in prompt}
        encoded = "mm_encoder_outputs" if "mm_encoder_outputs" in prompt else "pixel_values"
        with scheduled_by(model, self.scheduler):
            return model.get_modality_weights(**inputs, **{encoded: prompt.get(encoded)})[0]


@contextlib.contextmanager
def scheduled_by(model: PreTrainedModel, scheduler: ModalityScheduler | None) -> Iterator[None]:
    """The model with another scheduler."""
    own = model.dms.scheduler
    model.dms.scheduler = own if scheduler is None else scheduler
    try:
        yield
    finally:
        model.dms.scheduler = own


@dataclass(frozen=True)
class ContrastiveDecoding(Method):
    """Visual contrastive decoding (VCD, Leng et al., CVPR 2024): (1 + alpha) logits - alpha logits of the image under
    diffusion noise, over the tokens whose probability is at least beta times the likeliest one's.

    The noise is drawn per sample id: it does not depend on batches.
    """

    name: str = "VCD"
    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500

    def distorted(self, batch: Batch) -> Batch:
        """The batch with noise in its images (a forward diffusion to `noise_step` of 1000, sigmoid schedule)."""
        pixels = batch["pixel_values"]
        betas = torch.linspace(-6, 6, 1000).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
        kept = float((1 - betas).log().cumsum(0).exp()[self.noise_step - 1])
        placeholders = (batch["modality_ids"] == VISION).any(1)
        ids = [name for name, here in zip(batch["sample_ids"], placeholders.tolist(), strict=True) if here]
        noise = [
            torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            for name in ids
        ]
        noisy = math.sqrt(kept) * pixels + math.sqrt(1 - kept) * torch.stack(noise).to(pixels)
        rest = {name: value for name, value in batch.items() if name != "mm_encoder_outputs"}
        return {**rest, "pixel_values": noisy}

    def contrast(self, logits: Tensor, distorted: Tensor) -> Tensor:
        """(..., K) both."""
        log_p = logits.log_softmax(-1)
        plausible = log_p >= log_p.amax(-1, keepdim=True) + math.log(self.beta)
        contrasted = (1 + self.alpha) * logits - self.alpha * distorted
        # implausible tokens stay in their own order, below all others
        return torch.where(plausible, contrasted.log_softmax(-1), log_p - IMPLAUSIBLE)

    def logits(self, model: PreTrainedModel, batch: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        logits = super().logits(model, batch, decision, **kwargs)
        if batch.get("pixel_values") is None:
            return logits
        return self.contrast(logits, super().logits(model, self.distorted(batch), decision, **kwargs))

    def generate(self, model: PreTrainedModel, prompt: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        processors = []
        if prompt.get("pixel_values") is not None:
            processors = [_Contrast(self, model, self.distorted(prompt), decision)]
        return super().generate(model, prompt, decision, logits_processor=processors, **kwargs)

    def weights(self, decision: Tensor) -> None:
        return None


class _Contrast(LogitsProcessor):
    """Contrasts each step's scores with those of the distorted prompt and what was generated so far."""

    def __init__(self, method: ContrastiveDecoding, model: PreTrainedModel, distorted: Batch, decision: Tensor):
        self.method, self.model, self.distorted, self.decision = method, model, distorted, decision
        self.length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # BLIP-2 generates from embeddings: the ids hold what is generated alone
        prompt = self.distorted["input_ids"]
        self.length = input_ids.shape[1] if self.length is None else self.length
        batch = extended(self.distorted, prompt, input_ids[:, self.length :])
        other = Method.logits(self.method, self.model, batch, self.decision)[:, -1]
        return self.method.contrast(scores, other.to(scores))


def extended(batch: Batch, prompt: Tensor, continuation: Tensor) -> Batch:
    """The batch with more tokens behind its prompt, neutral and attended: (B, L), (B, N)."""
    return {
        **batch,
        "input_ids": torch.cat([prompt, continuation], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(continuation)], 1),
        "modality_ids": torch.cat([batch["modality_ids"], torch.zeros_like(continuation)], 1),
    }


@dataclass(frozen=True)
class AdaptVis(Method):
    """Confidence-switched attention (AdaptVis, Chen et al., ICML 2025): the attention logits of image tokens are
    multiplied by `low` where the most likely next token is less likely than `threshold`, by `high` otherwise."""

    name: str = "AdaptVis"
    low: float = 0.5
    high: float = 1.2
    threshold: float = 0.3

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """The factor: (B, 1)."""
        logits = super().logits(model, prompt, super().decide(model, prompt))[:, -1]
        confidence = logits.float().softmax(-1).amax(-1, keepdim=True)
        return torch.where(confidence < self.threshold, self.low, self.high)

    def logits(self, model: PreTrainedModel, batch: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        with scaled_image_keys(model, batch["modality_ids"], decision):
            return super().logits(model, batch, super().decide(model, batch), **kwargs)

    def generate(self, model: PreTrainedModel, prompt: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        with scaled_image_keys(model, prompt["modality_ids"], decision):
            return super().generate(model, prompt, super().decide(model, prompt), **kwargs)

    def weights(self, decision: Tensor) -> None:
        return None


@contextlib.contextmanager
def scaled_image_keys(model: PreTrainedModel, modality_ids: Tensor, factor: Tensor) -> Iterator[None]:
    """Multiplies the attention logits of image tokens, in every layer of the language model, by way of their keys.

    Args:
        modality_ids: (B, L).
        factor: (B, 1).
    """
    scale = torch.where(modality_ids == VISION, factor.to(modality_ids.device), 1.0)[..., None]  # (B, L, 1)

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        # later steps have keys of generated tokens alone, and a text-only pass no image
        return output * scale.to(output) if output.shape[:2] == scale.shape[:2] else output

    handles = [
        module.register_forward_hook(hook)
        for name, module in model.named_modules()
        if is_language(name) and name.rsplit(".", 1)[-1] in ("k_proj", "k")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# the published defaults first; what `search` tries on validation data
GRIDS: dict[str, list[dict[str, float]]] = {
    "VCD": [{"alpha": a, "beta": b} for a in (1.0, 0.5, 0.2) for b in (0.1, 0.5)],
    "AdaptVis": [
        {"low": low, "high": high, "threshold": threshold}
        for threshold in (0.3, 0.6, 0.9)
        for low in (0.5, 0.8)
        for high in (1.2, 1.5, 1.0)
    ],
    "mean prior": [{"vision": value} for value in (0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)],
}
TEMPERATURES = (1.0, 0.1, 0.3, 3.0)


def search(candidates: Sequence[Method], score: Callable[[Method], float]) -> Method:
    """The best of several; of equally good ones the first."""
    scores = [score(candidate) for candidate in candidates]
    return candidates[scores.index(max(scores))]
