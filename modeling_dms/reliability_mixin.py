"""How far an answer can be relied on, and the second look at prompts whose sources disagree or look damaged."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.observe.prompt import Prompt, Schedule, SecondLook
from modeling_dms.outputs import Weighed, WeighedSources
from modeling_dms.weigh.second_look import believed, first_tokens_compared


_kept: ContextVar[list[Tensor | None] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def kept_reliability() -> Iterator[list[Tensor | None]]:
    """Keeps how far answers can be relied on where a program passes on their texts alone, as pipelines do.

    Yields:
        A list. Each call of `generate` within the context adds the reliability of its answers, (B,) in [0, 1], or
        `None` where nothing is known of it.
    """
    kept: list[Tensor | None] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


class ReliabilityMixin:
    """Adds reliability to a model that weighs its modalities (`DMSMixin`)."""

    config: Any

    def _sureness(self, outputs: Any, schedule: Schedule | None, inputs: dict[str, Any]) -> Tensor | None:
        """The probability (B,) of the likeliest token that follows prompts."""
        logits = outputs.get("logits")
        if schedule is None or logits is None or torch.compiler.is_compiling():
            return None
        ids, mask = schedule.modality_ids, inputs.get("attention_mask")
        if not self._is_causal:
            logits = logits[:, 0]
        elif logits.shape[1] != ids.shape[1]:
            logits = logits[:, -1]
        else:
            places = self._answer_places(ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
            logits = logits[torch.arange(len(logits), device=logits.device), places.to(logits.device)]
        return logits.detach().float().softmax(-1).amax(-1)

    def _second_look(self, prompt: Prompt, schedule: Schedule, output: Weighed) -> SecondLook | None:
        """A second look at prompts that disagree or look damaged, if the scheduler asks for it."""
        config = self.dms.scheduler.config
        if config.conflict_prior != "learned" or not self.dms.calibration.reliability.count > 0:
            return None
        rows = (output.signals.p_values <= config.alarm_rate).any(1) & prompt.modality_mask.all(1)
        if not rows.any():
            return None
        biases = []
        for modality in range(len(MODALITIES)):
            weights = schedule.weights.clone()
            weights[rows] = F.one_hot(torch.tensor(modality), len(MODALITIES)).to(weights)
            biases.append(cast(Tensor, self._key_bias(weights, prompt.modality_ids, prompt.attention_mask)))
        return SecondLook(biases, functools.partial(self._decide, prompt, schedule, output, rows))

    def _decide(
        self, prompt: Prompt, schedule: Schedule, output: Weighed, rows: Tensor, read: Sequence[Tensor]
    ) -> Schedule:
        """The schedule after a second look at some rows (B,): the answer that can be relied on most decides, unless
        all agree.

        Args:
            read: what the output layer reads (B, P, D), of both modalities and of each alone.
        """
        places = self._answer_places(prompt.modality_ids, prompt.attention_mask)
        index = rows.nonzero()[:, 0]
        said = [self._readout(states[index, places[index]]).float().softmax(-1) for states in read]
        both, *alone = said
        numbers = first_tokens_compared(*alone, both)
        trust = self.dms.calibration.reliability.looked(numbers, output.signals.p_values[index])
        best, which = believed(trust, numbers)
        weights, reliability = schedule.weights.clone(), torch.full_like(schedule.weights[:, 0], torch.nan)
        choices = [*torch.eye(len(MODALITIES)), torch.full((len(MODALITIES),), 1 / len(MODALITIES))]
        weights[index] = torch.stack(choices).to(weights)[which]
        reliability[index] = best
        bias = self._key_bias(weights, prompt.modality_ids, prompt.attention_mask)
        output = replace(output, weights=weights)
        return Schedule(prompt.modality_ids, prompt.modality_mask, weights, output, bias, None, reliability)

    def _reliability(self, schedule: Schedule | None, sureness: Tensor | None) -> Tensor | None:
        """How far answers can be relied on: (B,) in [0, 1]; `None` where nothing is known of it.

        Args:
            sureness: the probability of the likeliest first token, (B,), or several times for each prompt.
        """
        trust = self.dms.calibration.reliability
        if schedule is None or schedule.output is None or sureness is None or torch.compiler.is_compiling():
            return None
        # of several sources none is known
        output = schedule.output
        p_values = output.p_values if isinstance(output, WeighedSources) else output.signals.p_values
        if p_values is None or not trust.count > 0:
            return None
        found = trust(sureness[:: len(sureness) // len(p_values)].to(p_values.device), p_values)
        known = schedule.reliability
        return found if known is None else torch.where(known.isnan(), found, known)

    def _keep(self, reliability: Tensor | None) -> Tensor | None:
        """The same, which the caller may keep by `kept_reliability`."""
        kept = _kept.get()
        if kept is not None:
            kept.append(reliability)
        return reliability
