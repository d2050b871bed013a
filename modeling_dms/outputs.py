"""Outputs of the DMS models: the backbone's own, with weights, signals and losses."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class ModalitySignals(ModelOutput):
    r"""What is known of each modality of each sample. All are (B, M), modalities in the order vision, text.

    confidence: 1 - normalised predictive entropy of the unimodal view, in [0, 1].
    uncertainty: of Monte Carlo dropout, at least 0.
    consistency: cosine of the modalities' representations, in [-1, 1].
    energy: logsumexp of the unimodal logits.
    typicality: z = log(max(1, d / q)), how far outside the clean data; 0 until calibrated.
    damage: calibrated log-odds that the modality is damaged, relative to the threshold: above 0 is flagged; `-inf`
        until calibrated.
    conflict: calibrated disagreement relative to its threshold, one number for all modalities: above 0 is flagged.
    suspicion, disagreement: damage and conflict relative to lower thresholds, which count where both are exceeded: on
        clean samples that is as rare as clear damage. Suspicion also heeds how unlike the clean samples that
        calibration remembers a sample is; it is never less than damage.
    cleanness: how surely the modality is clean, in [0, 1]; 0 where it is absent.
    """

    confidence: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    consistency: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    typicality: torch.Tensor | None = None
    damage: torch.Tensor | None = None
    suspicion: torch.Tensor | None = None
    conflict: torch.Tensor | None = None
    disagreement: torch.Tensor | None = None
    cleanness: torch.Tensor | None = None


@dataclass
class DMSOutput:
    r"""Output of the `dms` submodule.

    weights: (B, M), rows sum to 1, absent modality exactly 0.
    signals: see [`ModalitySignals`].
    representations: h_m, (B, M, d_s).
    logits: unimodal logits, (B, M, K).
    """

    weights: torch.Tensor
    signals: ModalitySignals
    representations: torch.Tensor
    logits: torch.Tensor


class _Fields(ModelOutput):
    """What a DMS class adds to the output of its vanilla class, see [`dms_output`]."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None
    modality_ids: torch.Tensor | None = None
    dms_losses: dict[str, torch.Tensor] | None = None


_made: dict[type[ModelOutput], type[ModelOutput]] = {}


def dms_output(vanilla: type[ModelOutput]) -> type[ModelOutput]:
    """The output class of a DMS class: that of its vanilla class, with:

    modality_weights: (B, M).
    modality_signals: [`ModalitySignals`], `None` where nothing needed them (uniform scheduler, caller's weights).
    modality_ids: (B, L), as given or inferred.
    dms_losses: the unweighted losses by name, with `task` for the backbone's own; `None` without labels.

    Of `generate` the first two.
    """
    if vanilla in _made:
        return _made[vanilla]
    names = ("modality_weights", "modality_signals")
    if not vanilla.__name__.startswith("Generate"):
        names += ("modality_ids", "dms_losses")
    fields = dict.fromkeys(names)
    annotations = {name: _Fields.__annotations__[name] for name in names}
    body = {"__annotations__": annotations, "__module__": __name__, "__doc__": vanilla.__doc__, **fields}
    made = _made[vanilla] = dataclass(type(f"DMS{vanilla.__name__}", (vanilla,), body))
    globals()[made.__name__] = made  # where pickle looks for it
    return made


def with_weights(generated: Any, schedule: Any) -> Any:
    """What `generate` returned, with the weights and signals of its prompts added if it is a structured output."""
    if not isinstance(generated, ModelOutput) or schedule is None:
        return generated
    signals = None if schedule.output is None else schedule.output.signals
    return dms_output(type(generated))(**generated, modality_weights=schedule.weights, modality_signals=signals)
