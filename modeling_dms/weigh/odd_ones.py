"""Weights of several sources: with three or more, the one that agrees with none of the others shows.

Own. Two sources that disagree cannot be told by that which of them is wrong. Of more, what lies beside a majority that
agrees is the odd one out. How far two sources agree is a log-likelihood ratio, that they belong together against that
they do not; a source is as odd as it is against the others on average.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling_dms.weigh.scheduler import damage_scores, weights_from_scores, without_least


def oddness(agreement: Tensor, compared: Tensor) -> Tensor:
    """How odd each source is: minus its mean agreement with the others.

    Args:
        agreement: (B, S, S), symmetric; NaN for pairs of which nothing is known.
        compared: (B, S), which sources count.

    Returns:
        (B, S), -inf for what has nothing to be compared with.
    """
    pairs = compared[:, :, None] & compared[:, None] & ~agreement.isnan()
    pairs = pairs & ~torch.eye(compared.shape[1], dtype=torch.bool, device=compared.device)
    count = pairs.sum(2)
    mean = agreement.nan_to_num(0).masked_fill(~pairs, 0).sum(2) / count.clamp_min(1)
    return torch.where(count > 0, -mean, -torch.inf)


def odd_ones(
    agreement: Tensor, compared: Tensor, p_value: Callable[[Tensor], Tensor], rate: float
) -> tuple[Tensor, Tensor]:
    """Finds the sources that lie beside a majority that agrees: the oddest is put aside, then the oddest of the rest,
    until none is odd. Where as many are odd as not, or more, nothing tells who is right, and none is.

    Args:
        agreement, compared: see `oddness`.
        p_value: of the oddness of the oddest source of a set, any shape.
        rate: a source with a p-value up to this is odd.

    Returns:
        p-values (B, S), 1 for what is not compared, and which sources are odd (B, S).
    """
    left, most = compared, (compared.sum(1) - 1).clamp_min(0) // 2
    p_values = p_value(oddness(agreement, compared)).where(compared, 1)
    odd, open_rows = torch.zeros_like(compared), torch.ones_like(most, dtype=torch.bool)
    found = p_values
    while bool(open_rows.any()):
        odds = oddness(agreement, left)
        now = p_value(odds).where(left, 1)
        oddest = torch.zeros_like(left).scatter(1, odds.argmax(1, keepdim=True), True)
        alarm = open_rows & (now.where(oddest, 1) <= rate).any(1)
        full = odd.sum(1) >= most
        found = torch.where((open_rows & ~alarm)[:, None] & left, now, found)
        # no majority agrees
        lost = alarm & full
        odd, found = odd & ~lost[:, None], torch.where(lost[:, None], p_values, found)
        aside = oddest & (alarm & ~full)[:, None]
        found = torch.where(aside, now, found)
        odd, left, open_rows = odd | aside, left & ~aside, alarm & ~full
    return found, odd


def alarm_rates(present: Tensor, false_alarm_rate: float) -> tuple[Tensor, float]:
    """How the rate of false alarms of a prompt is shared: one half among its sources, (B, 1), for their damage, and
    one half for an odd one among them. Of fewer than three none can be odd, and they share all of it."""
    count = present.sum(1, keepdim=True).clamp_min(1)
    return false_alarm_rate / torch.where(count > 2, 2 * count, count), false_alarm_rate / 2


def source_weights(
    p_clean: Tensor,
    odd: Tensor,
    present: Tensor,
    false_alarm_rate: float,
    kappa: float,
    floor: float,
    spared: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """The rule for S sources: one that is odd has no weight, the others lose some by the evidence of their damage.

    Args:
        p_clean: p-values (B, S).
        odd, present: (B, S), bool.
        floor: least weight of a present source of two, of more in proportion.
        spared: (B, S), sources that damage does not lower.
        dropped: (B, S), sources that damage takes all weight of, rather than leave less than the least.

    Returns:
        (B, S), rows sum to 1, absent source exactly 0.

    Raises:
        ValueError: if a sample has no source.
    """
    damage_rate, _ = alarm_rates(present, false_alarm_rate)
    damage = (damage_rate / p_clean).log().clamp_min(0).masked_fill(~present, 0)
    if spared is not None:
        damage = damage.masked_fill(spared, 0)
    # what is odd is another sample's, and tells nothing of this one
    kept = present & ~odd
    # in proportion to what each would have
    lowest = 2 * floor / kept.sum(1, keepdim=True).clamp_min(1)
    scores = damage_scores(damage, kept, kappa)
    if dropped is None:
        return weights_from_scores(scores, kept, lowest)
    weights = weights_from_scores(scores, kept, torch.where(dropped, 0, lowest))
    return without_least(weights, dropped & (weights < lowest))
