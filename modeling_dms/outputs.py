"""Outputs of the DMS models: the backbone's own, with weights, signals and losses."""

from dataclasses import dataclass

import torch
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2ForConditionalGenerationModelOutput,
    Blip2ImageTextMatchingModelOutput,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
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


@dataclass
class DMSLlavaOutput(LlavaCausalLMOutputWithPast):
    r"""`LlavaCausalLMOutputWithPast`, whose fields all backbones of LLaVA's shape return, with:

    modality_weights: (B, M).
    modality_signals: [`ModalitySignals`], `None` where nothing needed them (uniform scheduler, caller's weights).
    modality_ids: (B, L), as given or inferred; decoding by hand passes it on.
    dms_losses: the unweighted losses by name, with `task` for the backbone's own; `None` without labels.
    """

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None
    modality_ids: torch.Tensor | None = None
    dms_losses: dict[str, torch.Tensor] | None = None


@dataclass
class DMSBlip2Output(Blip2ForConditionalGenerationModelOutput):
    r"""`Blip2ForConditionalGenerationModelOutput` with the fields of [`DMSLlavaOutput`]."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None
    modality_ids: torch.Tensor | None = None
    dms_losses: dict[str, torch.Tensor] | None = None


@dataclass
class DMSBlip2RetrievalOutput(Blip2ImageTextMatchingModelOutput):
    r"""`Blip2ImageTextMatchingModelOutput` with the fields of [`DMSLlavaOutput`]."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None
    modality_ids: torch.Tensor | None = None
    dms_losses: dict[str, torch.Tensor] | None = None


@dataclass
class DMSGenerateDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    r"""`GenerateDecoderOnlyOutput` with `modality_weights` (B, M) and `modality_signals`."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None


@dataclass
class DMSGenerateBeamDecoderOnlyOutput(GenerateBeamDecoderOnlyOutput):
    r"""`GenerateBeamDecoderOnlyOutput` with `modality_weights` (B, M) and `modality_signals`."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None


@dataclass
class DMSGenerateEncoderDecoderOutput(GenerateEncoderDecoderOutput):
    r"""`GenerateEncoderDecoderOutput` with `modality_weights` (B, M) and `modality_signals`."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None


@dataclass
class DMSGenerateBeamEncoderDecoderOutput(GenerateBeamEncoderDecoderOutput):
    r"""`GenerateBeamEncoderDecoderOutput` with `modality_weights` (B, M) and `modality_signals`."""

    modality_weights: torch.Tensor | None = None
    modality_signals: ModalitySignals | None = None


_GENERATE_OUTPUTS = {
    output.__mro__[1]: output
    for output in (
        DMSGenerateDecoderOnlyOutput,
        DMSGenerateBeamDecoderOnlyOutput,
        DMSGenerateEncoderDecoderOutput,
        DMSGenerateBeamEncoderDecoderOutput,
    )
}


def with_weights(generated, weights: torch.Tensor | None, signals: ModalitySignals | None):
    """What `generate` returned, with the weights and signals added if it is a structured output."""
    output_class = _GENERATE_OUTPUTS.get(type(generated))
    if output_class is None:
        return generated
    return output_class(**generated, modality_weights=weights, modality_signals=signals)
