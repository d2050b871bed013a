"""What else could tell a damaged image from a wrong context: further inputs of the scheduler that `tradeoff.py` tries,
and the package's own evidence of that left out.

Each kind takes records (see `tradeoff.py`) of n samples and of known, clean ones, and returns (n, P).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeling_dms.calibration import Calibration
from modeling_dms.outputs import ModalitySignals
from modeling_dms.typicality import fit_gaussian, log_distances


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


EVIDENCE = {"patches": patchwise, "one-sided answers": one_sided}


def with_evidence(found: dict[str, Any], calibration: Calibration, name: str) -> dict[str, Any]:
    """The records with further inputs of the scheduler."""
    records = [found["training"], *found["conditions"]]
    values = [EVIDENCE[name](one, found["known"], calibration) for one in records]
    clean = values[0][(records[0].raw["damage"] == 0).all(1)]
    changed = []
    for one, value in zip(records, values, strict=True):
        signals, mask, (image, text), *rest = one.arguments
        value = ((value - clean.median(0).values) / clean.std(0)).clamp(-10, 10) * mask[:, :1]
        changed.append(replace(one, arguments=(signals, mask, [torch.cat([value, image], 1), text], *rest)))
    return {"training": changed[0], "conditions": changed[1:]}


def without_familiarity(found: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """The records as if calibration remembered no image: judged by the typicality of its layers instead."""
    modality, changed = calibration.modalities[0], []
    for one in (found["training"], *found["conditions"]):
        signals, mask, (image, text), *rest = one.arguments
        distances, scalars = calibration.distances(0, one.raw["vision"]), torch.zeros(len(mask), 3)
        deviations = modality.detector_inputs(distances, scalars)[:, : modality.deviations]
        signals = ModalitySignals(**{**signals, "arbitration": signals["suspicion"]})
        arguments = (signals, mask, [torch.cat([deviations, image[:, -3:]], 1), text], *rest)
        changed.append(replace(one, arguments=arguments))
    return {"training": changed[0], "conditions": changed[1:]}
