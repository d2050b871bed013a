"""What else could tell a damaged image from a wrong context: further inputs of the scheduler that `tradeoff.py` tries.

Each takes records (see `tradeoff.py`) of n samples and of known, clean ones, and returns (n, P).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_dms.calibration import Calibration
from modeling_dms.outputs import ModalitySignals
from modeling_dms.typicality import fit_gaussian, log_distances


# share of clean images that count as suspicious in a disagreement
ARBITRATION = 0.15


def familiar(some: Any, known: Any, calibration: Calibration) -> Tensor:
    """How far the image is from its nearest known images in what images share with contexts: (n, 2)."""
    own, others = (calibration.shared(0, one.raw["vision"]) for one in (some, known))
    cosine = F.normalize(own, dim=1) @ F.normalize(others, dim=1).T
    distance = torch.cdist(own, others).topk(5, largest=False).values.mean(1)
    return torch.stack([-cosine.topk(5).values.mean(1), distance.clamp_min(1e-6).log()], 1)


def one_sided(some: Any, known: Any, calibration: Calibration) -> Tensor:
    """How sure image and context are when asked alone, and how far apart their answers: (n, 3)."""
    p = some.raw["answers"].exp()
    entropy, mixed = torch.special.entr(p).sum(-1), torch.special.entr(p.mean(1)).sum(-1)
    return torch.cat([entropy, (mixed - entropy.mean(1))[:, None]], 1)


def patchwise(some: Any, known: Any, calibration: Calibration) -> Tensor:
    """Quantiles over patches: distance from clean patches, and agreement with what the context predicts: (n, 15)."""
    clean, patches = known.raw["patches"].float(), some.raw["patches"].float()
    gaussian = fit_gaussian(clean.flatten(0, 1)[:, None], 32)
    distances = torch.cat([log_distances(one[:, None], gaussian)[:, 0] for one in patches])
    said, told = (calibration.shared(1, one.raw["text"]) for one in (known, some))
    centre, spread = clean.mean((0, 1)), clean.std((0, 1))
    design = ((clean - centre) / spread).flatten(0, 1)
    ridge = design.T @ design / len(design) + 0.05 * torch.eye(design.shape[1])
    targets = (said - said.mean(0))[:, None].expand(-1, clean.shape[1], -1).flatten(0, 1)
    seen = (patches - centre) / spread @ torch.linalg.solve(ridge, design.T @ targets / len(design))
    agreement = torch.cosine_similarity(seen, (told - said.mean(0))[:, None], dim=-1)
    values = torch.cat([distances.view(*patches.shape[:2], 2), agreement[..., None]], -1)
    return values.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), dim=1).permute(1, 0, 2).flatten(1)


# by name: the evidence, whether it arbitrates, and how many known images it is measured by
EVIDENCE = {
    "patches": (patchwise, False, 300),
    "one-sided answers": (one_sided, False, 300),
    "familiar images": (familiar, False, 300),
    "300 familiar images arbitrate": (familiar, True, 300),
    "600 familiar images arbitrate": (familiar, True, 600),
}


def with_evidence(found: dict[str, Any], calibration: Calibration, name: str) -> dict[str, Any]:
    """The records with further inputs of the scheduler. If it arbitrates, it replaces the image's suspicion of the
    rule, and its typicality among the inputs."""
    kind, arbitrates, count = EVIDENCE[name]
    known = replace(found["known"], raw={key: value[:count] for key, value in found["known"].raw.items()})
    records = [found["training"], *found["conditions"]]
    values = [kind(one, known, calibration) for one in records]
    undamaged = (records[0].raw["damage"] == 0).all(1)
    clean = values[0][undamaged]
    values = [((value - clean.median(0).values) / clean.std(0)).clamp(-10, 10) for value in values]
    limit = values[0][undamaged].sum(1).quantile(1 - ARBITRATION)
    changed = []
    for one, value in zip(records, values, strict=True):
        signals, mask, (image, text), *rest = one.arguments
        value = value * mask[:, :1]
        signals = ModalitySignals(**signals)
        if arbitrates:
            there = torch.stack([value.sum(1) - limit, signals.suspicion[:, 1]], 1)
            signals.suspicion = torch.where(mask, there, -torch.inf)
            image = image[:, -3:]
        arguments = (signals, mask, [torch.cat([value, image], 1), text], *rest)
        changed.append(replace(one, arguments=arguments))
    return {"training": changed[0], "conditions": changed[1:]}
