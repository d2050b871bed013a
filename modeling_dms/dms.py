"""The `dms` submodule: features of the modalities in; weights, signals and losses out. Knows no backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_dms.calibration import Calibration
from modeling_dms.calibration_fit import ModalityRecord
from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.losses import contrastive_loss, modality_weight_consistency_loss, schedule_loss, unimodal_loss
from modeling_dms.outputs import DMSOutput, ModalitySignals
from modeling_dms.scheduler import ModalityScheduler, ZeroLinear
from modeling_dms.signals import (
    confidence,
    consistency,
    dropout_masks,
    energy,
    mutual_information,
    predictive_entropy,
    predictive_variance,
)


Readout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModalitySize:
    """Sizes of one modality: D of its tokens, L layers whose statistics have F features each."""

    token: int
    layers: int
    statistics: int


@dataclass
class ModalityFeatures:
    """What the backbone knows of one modality of B samples.

    Attributes:
        tokens: (B, N, D), in the language model's space.
        mask: (B, N), True for real tokens.
        statistics: (B, L, F), mean and standard deviation over tokens of the chosen layers.
        encode: dropout masks (T, encoder_size) on the encoder's inputs -> tokens (T, B, N, D), for
            `mc_depth="encoder"`.
        encoder_size: size of the encoder's inputs.
    """

    tokens: Tensor
    mask: Tensor
    statistics: Tensor
    encode: Callable[[Tensor], Tensor] | None = None
    encoder_size: int = 0


class UnimodalView(nn.Module):
    """Attention pooling of one modality's tokens -> h_m, and a predictive distribution p_m over the vocabulary.

    At initialisation the pooling is a plain mean and p_m is the logit lens: the backbone's own output layer, read on
        the pooled
    tokens.
    """

    def __init__(self, token_size: int, shared_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(token_size))
        self.shared = nn.Linear(token_size, shared_size, bias=False)
        self.residual = ZeroLinear(shared_size, token_size, bias=False)

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(..., N, D), (..., N) -> (..., D), normalised; zeros for a sample without tokens."""
        tokens = tokens.to(self.query.dtype)
        scores = (tokens @ self.query) / tokens.shape[-1] ** 0.5
        attention = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        return F.layer_norm((attention[..., None] * tokens).sum(-2), tokens.shape[-1:])

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> h_m (..., d_s) and what the output layer reads (..., D)."""
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
        self.scheduler = ModalityScheduler(config, len(sizes))
        self.calibration = Calibration(config, [(size.layers, size.statistics) for size in sizes])

    def unimodal(self, index: int, features: ModalityFeatures, readout: Readout) -> tuple[Tensor, Tensor, Tensor]:
        """Unimodal view of modality `index`.

        Returns:
            h_m (B, d_s), logits (B, K), uncertainty (B,).
        """
        view = self.views[index]
        pooled = view.pool(features.tokens, features.mask)
        representation, read = view(pooled)
        logits = readout(read)
        with torch.no_grad():
            uncertainty = self._uncertainty(view, features, pooled, readout)
        return representation, logits, uncertainty

    def _uncertainty(self, view: nn.Module, features: ModalityFeatures, pooled: Tensor, readout: Readout) -> Tensor:
        config = self.config
        deep = config.mc_depth == "encoder" and features.encode is not None
        size = features.encoder_size if deep else pooled.shape[-1]
        masks = dropout_masks(config.mc_samples, size, config.mc_dropout, config.mc_seed, pooled.device)
        if deep and features.encode is not None:
            passes = view.pool(features.encode(masks), features.mask.expand(len(masks), -1, -1))
        else:
            passes = pooled * masks[:, None].to(pooled.dtype)
        logits = readout(view(passes)[1])  # (T, B, K)
        if config.uncertainty == "variance":
            return predictive_variance(logits)
        return mutual_information(logits, config.normalize_entropy)

    def record(self, index: int, features: ModalityFeatures, readout: Readout) -> ModalityRecord:
        """What calibration needs of modality `index`, on the CPU."""
        representation, logits, uncertainty = self.unimodal(index, features, readout)
        scalars = [confidence(logits, self.config.normalize_entropy), uncertainty, energy(logits)]
        parts = (features.statistics, torch.stack(scalars, -1), representation)
        return ModalityRecord(*(part.detach().float().cpu() for part in parts))

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
            readout: (..., D) -> (..., K), the backbone's output layer.
            modality_weights: (B, M), instead of the scheduler's.

        Raises:
            ValueError: if a sample has no modality.
        """
        views = [self.unimodal(i, f, readout) for i, f in enumerate(features)]
        representations = torch.stack([view[0] for view in views], 1)
        logits = torch.stack([view[1] for view in views], 1)
        with torch.no_grad():
            signals, standardized = self._signals(features, modality_mask, representations, logits, views)
        entropy = predictive_entropy(logits.detach(), self.config.normalize_entropy)
        weights = modality_weights
        if weights is None:
            weights = self.scheduler(signals, modality_mask, standardized, representations, entropy)
        fused = (weights[..., None] * representations).sum(1)
        return DMSOutput(weights, signals, representations, fused, logits)

    def _signals(self, features, modality_mask, representations, logits, views) -> tuple[ModalitySignals, Tensor]:
        calibration = self.calibration
        scalars = torch.stack(
            [
                confidence(logits, self.config.normalize_entropy),
                torch.stack([view[2] for view in views], 1),
                energy(logits),
            ],
            -1,
        )  # (B, M, 3)
        typicality, damage, suspicion, standardized = [], [], [], []
        for index, (modality, feature) in enumerate(zip(calibration.modalities, features, strict=True)):
            distances = calibration.distances(index, feature.statistics.float())
            typicality.append(modality.typicality(distances))
            damage.append(modality.damage(distances, scalars[:, index]))
            suspicion.append(damage[-1] + modality.threshold - modality.arbitration_threshold)
            standardized.append(modality.standardize(scalars[:, index]))
        agreement = consistency(representations, modality_mask)
        if len(features) == 2:
            shared = [calibration.shared(i, f.statistics.float()) for i, f in enumerate(features)]
            canonical = consistency(torch.stack(shared, 1), modality_mask)
            agreement = torch.where(calibration.agreement.canonical > 0, canonical, agreement)
        present = modality_mask.float()
        conflict = calibration.agreement.conflict(agreement, modality_mask)
        signals = ModalitySignals(
            confidence=scalars[..., 0] * present,
            uncertainty=scalars[..., 1] * present,
            consistency=agreement,
            energy=scalars[..., 2].masked_fill(~modality_mask, 0),
            # before calibration nothing is known to be atypical
            typicality=torch.stack(typicality, 1) * present * (calibration.modalities[0].level > 0),
            damage=torch.stack(damage, 1).masked_fill(~modality_mask, -torch.inf),
            suspicion=torch.stack(suspicion, 1).masked_fill(~modality_mask, -torch.inf),
            conflict=conflict,
            disagreement=conflict + calibration.agreement.threshold - calibration.agreement.arbitration_threshold,
        )
        return signals, torch.stack(standardized, 1)

    def losses(
        self, output: DMSOutput, modality_mask: Tensor, labels: Tensor, schedule_target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The unweighted losses whose lambda is not 0, by name.

        Args:
            labels: (B, L), -100 where there is no target.
            schedule_target: (B, M), target weights; without it there is no `schedule` loss.
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
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """sum of lambda * loss over what `losses` returned."""
        weighted = [getattr(self.config, f"lambda_{name}") * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum() if weighted else torch.zeros(())
