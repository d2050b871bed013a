"""Ways to weigh modalities that DMS is compared with, and DMS itself, behind one interface.

Baselines have their published hyperparameters as defaults; `search` tries others on validation data, so that none is
straw.

B prompts, C continuations of N tokens, vocabulary K, M modalities. A batch holds prompts without answers, as a
`PromptCollator` makes them `with_ids`, and may hold encoded images (`mm_encoder_outputs`) beside the pixels.
"""

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_dms._compat import CACHE
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.observe.prompt import VISION
from modeling_dms.weigh.scheduler import ModalityScheduler


# what a `PromptCollator` adds for bookkeeping
BOOKKEEPING = ("sample_ids", "image_keys")
# continuations read at once, over all prompts of a batch
ROWS = 64
Batch = dict[str, Any]


def read(model: PreTrainedModel, prompt: Batch, weights: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Reads prompts once, to continue each in several ways.

    Args:
        prompt: B prompts, padded on the left.
        weights: (B, M).

    Returns:
        Logits (B, K) of the next token, and a function that takes continuations (C, N) and gives the logits
        (B, C, N, K) behind each of their tokens. An encoder-decoder reads the prompt again for each of them.

    Raises:
        ValueError: for a model without a language model.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no language model that could continue a prompt")
    inputs = _inputs(prompt)
    language, rows = model.config.get_text_config(), len(prompt["input_ids"])
    if language.is_encoder_decoder:

        def decoded(tokens: Tensor) -> Tensor:
            tokens = F.pad(tokens, (1, 0), value=language.decoder_start_token_id)
            lines = [line.expand(rows, -1) for line in tokens]
            return torch.stack(
                [model(**inputs, modality_weights=weights, decoder_input_ids=line).logits for line in lines], 1
            )

        return decoded(prompt["input_ids"].new_empty(1, 0))[:, 0, 0], lambda tokens: decoded(tokens)[:, :, 1:]

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    read_once = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    out = model(**inputs, modality_weights=weights, **read_once)

    def continued(tokens: Tensor) -> Tensor:
        count = len(tokens)
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(count)
        mask = prompt["attention_mask"].repeat_interleave(count, 0)
        logits = model(
            input_ids=tokens.repeat(rows, 1),
            attention_mask=F.pad(mask, (0, tokens.shape[1]), value=1),
            # as the prefill left them: an absent modality has no weight
            modality_weights=out.modality_weights.repeat_interleave(count, 0),
            modality_ids=out.modality_ids.repeat_interleave(count, 0),
            **{CACHE: copied},
        ).logits
        return logits.unflatten(0, (rows, count))

    return out.logits[:, -1], continued


@dataclass(frozen=True)
class Method:
    """Decides once a prompt, and answers by that decision.

    This one is the static model: equal weights. A decision is a tensor of one row a sample. Subclasses change how it
    is made (`decide`) and what it does (`steer`, `intervene`, `combine`).
    """

    name: str = "static"

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """From prompts without answers: here the modality weights (B, M)."""
        ids = prompt["input_ids"]
        return torch.full((len(ids), len(MODALITIES)), 1 / len(MODALITIES), device=ids.device)

    def judge(self, model: PreTrainedModel, prompt: Batch) -> tuple[Tensor, Tensor | None]:
        """The decision, and how far the answers can be relied on: (B,) in [0, 1], or `None` for a method that does not
        tell."""
        return self.decide(model, prompt), None

    def weights(self, decision: Tensor) -> Tensor | None:
        """Modality weights (B, M), `None` for a method that has none."""
        return decision

    def steer(self, prompt: Batch, decision: Tensor) -> tuple[Batch, Tensor]:
        """The prompts that the model reads, a multiple of B, and their modality weights."""
        return prompt, decision

    def intervene(
        self, model: PreTrainedModel, prompt: Batch, decision: Tensor
    ) -> contextlib.AbstractContextManager[None]:
        """Changes the model for as long as it reads."""
        return contextlib.nullcontext()

    def combine(self, logits: Tensor) -> Tensor:
        """Logits (..., K) of the prompts that the model read, as `steer` ordered them -> (B, ..., K)."""
        return logits

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, prompt: Batch, decision: Tensor) -> Tensor:
        """Of the next token: (B, K).

        Raises:
            ValueError: for a model without a language model.
        """
        with self.intervene(model, prompt, decision):
            return self.combine(read(model, *self.steer(prompt, decision))[0].float())

    @torch.no_grad()
    def log_likelihood(
        self, model: PreTrainedModel, prompt: Batch, decision: Tensor, continuations: Sequence[Sequence[int]]
    ) -> Tensor:
        """Sum of the log-probabilities of the tokens of each continuation: (B, C). The prompt is read once.

        Args:
            continuations: C lists of token ids, the same for all prompts.

        Raises:
            ValueError: if there is none, or an empty one; for a model without a language model.
        """
        if not continuations or not all(continuations):
            raise ValueError("each continuation must have at least one token")
        lists = [torch.tensor(line, device=prompt["input_ids"].device) for line in continuations]
        # of similar length together, so that little is padded
        order = sorted(range(len(lists)), key=lambda index: len(lists[index]))
        with self.intervene(model, prompt, decision):
            rows, weights = self.steer(prompt, decision)
            first, continued = read(model, rows, weights)
            first_log_p = self.combine(first.float()).log_softmax(-1)  # (B, K)
            found = first_log_p.new_empty(len(first_log_p), len(lists))
            size = max(1, ROWS // len(rows["input_ids"]))
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                # causal attention: no token sees the padding behind it
                tokens = pad_sequence([lists[index] for index in chosen], batch_first=True, padding_value=-1)  # (c, N)
                found[:, chosen] = first_log_p[:, tokens[:, 0]]
                if tokens.shape[1] > 1:
                    log_p = self.combine(continued(tokens[:, :-1].clamp_min(0)).float()).log_softmax(-1)
                    wanted = tokens[:, 1:].expand(len(log_p), -1, -1)  # (B, c, N - 1)
                    each = log_p.gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
                    found[:, chosen] += each.masked_fill(wanted < 0, 0).sum(-1)
        return found

    def generate(self, model: PreTrainedModel, prompt: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        """The new token ids (B, N), greedily. What ended early is padded behind its end token."""
        rows, weights = self.steer(prompt, decision)
        inputs = {k: v for k, v in rows.items() if k not in (*BOOKKEEPING, "mm_encoder_outputs")}
        given = 1 if model.config.get_text_config().is_encoder_decoder else rows["input_ids"].shape[1]
        processors = LogitsProcessorList([_Combine(self)])
        with self.intervene(model, prompt, decision):
            ids = model.generate(
                **inputs, modality_weights=weights, do_sample=False, logits_processor=processors, **kwargs
            )
        return ids[: len(decision), given:]


class _Combine(LogitsProcessor):
    """Every prompt that the model reads goes on with the token of what they are combined to."""

    def __init__(self, method: Method):
        self.method = method

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        combined = self.method.combine(scores)
        return combined.repeat(len(scores) // len(combined), 1)


@dataclass(frozen=True)
class Fixed(Method):
    """The same weights for every sample: fitted to training data the mean-prior baseline, told which modality is
    damaged the oracle."""

    name: str = "mean prior"
    vision: float = 0.5

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        ids = prompt["input_ids"]
        return torch.tensor([[self.vision, 1 - self.vision]], device=ids.device).repeat(len(ids), 1)


@dataclass(frozen=True)
class Scheduled(Method):
    """Weights of a scheduler; `None` is the model's own. Rule and trained schedulers are DMS, `entropy` (MLA, Zhang et
    al., 2024) and `energy` (QMF, Zhang et al., 2023) published baselines."""

    name: str = "rule"
    scheduler: ModalityScheduler | None = None

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """
        Raises:
            ValueError: for another scheduler than that of a model which has no signals, its own being uniform.
        """
        if self.scheduler is not None and model.config.dms_config.scheduler == "uniform":
            raise ValueError(
                f"{self.name}: a model with scheduler='uniform' computes no signals; load it with another scheduler"
            )
        with scheduled_by(model, self.scheduler):
            return model.get_modality_weights(**_inputs(prompt))[0]

    @torch.no_grad()
    def judge(self, model: PreTrainedModel, prompt: Batch) -> tuple[Tensor, Tensor | None]:
        """Both of one pass."""
        if not cast(Any, model).dms.calibration.reliability.count > 0:
            return self.decide(model, prompt), None
        inputs, language = _inputs(prompt), model.config.get_text_config()
        if language.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.full_like(prompt["input_ids"][:, :1], language.decoder_start_token_id)
        else:
            inputs["logits_to_keep"] = 1
        with scheduled_by(model, self.scheduler):
            out = model(**inputs)
        return out.modality_weights, out.reliability


def _inputs(prompt: Batch) -> Batch:
    """What a model takes of a batch."""
    unused = {*BOOKKEEPING, "pixel_values" if "mm_encoder_outputs" in prompt else "mm_encoder_outputs"}
    return {name: value for name, value in prompt.items() if name not in unused}


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

    As published (DAMO-NLP-SG/VCD), but for two things. Noise is drawn per sample id, so that it does not depend on
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
        """The images (I, 3, H, W) with noise: a forward diffusion to `noise_step` of 1000, sigmoid schedule."""
        pixels = prompt.get("pixel_values")
        if pixels is None:
            return None
        betas = torch.linspace(-6, 6, 1000).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
        kept = (1 - betas).cumprod(0)[self.noise_step]
        placeholders = (prompt["modality_ids"] == VISION).sum(1)
        counts = placeholders * len(pixels) // placeholders.sum()  # images of each sample
        noise = [
            torch.randn(count, *pixels.shape[1:], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            for name, count in zip(prompt["sample_ids"], counts.tolist(), strict=True)
        ]
        return (kept.sqrt() * pixels.cpu() + (1 - kept).sqrt() * torch.cat(noise)).to(pixels)

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


# the published defaults first; what `search` tries on validation data (AdaptVis: as its authors, and no sharpening)
GRIDS: dict[str, list[dict[str, float]]] = {
    "VCD": [{"alpha": a, "beta": b} for a in (1.0, 0.5, 0.2) for b in (0.1, 0.5)],
    "AdaptVis": [
        {"low": low, "high": high, "threshold": threshold}
        for threshold in (0.3, 0.6, 0.9)
        for low in (0.5, 0.8)
        for high in (1.2, 1.5, 2.0, 1.0)
    ],
    "mean prior": [{"vision": value} for value in (0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)],
}
TEMPERATURES = (1.0, 0.1, 0.3, 3.0)


def search(candidates: Sequence[Method], score: Callable[[Sequence[Method]], Sequence[float]]) -> Method:
    """The best of several; of equally good ones the first."""
    scores = list(score(candidates))
    return candidates[scores.index(max(scores))]
