"""Signals -> modality weights."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from modeling_dms.configuration.configuration_dms import MODALITIES, SIGNALS, DMSConfig
from modeling_dms.outputs import ModalitySignals


# A modality whose evidence of damage reaches the first limit gets no weight beside a clean one. The learned correction
# of a score stays within the second: two of opposite signs decide where the rule is silent or undecided, but cannot
# overrule clear evidence.
EVIDENCE_LIMIT, CORRECTION_LIMIT = 20.0, 6.0
# A damaged modality still tells a little, hence `weight_floor`. One that is not believed in a conflict is another
# sample's: its floor is no higher than this.
CONFLICT_FLOOR = 0.01


def saturate(scores: Tensor, limit: float) -> Tensor:
    """As they are near 0, never beyond +-`limit`."""
    return limit * torch.tanh(scores / limit)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero; a class of its own so that `_init_weights` can tell it apart."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def uniform_weights(modality_mask: Tensor) -> Tensor:
    """Equal weights of the present modalities: (B, M) bool -> (B, M) float32, rows sum to 1.

    Raises:
        ValueError: naming the samples in which no modality is present.
    """
    if not torch.compiler.is_compiling():
        empty = (~modality_mask.any(1)).nonzero()[:, 0]
        if len(empty):
            raise ValueError(f"sample(s) {empty.tolist()} of the batch have neither {' nor '.join(MODALITIES)}")
    present = modality_mask.float()
    return present / present.sum(1, keepdim=True)


def weights_from_scores(scores: Tensor, modality_mask: Tensor, floor: float | Tensor = 0.0) -> Tensor:
    """Softmax over the present modalities, no weight of a present one below `floor`.

    Equal scores give *exactly* the uniform weights, so a sample with nothing suspicious is left bit for bit as it was.

    Args:
        scores: (B, M).
        modality_mask: (B, M), True where present.
        floor: from 0 to below 1 / M, one for all or (B, 1).

    Returns:
        (B, M), float32, rows sum to 1, absent modality exactly 0.
    """
    uniform = uniform_weights(modality_mask)
    scores = scores.float().masked_fill(~modality_mask, -torch.inf)
    count = modality_mask.sum(1, keepdim=True)
    weights = floor + (1 - count * floor) * scores.softmax(1)
    weights = weights.masked_fill(~modality_mask, 0)
    lowest = scores.masked_fill(~modality_mask, torch.inf).amin(1, keepdim=True)
    # a comparison has no gradient: under training the (equal) softmax itself must be returned
    if scores.requires_grad:
        return weights / weights.sum(1, keepdim=True)
    return torch.where(scores.amax(1, keepdim=True) == lowest, uniform, weights)


class ModalityScheduler(nn.Module):
    """Weights each sample's modalities by its signals; `config.scheduler` names the rule.

    Args:
        config: a [`DMSConfig`].
        calibrated: of each modality, how many calibrated inputs the learned scheduler gets, see
            `ModalityCalibration.scheduler_inputs`.
    """

    # consistency, typicality, damage, conflict
    SIGNALS = 4

    def __init__(self, config: DMSConfig, calibrated: Sequence[int]):
        super().__init__()
        self.config = config
        if config.scheduler == "learned":
            modalities = len(calibrated)
            size = sum(calibrated) + modalities * self.SIGNALS
            self.hidden = nn.Linear(size, config.scheduler_hidden_size)
            self.output = ZeroLinear(config.scheduler_hidden_size, modalities)

    def forward(
        self,
        signals: ModalitySignals,
        modality_mask: Tensor,
        calibrated: Sequence[Tensor],
        entropy: Tensor,
    ) -> Tensor:
        """
        Args:
            signals: (B, M) each.
            modality_mask: (B, M), True where present.
            calibrated: (B, P_m) each, see `ModalityCalibration.scheduler_inputs`.
            entropy: unimodal predictive entropy, (B, M).

        Returns:
            (B, M), rows sum to 1, absent modality exactly 0.

        Raises:
            ValueError: if a sample has no modality.
        """
        if self.config.scheduler == "uniform":
            return uniform_weights(modality_mask)
        if self.config.scheduler == "entropy":
            return weights_from_scores(-entropy / self.config.temperature, modality_mask)
        if self.config.scheduler == "energy":
            return weights_from_scores(cast(Tensor, signals.energy) / self.config.temperature, modality_mask)
        scores, conflict = rule_scores(signals, modality_mask, self.config)
        if self.config.scheduler == "learned":
            correction = self._correction(signals, modality_mask, calibrated)
            scores = scores + saturate(correction, CORRECTION_LIMIT)
        floor = torch.full_like(scores[:, :1], self.config.weight_floor, dtype=torch.float32)
        floor = torch.where(conflict[:, None], floor.clamp_max(CONFLICT_FLOOR), floor)
        return weights_from_scores(scores, modality_mask, floor)

    def _correction(self, signals: ModalitySignals, modality_mask: Tensor, calibrated: Sequence[Tensor]) -> Tensor:
        """What the MLP makes of all signals: (B, M), 0 at initialisation."""
        names = ("consistency", "typicality", "damage", "conflict")
        rows = torch.stack([signals[name].clamp(-10, 10) for name in names], dim=-1)
        rows = rows * self._seen([*names[:3], "consistency"], rows.device)
        rows = rows * modality_mask[..., None]
        own = []
        for index, value in enumerate(calibrated):
            kinds = ["typicality"] * (value.shape[1] - 3) + ["confidence", "uncertainty", "confidence"]
            own.append(value * self._seen(kinds, value.device) * modality_mask[:, [index]])
        inputs = torch.cat([rows.flatten(1), *own], dim=1).detach()
        return self.output(torch.nn.functional.gelu(self.hidden(inputs.to(self.hidden.weight.dtype))))

    def _seen(self, kinds: Sequence[str], device: torch.device) -> Tensor:
        """1 for inputs of the signals that the MLP may see, 0 for others."""
        chosen = SIGNALS if self.config.scheduler_signals is None else self.config.scheduler_signals
        return torch.tensor([float(kind in chosen) for kind in kinds], device=device)


def rule_scores(signals: ModalitySignals, modality_mask: Tensor, config: DMSConfig) -> tuple[Tensor, Tensor]:
    """Scores of the training-free rule: minus the evidence of damage beyond a threshold; 0 for nothing suspicious.

    The damage log-odds already combine alpha * confidence, beta * uncertainty and the typicalities, with coefficients
    that calibration fitted. Consistency sharpens: where the modalities agree only clear damage counts; where they
    disagree, one of them must be wrong, and the lower threshold of `arbitration_rate` decides which. Where even that
    finds nothing, `conflict_prior` decides, if it is set. Where both are damaged the scores are equal: how much
    evidence there is does not tell which of them is worse. This is our own choice.

    Returns:
        (B, M), and where `conflict_prior` decides, (B,) bool.
    """
    evidence = cast(Tensor, signals.damage)
    if config.consistency == "sharpen":
        evidence = torch.where(signals.disagreement > 0, cast(Tensor, signals.suspicion), evidence)
    clean = ((evidence <= 0) | ~modality_mask).all(1)
    own = torch.eye(evidence.shape[1], dtype=torch.bool, device=evidence.device)
    evidence = saturate(config.kappa * evidence.clamp_min(0), EVIDENCE_LIMIT)
    # as far as another one is clean
    evidence = evidence * cast(Tensor, signals.cleanness)[:, None].masked_fill(own, 0).amax(2)
    if config.consistency == "additive":
        return signals.consistency - evidence, torch.zeros_like(modality_mask[:, 0])
    if config.conflict_prior is None:
        return -evidence, torch.zeros_like(modality_mask[:, 0])
    believed = MODALITIES.index(config.conflict_prior)
    favour = torch.zeros_like(evidence)
    conflict = saturate(config.kappa * signals.conflict[:, believed].clamp_min(0), EVIDENCE_LIMIT)
    favour[:, believed] = torch.where(clean, conflict, 0)
    return favour - evidence, favour[:, believed] > 0
