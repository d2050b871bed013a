"""Methods that others have published for hallucinations, and that change more than the weights of the modalities."""

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.observe.prompt import VISION
from modeling_dms.training.evaluate.methods import Batch, Method


@dataclass(frozen=True)
class ContrastiveDecoding(Method):
    """Visual contrastive decoding (VCD, Leng et al., CVPR 2024): (1 + alpha) logits - alpha logits of the image under
    diffusion noise, over the tokens whose probability is at least beta times the likeliest one's.

    As published (DAMO-NLP-SG/VCD), but for two things. Noise is drawn by the picture, so that it does not depend on
    batches. Where a given continuation is scored, other tokens are not impossible but `IMPLAUSIBLE`, so that any two
    continuations can be ranked.

    Attributes:
        noise_step: 0 to 999.
    """

    name: str = "VCD"
    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500

    # log-probability that an implausible token loses: its order among its like is kept
    IMPLAUSIBLE: ClassVar[float] = 1e3

    def distorted(self, prompt: Batch) -> Tensor | None:
        """The pixels with noise, in whatever shape the family has them: a forward diffusion to `noise_step` of 1000,
        sigmoid schedule. A picture, or a tile of one, that is 0 throughout fills a batch up, and stays as it is."""
        given, grid = prompt.get("pixel_values"), prompt.get("image_grid_thw")
        if given is None:
            return None
        pixels = given.float().cpu()
        pictures = pixels.flatten(0, -4) if grid is None else pixels.split(grid.prod(1).tolist())
        betas = torch.linspace(-6, 6, 1000).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
        kept = (1 - betas).cumprod(0)[self.noise_step]
        noisy = []
        for picture in pictures:
            generator = torch.Generator().manual_seed(zlib.crc32(picture.numpy().tobytes()))
            noise = torch.randn(picture.shape, generator=generator)
            noisy.append(kept.sqrt() * picture + (1 - kept).sqrt() * noise if picture.any() else picture)
        return torch.cat([picture.flatten() for picture in noisy]).view(given.shape).to(given)

    def contrast(self, logits: Tensor, distorted: Tensor) -> Tensor:
        """(..., K) both -> log-probabilities of plausible tokens, and what implausible ones lose."""
        log_p = logits.log_softmax(-1)
        plausible = log_p.exp() >= self.beta * log_p.exp().amax(-1, keepdim=True)
        contrasted = (1 + self.alpha) * logits - self.alpha * distorted
        contrasted = contrasted.masked_fill(~plausible, -torch.inf).log_softmax(-1)
        return torch.where(plausible, contrasted, log_p - self.IMPLAUSIBLE)

    def steer(self, prompt: Batch, decision: Tensor) -> tuple[Batch, Tensor]:
        """Each prompt twice, in the second half with noise in its image."""
        rows = {k: torch.cat([v, v]) for k, v in prompt.items() if isinstance(v, Tensor)}
        distorted = self.distorted(prompt)
        if distorted is not None:
            rows["pixel_values"] = torch.cat([prompt["pixel_values"], distorted])
        return rows, decision.repeat(2, 1)

    def combine(self, logits: Tensor) -> Tensor:
        return self.contrast(*logits.chunk(2))

    def weights(self, decision: Tensor) -> None:
        return None


@dataclass(frozen=True)
class AdaptVis(Method):
    """Confidence-switched attention (AdaptVis, Chen et al., ICML 2025): the attention logits of image tokens are
    multiplied by `low` where the most likely next token is less likely than `threshold`, by `high` otherwise.

    As published (shiqichen17/AdaptVis): in every layer, for the last token of the prompt alone, whose attention
    decides the first token of the answer; later tokens attend as ever.
    """

    name: str = "AdaptVis"
    low: float = 0.5
    high: float = 1.2
    threshold: float = 0.3

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """The factor: (B, 1).

        Raises:
            ValueError: for an encoder-decoder, where no token of the prompt decides the answer.
        """
        if model.config.get_text_config().is_encoder_decoder:
            raise ValueError(f"{self.name} needs a decoder-only language model")
        static = Method()
        log_p = static.logits(model, prompt, static.decide(model, prompt)).log_softmax(-1)
        confidence = log_p.amax(-1, keepdim=True).exp()
        return torch.where(confidence < self.threshold, self.low, self.high)

    def steer(self, prompt: Batch, decision: Tensor) -> tuple[Batch, Tensor]:
        return prompt, decision.new_full((len(decision), len(MODALITIES)), 1 / len(MODALITIES))

    def intervene(
        self, model: PreTrainedModel, prompt: Batch, decision: Tensor
    ) -> contextlib.AbstractContextManager[None]:
        return scaled_image_attention(model, prompt["modality_ids"], decision)

    def weights(self, decision: Tensor) -> None:
        return None


_SCALED_IMAGE_KEYS = "sdpa_scaled_image_keys"
_key_scale: ContextVar[Tensor] = ContextVar("key_scale")  # (B, L)


def _sdpa_scaled_image_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' sdpa; where all of a prompt is read, its last token sees other keys."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # (B, L, heads, D)
    scale = _key_scale.get()
    if query.shape[2] == key.shape[2]:
        mask = None if attention_mask is None else attention_mask[:, :, -1:]
        scaled = key * scale[:, None, :, None].to(key)
        last, _ = sdpa_attention_forward(module, query[:, :, -1:], scaled, value, mask, **kwargs)
        # rows that nothing is to change in keep every bit
        changed = (scale != 1).any(1)[:, None, None, None]
        output = torch.cat([output[:, :-1], torch.where(changed, last, output[:, -1:])], 1)
    return output, None


AttentionInterface.register(_SCALED_IMAGE_KEYS, _sdpa_scaled_image_keys)
AttentionMaskInterface.register(_SCALED_IMAGE_KEYS, sdpa_mask)


@contextlib.contextmanager
def scaled_image_attention(model: PreTrainedModel, modality_ids: Tensor, factor: Tensor) -> Iterator[None]:
    """Multiplies the attention logits of image tokens for the last token of the prompts, in every layer of a
    decoder-only language model, which attends by sdpa meanwhile.

    Args:
        modality_ids: (B, L).
        factor: (B, 1).
    """
    scale = torch.where(modality_ids == VISION, factor.to(modality_ids.device), 1.0)
    if bool((scale == 1).all()):
        yield
        return
    language = model.config.get_text_config(decoder=True)
    own, token = language._attn_implementation, _key_scale.set(scale)
    language._attn_implementation = _SCALED_IMAGE_KEYS
    try:
        yield
    finally:
        language._attn_implementation = own
        _key_scale.reset(token)
