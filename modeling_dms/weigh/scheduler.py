"""Signals -> modality weights."""

from typing import cast

import torch
from torch import Tensor, nn

from modeling_dms.configuration.configuration_dms import MODALITIES, SIGNALS, DMSConfig
from modeling_dms.outputs import ModalitySignals


# A modality whose evidence of damage reaches the first limit gets no weight beside a clean one. The learned correction
# of a score stays within the second: two of opposite signs decide where the rule is silent or undecided, but cannot
# overrule clear evidence.
EVIDENCE_LIMIT, CORRECTION_LIMIT = 20.0, 6.0
# Among damaged modalities one whose evidence is stronger by so much than the least has nothing to say: clean samples
# look like that e^-10 times as often.
GARBAGE_LEAD = 10.0
# A damaged modality still tells a little, hence `weight_floor`. One that is not believed in a conflict is another
# sample's: its floor is no higher than this.
CONFLICT_FLOOR = 0.01


def evidence(p_value: Tensor, rate: float) -> Tensor:
    """log(rate / p): 0 where an alarm of that rate begins, above 0 beyond it, never infinite."""
    return (rate / p_value).log()


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
        floor: from 0 to below 1 / M, one for all, (B, 1), or (B, M).

    Returns:
        (B, M), float32, rows sum to 1, absent modality exactly 0.
    """
    uniform = uniform_weights(modality_mask)
    scores = scores.float().masked_fill(~modality_mask, -torch.inf)
    floor = (scores.new_zeros(()) + floor).expand(scores.shape).masked_fill(~modality_mask, 0)
    weights = floor + (1 - floor.sum(1, keepdim=True)) * scores.softmax(1)
    weights = weights.masked_fill(~modality_mask, 0)
    lowest = scores.masked_fill(~modality_mask, torch.inf).amin(1, keepdim=True)
    # a comparison has no gradient: under training the (equal) softmax itself must be returned
    if scores.requires_grad:
        return weights / weights.sum(1, keepdim=True)
    return torch.where(scores.amax(1, keepdim=True) == lowest, uniform, weights)


def without_least(weights: Tensor, least: Tensor) -> Tensor:
    """Weights (B, M) without those that are `least`, which become 0: rows sum to 1."""
    kept = weights.masked_fill(least, 0)
    return torch.where(least.any(1, keepdim=True), kept / kept.sum(1, keepdim=True), weights)


class ModalityScheduler(nn.Module):
    """Weights each sample's modalities by its signals; `config.scheduler` names the rule.

    Args:
        config: a [`DMSConfig`].
        modalities: M.
    """

    # which of the signals that may be left out is what the learned scheduler sees of each modality: consistency,
    # typicality, p_clean, p_match, confidence, uncertainty and energy
    SEEN = ("consistency", "typicality", "damage", "consistency", "confidence", "uncertainty", "confidence")

    def __init__(self, config: DMSConfig, modalities: int):
        super().__init__()
        self.config = config
        if config.scheduler == "learned":
            self.hidden = nn.Linear(modalities * len(self.SEEN), config.scheduler_hidden_size)
            self.output = ZeroLinear(config.scheduler_hidden_size, modalities)

    def forward(
        self,
        signals: ModalitySignals,
        modality_mask: Tensor,
        standard: Tensor,
        entropy: Tensor,
        spared: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            signals: (B, M) each.
            modality_mask: (B, M), True where present.
            standard: confidence, uncertainty and energy over their clean spread, (B, M, 3).
            entropy: unimodal predictive entropy, (B, M).
            spared: (M,), above 0 for a modality that damage does not lower; none by default.
            dropped: (M,), above 0 for one that damage takes all weight of, rather than leave less than `weight_floor`;
                none by default.

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
        scores, conflict = rule_scores(signals, modality_mask, self.config, spared)
        if self.config.scheduler == "learned":
            correction = self._correction(signals, modality_mask, standard)
            scores = scores + saturate(correction, CORRECTION_LIMIT)
        floor = torch.full_like(scores, self.config.weight_floor, dtype=torch.float32)
        floor = torch.where(conflict[:, None], floor.clamp_max(CONFLICT_FLOOR), floor)
        if dropped is None:
            return weights_from_scores(scores, modality_mask, floor)
        # not what is lowered for another reason than damage: a conflict, or a learned correction
        drops = (dropped > 0) & (cast(Tensor, signals.p_clean) <= self.config.alarm_rate)
        weights = weights_from_scores(scores, modality_mask, floor.masked_fill(drops, 0))
        return without_least(weights, drops & (weights < floor))

    def _correction(self, signals: ModalitySignals, modality_mask: Tensor, standard: Tensor) -> Tensor:
        """What the MLP makes of all signals: (B, M), 0 at initialisation."""
        rate = self.config.alarm_rate
        alarms = [evidence(cast(Tensor, p), rate) for p in (signals.p_clean, signals.p_match)]
        own = torch.stack([cast(Tensor, signals.consistency), cast(Tensor, signals.typicality), *alarms], -1)
        rows = torch.cat([own.clamp(-10, 10), standard], -1)
        chosen = SIGNALS if self.config.scheduler_signals is None else self.config.scheduler_signals
        seen = torch.tensor([float(kind in chosen) for kind in self.SEEN], device=rows.device)
        inputs = (rows * seen * modality_mask[..., None]).flatten(1).detach()
        return self.output(torch.nn.functional.gelu(self.hidden(inputs.to(self.hidden.weight.dtype))))


def damage_scores(damage: Tensor, modality_mask: Tensor, kappa: float) -> Tensor:
    """Scores of the rule, (B, M), from the evidence of damage beyond a threshold, (B, M), at least 0."""
    least = damage.masked_fill(~modality_mask, torch.inf).amin(1, keepdim=True)
    # beside a clean one all evidence counts
    damage = damage - torch.where(least > 0, least + GARBAGE_LEAD, 0)
    return -saturate(kappa * damage.clamp_min(0), EVIDENCE_LIMIT)


def rule_scores(
    signals: ModalitySignals, modality_mask: Tensor, config: DMSConfig, spared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the training-free rule: minus the evidence of damage beyond a threshold; 0 for nothing suspicious.

    Where all are damaged, how much evidence there is does not tell which of them is worse, and the scores are equal,
    but for what is as far from all clean data as garbage is. Where none is damaged but they disagree,
    `conflict_prior` decides, if it is set. This is our own choice.

    Args:
        spared: as of [`ModalityScheduler`]; their damage lowers nothing.

    Returns:
        (B, M), and where `conflict_prior` decides, (B,) bool.
    """
    damage = evidence(cast(Tensor, signals.p_clean), config.alarm_rate).clamp_min(0)
    clean = (damage == 0) | ~modality_mask
    if spared is not None:
        damage = damage.masked_fill(spared > 0, 0)
    scores = damage_scores(damage, modality_mask, config.kappa)
    if config.conflict_prior not in MODALITIES:  # none, or one that takes a second look
        return scores, torch.zeros_like(modality_mask[:, 0])
    believed = MODALITIES.index(config.conflict_prior)
    favour = torch.zeros_like(scores)
    conflict = evidence(cast(Tensor, signals.p_match), config.alarm_rate)[:, believed].clamp_min(0)
    conflict = saturate(config.kappa * conflict, EVIDENCE_LIMIT)
    favour[:, believed] = torch.where(clean.all(1), conflict, 0)
    return scores + favour, favour[:, believed] > 0
