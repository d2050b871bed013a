"""How far an answer can be relied on: the expected agreement with the answer that undamaged inputs would give.

Own. A backbone is as sure of an answer to a damaged image as to a clean one. What calibration's own damage and
mismatches do to answers, without labels, tells how far its certainty and the evidence of damage go with agreement. A
threshold below which a caller abstains is set by conformal risk control (Angelopoulos et al., ICLR 2024).
"""

import torch
from torch import Tensor

from modeling_dms.weigh.second_look import log_odds


# evidence against a pair: of the p-values of clean pairs those above this say nothing, and log(ORDINARY / p) counts up
# to `MOST`
ORDINARY, MOST = 0.1, 5.0


def reliability_numbers(sureness: Tensor, p_values: Tensor, rate: Tensor | float) -> Tensor:
    """What reliability is read from: log-odds, which sources are flagged, the evidence against the pair, and the
    log-odds again under each of these. How sure a backbone sounds means another thing where a source is damaged. A
    damaged source disagrees with any other, so the pair counts where nothing is flagged.

    Args:
        sureness: (B,), the probability of the likeliest first token; or log-odds (B, F), as they are.
        p_values: (B, S), of each source and, last, of the pair.
        rate: a source with a p-value up to this is flagged.

    Returns:
        (B, F + S + F * S), where F is 1 for a probability.
    """
    sure = log_odds(sureness)[:, None] if sureness.ndim == 1 else sureness
    flagged = (p_values[:, :-1] <= rate).to(sure.dtype)
    against = (ORDINARY / p_values[:, -1:]).log().clamp(0, MOST) / MOST
    alarms = torch.cat([flagged, against * (1 - flagged.amax(1, keepdim=True))], 1)
    return torch.cat([sure, alarms, (sure[:, :, None] * alarms[:, None]).flatten(1)], 1)


def abstention_threshold(reliability: Tensor, agrees: Tensor, samples: Tensor, risk: float) -> float:
    """The lowest threshold at which answers that are both given and wrong are at most a share `risk` of new samples,
    on average over calibration sets, where a sample is answered if its reliability is at least the threshold.

    Args:
        reliability: (n,), of samples that took no part in the fit of what gives it.
        agrees: (n,), 1 where the answer is right, else 0.
        samples: (n,), numbers of the samples, of which each may stand there in several copies. Copies of one sample
            are no independent ones: the mean of them counts.
        risk: above 0 and below 1.

    Returns:
        In [0, 1], or `inf` where so few samples promise nothing.

    Raises:
        ValueError: for another risk, or without samples.
    """
    if not 0 < risk < 1:
        raise ValueError(f"risk must lie between 0 and 1, got {risk}")
    if len(reliability) == 0:
        raise ValueError("no calibrated reliability: run `model.calibrate` at level 3")
    order = reliability.argsort(descending=True)
    given, wrong = reliability[order], 1 - agrees[order].float()
    _, number, copies = samples[order].unique(return_inverse=True, return_counts=True)
    # of all samples and a new one, which may be wrong
    held = ((wrong / copies[number]).cumsum(0) + 1) / (len(copies) + 1) <= risk
    # samples of one reliability are answered together
    last = torch.cat([given[1:] != given[:-1], torch.ones(1, dtype=torch.bool)])
    fine = (held & last).nonzero()[:, 0]
    if len(fine) == len(given) or (len(fine) and int(fine[-1]) == len(given) - 1):
        return 0.0
    return float(given[fine[-1]]) if len(fine) else float("inf")
