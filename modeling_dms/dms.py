"""The `dms` submodule: features of the modalities in; weights, signals and losses out. Knows no backbone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.records import ModalityRecord
from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.evidence.unimodal import (
    confidence,
    consistency,
    dropout_masks,
    energy,
    mutual_information,
    predictive_entropy,
    predictive_variance,
)
from modeling_dms.observe.prompt import ModalityFeatures
from modeling_dms.outputs import DMSOutput, ModalitySignals
from modeling_dms.weigh.losses import contrastive_loss, modality_weight_consistency_loss, schedule_loss, unimodal_loss
from modeling_dms.weigh.scheduler import ModalityScheduler, ZeroLinear


class Readout(Protocol):
    """The backbone's output layer: states (..., D) -> logits (..., K), or those of some tokens alone: (T, ..., D) and
    `tokens` (..., k) -> (T, ..., k)."""

    def __call__(self, states: Tensor, tokens: Tensor | None = None) -> Tensor: ...


def read_out(states: Tensor, weight: Tensor, bias: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """A [`Readout`] by a weight (K, D) and a bias (K,), in the weight's precision."""
    states = states.to(weight.dtype)
    if tokens is None:
        return F.linear(states, weight, bias)
    logits = torch.einsum("t...d,...kd->t...k", states, weight[tokens])
    return logits if bias is None else logits + bias[tokens]


@dataclass(frozen=True)
class ModalitySize:
    """Sizes of one modality: D of its tokens, L layers whose statistics have F features each, F of its content, and
    what its detector reads: so many numbers, whether the layers beside them, and families of damage. At last, whether
    it is also read within the prompt."""

    token: int
    layers: int
    statistics: int
    content: int
    numbers: int
    families: int
    reads_layers: bool
    in_prompt: bool = False


class UnimodalView(nn.Module):
    """Attention pooling of one modality's tokens -> h_m, and a predictive distribution p_m over the vocabulary.

    At initialisation the pooling is a plain mean and p_m is the logit lens: the backbone's own output layer, read on
    the pooled tokens.
    """

    def __init__(self, token_size: int, shared_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(token_size))
        self.shared = nn.Linear(token_size, shared_size, bias=False)
        self.residual = ZeroLinear(shared_size, token_size, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that reads the view's parameters, which offloading brings in for this call.

        Args:
            tokens, mask: (B, N, D), (B, N).
            dropped: (T, D), the masks of the Monte Carlo dropout passes.

        Returns:
            h_m (B, d_s), what the output layer reads (B, D), and what it reads in each dropout pass (T, B, D), which
            carries no gradient.
        """
        pooled = self._pooled(tokens, mask)
        representation, read = self._read(pooled)
        with torch.no_grad():
            passes = self._read(pooled * dropped[:, None].to(pooled.dtype))[1]
        return representation, read, passes

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D), (B, N) -> (B, D), normalised; zeros for a sample without tokens."""
        tokens = tokens.to(self.query.dtype)
        scores = (tokens @ self.query) / tokens.shape[-1] ** 0.5
        attention = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        return F.layer_norm((attention[..., None] * tokens).sum(-2), tokens.shape[-1:])

    def _read(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        representation = self.shared(pooled)
        return representation, pooled + self.residual(representation)


class DynamicModalityScheduling(nn.Module):
    """Signals, scheduler and losses over the features of M modalities.

    Args:
        config: a [`DMSConfig`].
        sizes: one a modality.
    """

    def __init__(self, config: DMSConfig, sizes: Sequence[ModalitySize]):
        super().__init__()
        self.config = config
        self.views = nn.ModuleList(UnimodalView(size.token, config.shared_size) for size in sizes)
        self.calibration = Calibration(
            config,
            [(size.layers, size.statistics) for size in sizes],
            [(s.numbers + 2 * s.layers * s.reads_layers, s.families, s.reads_layers) for s in sizes],
            [size.content for size in sizes],
            next((index for index, size in enumerate(sizes) if size.in_prompt), None),
        )
        self.scheduler = ModalityScheduler(config, len(sizes))

    def unimodal(
        self, indices: Sequence[int], features: Sequence[ModalityFeatures], readout: Readout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unimodal views of some modalities.

        Returns:
            h_m (B, m, d_s), logits (B, m, K) and the scalar signals (B, m, 3) confidence, uncertainty and energy,
            which carry no gradient.
        """
        config, views = self.config, []
        for index, feature in zip(indices, features, strict=True):
            size = feature.tokens.shape[-1]
            masks = dropout_masks(config.mc_samples, size, config.mc_dropout, config.mc_seed, feature.tokens.device)
            views.append(self.views[index](feature.tokens, feature.mask, masks))
        representations, reads, dropped = zip(*views, strict=True)
        logits = readout(torch.stack(reads, 1))  # (B, m, K)
        with torch.no_grad():
            tokens = logits.topk(min(self.config.mc_tokens, logits.shape[-1])).indices
            sampled = readout(torch.stack(dropped, 2), tokens)  # (T, B, m, k)
            normalize = self.config.normalize_entropy
            if self.config.uncertainty == "variance":
                uncertainty = predictive_variance(sampled)
            else:
                uncertainty = mutual_information(sampled, normalize)
            scalars = torch.stack([confidence(logits, normalize), uncertainty, energy(logits)], -1)
        return torch.stack(representations, 1), logits, scalars

    def record(self, index: int, features: ModalityFeatures, readout: Readout) -> ModalityRecord:
        """What calibration needs of modality `index`, on the CPU."""
        representations, _, scalars = self.unimodal([index], [features], readout)
        parts = (features.statistics, scalars[:, 0], representations[:, 0], features.content, features.numbers)

        def kept(part: Any) -> Any:
            return None if part is None else part.detach().float().cpu()

        return ModalityRecord(*map(kept, parts))

    def forward(
        self,
        features: Sequence[ModalityFeatures],
        modality_mask: Tensor,
        readout: Readout,
        modality_weights: Tensor | None = None,
    ) -> DMSOutput:
        """
        Args:
            features: one a modality.
            modality_mask: (B, M), True where present.
            readout: the backbone's output layer.
            modality_weights: (B, M), instead of the scheduler's.

        Raises:
            ValueError: if a sample has no modality.
        """
        representations, logits, scalars = self.unimodal(range(len(features)), features, readout)
        with torch.no_grad():
            signals, standard = self._signals(features, modality_mask, representations, scalars)
            entropy = predictive_entropy(logits, self.config.normalize_entropy)
        weights = modality_weights
        if weights is None:
            known = self.calibration.reliability
            weights = self.scheduler(signals, modality_mask, standard, entropy, known.spared, known.dropped)
        return DMSOutput(weights, signals, representations, logits)

    def _signals(
        self, features: Sequence[ModalityFeatures], modality_mask: Tensor, representations: Tensor, scalars: Tensor
    ) -> tuple[ModalitySignals, Tensor]:
        """The signals, and confidence, uncertainty and energy over their clean spread, (B, M, 3)."""
        calibration = self.calibration
        judged = [calibration.judge(index, feature) for index, feature in enumerate(features)]
        typicality, p_clean = (torch.stack(found, 1) for found in zip(*judged, strict=True))
        nothing = torch.zeros_like(scalars[:, 0, 0])
        surprisal = [nothing if feature.surprisal is None else feature.surprisal for feature in features]
        agreement = consistency(representations, modality_mask)
        shared = [calibration.agreement.shared(index, feature.content) for index, feature in enumerate(features)]
        canonical = consistency(torch.stack(shared, 1), modality_mask)
        agreement = torch.where(calibration.agreement.canonical > 0, canonical, agreement)
        p_match, gain = calibration.agreement.p_match(agreement, modality_mask), features[-1].gain
        if gain is not None:
            known = modality_mask.all(1, keepdim=True)
            joint = calibration.joint.p_value(calibration.joint(torch.stack([agreement[:, -1], gain], -1)))
            p_match = joint[:, None].where(known & calibration.reads_all, p_match)
        present = modality_mask.float()
        # before calibration nothing is known to be odd
        counts = torch.stack([detector.count for detector in calibration.detectors[: len(features)]])
        known = modality_mask & (counts > 0)
        signals = ModalitySignals(
            confidence=scalars[..., 0] * present,
            uncertainty=scalars[..., 1] * present,
            consistency=agreement,
            energy=scalars[..., 2].masked_fill(~modality_mask, 0),
            typicality=typicality * known,
            surprisal=torch.stack(surprisal, 1) * present,
            p_clean=p_clean.masked_fill(~known, 1),
            p_match=p_match,
        )
        standard = [calibration.modalities[index].standardize(scalars[:, index]) for index in range(len(features))]
        return signals, torch.stack(standard, 1)

    def losses(
        self,
        output: DMSOutput,
        modality_mask: Tensor,
        labels: Tensor,
        schedule_target: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The unweighted losses whose lambda is not 0, by name: scalars, in which each sample counts by its number of
        targets, as it does in the task loss.

        Args:
            labels: (B, L), -100 where there is no target.
            schedule_target: (B, M), target weights; without it there is no `schedule` loss.
            num_items_in_batch: targets of all the batches whose gradients are summed up (by accumulation or over
                processes), as `Trainer` passes it; this batch's own by default.
        """
        config, losses = self.config, {}
        if config.lambda_mwc:
            losses["mwc"] = modality_weight_consistency_loss(output.representations, output.weights)
        if config.lambda_unimodal:
            losses["unimodal"] = unimodal_loss(output.logits, labels, modality_mask)
        if config.lambda_consistency:
            losses["consistency"] = contrastive_loss(
                output.representations, modality_mask, config.contrastive_temperature
            )
        if config.lambda_schedule and schedule_target is not None:
            losses["schedule"] = schedule_loss(output.weights, schedule_target, modality_mask)
        targets = (labels != -100).sum(1)
        if num_items_in_batch is None:
            num_items_in_batch = targets.sum().clamp_min(1)
        share = (targets / num_items_in_batch).to(output.weights.device)
        return {name: (share * loss).sum() for name, loss in losses.items()}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """sum of lambda * loss over what `losses` returned."""
        weighted = [getattr(self.config, f"lambda_{name}") * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum() if weighted else torch.zeros(())
