"""Ways to weigh modalities that DMS is compared with, and DMS itself, behind one interface.

B prompts, C continuations of N tokens, vocabulary K, M modalities. A batch holds prompts without answers, as a
`PromptCollator` makes them `with_ids`, and may hold encoded images (`mm_encoder_outputs`) beside the pixels.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from modeling_dms._compat import CACHE
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.weigh.scheduler import ModalityScheduler, uniform_weights


# what a task adds to the prompts for bookkeeping
BOOKKEEPING = ("sample_ids", "image_keys", "damaged")
# continuations read at once, over all prompts of a batch
ROWS = 64
Batch = dict[str, Any]


def on_device(batch: Batch, model: PreTrainedModel) -> Batch:
    """The batch where the model is."""
    return {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in batch.items()}


def present(prompt: Batch) -> Tensor:
    """Which sources each prompt has, (B, S), or, where it tells none apart, of image and context, (B, M)."""
    several = "source_ids" in prompt
    ids = prompt["source_ids" if several else "modality_ids"]
    numbers = torch.arange(1, (max(1, int(ids.max())) if several else len(MODALITIES)) + 1, device=ids.device)
    return (ids[:, :, None] == numbers).any(1)


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
    inputs = model_inputs(prompt)
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
        """From prompts without answers: here the weights (B, M), of several sources (B, S)."""
        if "source_ids" in prompt:
            return uniform_weights(present(prompt))
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
class Told(Method):
    """Told which sources are damaged: the oracle where there are several.

    Attributes:
        low: weight of the damaged ones, of two sources one of which is damaged; of more in proportion.
    """

    name: str = "oracle"
    low: float = 0.0

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        uniform = super().decide(model, prompt)
        weights = uniform * torch.where(prompt["damaged"], self.low, 1 - self.low)
        total = weights.sum(1, keepdim=True)
        return torch.where(total > 0, weights / total.clamp_min(1e-12), uniform)


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
            return model.get_modality_weights(**model_inputs(prompt))[0]

    @torch.no_grad()
    def judge(self, model: PreTrainedModel, prompt: Batch) -> tuple[Tensor, Tensor | None]:
        """Both of one pass.

        Raises:
            ValueError: for a second look that calibration has not learned.
        """
        if not cast(Any, model).dms.calibration.reliability.count > 0:
            if self.scheduler is not None and self.scheduler.config.conflict_prior == "learned":
                raise ValueError(
                    f"{self.name}: the checkpoint has not learned whom to believe in a conflict; calibrate it with "
                    "its answers, as `dms calibrate` does unless it is told --asked 0"
                )
            return self.decide(model, prompt), None
        inputs, language = model_inputs(prompt), model.config.get_text_config()
        if language.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.full_like(prompt["input_ids"][:, :1], language.decoder_start_token_id)
        else:
            inputs["logits_to_keep"] = 1
        with scheduled_by(model, self.scheduler):
            out = model(**inputs)
        return out.modality_weights, out.reliability


def model_inputs(prompt: Batch) -> Batch:
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
