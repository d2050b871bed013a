"""Outputs of the DMS models: the backbone's own, with weights, signals and losses."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.utils import ModelOutput


@dataclass
class ModalitySignals(ModelOutput):
    r"""What is known of each modality of each sample. All are (B, M), modalities in the order vision, text; of prompts
    with `source_ids`, (B, S), a column a source, without the first four.

    confidence: 1 - normalised predictive entropy of the unimodal view, in [0, 1].
    uncertainty: of Monte Carlo dropout, at least 0.
    consistency: cosine of the modalities' representations, in [-1, 1].
    energy: logsumexp of the unimodal logits.
    typicality: -log(max(1, d / q)), how typical of clean data: 0 within them, the lower the farther outside; 0 until
        calibrated.
    surprisal: mean of minus log p of each text token, given those before it, in nats; 0 for images, and where the
        language model is an encoder-decoder.
    p_clean: conformal p-value, the share of clean samples that look at least as damaged: of clean ones at most a share
        a has a p-value of at most a. Flagged is what has at most `DMSConfig.alarm_rate`; 1 until calibrated.
    p_match: the same of the pair, one number for all modalities: the share of clean pairs that agree as little. Of
        three or more sources, of each of them, by how little it agrees with the others.
    agreement: of several sources, (B, S, S): the log-likelihood ratio, in nats, that two of them belong together; NaN
        where nothing tells. `None` of modalities.
    """

    confidence: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    consistency: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    typicality: torch.Tensor | None = None
    surprisal: torch.Tensor | None = None
    p_clean: torch.Tensor | None = None
    p_match: torch.Tensor | None = None
    agreement: torch.Tensor | None = None

    @property
    def p_values(self) -> torch.Tensor:
        """Of each modality and, last, of the pair: (B, M + 1)."""
        return torch.cat([cast(torch.Tensor, self.p_clean), cast(torch.Tensor, self.p_match)[:, :1]], 1)


@dataclass
class Weighed:
    r"""Weights and what they were made from.

    weights: (B, M), rows sum to 1, absent modality exactly 0; (B, S) of sources.
    signals: see [`ModalitySignals`].
    """

    weights: torch.Tensor
    signals: ModalitySignals


@dataclass
class WeighedSources(Weighed):
    r"""Of each source.

    p_values: (B, M + 1), see [`ModalitySignals`], of prompts with one image and one text at most, NaN for others;
        `None` where there are only others.
    """

    p_values: torch.Tensor | None


@dataclass
class DMSOutput(Weighed):
    r"""Output of the `dms` submodule.

    representations: h_m, (B, M, d_s).
    logits: unimodal logits, (B, M, K).
    """

    representations: torch.Tensor
    logits: torch.Tensor


_made: dict[type[ModelOutput], type[ModelOutput]] = {}


def dms_output(vanilla: type[ModelOutput]) -> type[ModelOutput]:
    """The output class of a DMS class: that of its vanilla class, with:

    modality_weights: (B, M).
    modality_signals: [`ModalitySignals`], `None` where nothing needed them (uniform scheduler, caller's weights).
    reliability: (B,), the expected agreement of the answer's first token with the answer that undamaged inputs would
        give, in [0, 1]; `None` before calibration at level 3, with labels, where the cache holds the prompt, and for
        classes that do not continue prompts.
    modality_ids: (B, L), as given or inferred.
    dms_losses: the unweighted losses by name, with `task` for the backbone's own; `None` without labels.

    Of `generate` the first three.
    """
    if vanilla in _made:
        return _made[vanilla]
    names = ("modality_weights", "modality_signals", "reliability")
    if not vanilla.__name__.startswith("Generate"):
        names += ("modality_ids", "dms_losses")
    fields, annotations = dict.fromkeys(names), dict.fromkeys(names, Any)
    body = {"__annotations__": annotations, "__module__": __name__, "__doc__": vanilla.__doc__, **fields}
    made = _made[vanilla] = dataclass(type(f"DMS{vanilla.__name__}", (vanilla,), body))
    globals()[made.__name__] = made  # where pickle looks for it
    return made


def with_weights(generated: Any, schedule: Any, reliability: torch.Tensor | None) -> Any:
    """What `generate` returned, with the weights and signals of its prompts, and how far its answers can be relied on,
    added if it is a structured output."""
    if not isinstance(generated, ModelOutput) or schedule is None:
        return generated
    signals = None if schedule.output is None else schedule.output.signals
    return dms_output(type(generated))(
        **generated, modality_weights=schedule.weights, modality_signals=signals, reliability=reliability
    )
