"""What calibration knows: how each modality looks on clean data, and how far clean pairs agree."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modeling_dms.calibrate.conformal import Agreement, Conformal, Detector, JointAgreement
from modeling_dms.calibrate.source_agreement import COMPOSITIONS, SourceAgreement
from modeling_dms.calibrate.statistics import (
    ModalityCalibration,
    PixelRange,
    PromptKind,
    Reliability,
    Statistics,
    as_if_new,
)
from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.evidence.typicality import log_distances
from modeling_dms.observe.prompt import ModalityFeatures


# share of clean texts that are odd enough within their prompts to be read once more, alone
LOOKED_AT = 0.1


class Calibration(nn.Module):
    """Calibrated statistics of all modalities and of their agreement.

    Args:
        sizes: (L, F) of each modality.
        evidence: of each modality, what [`Detector`] takes.
        contents: F of each modality's content.
        in_prompt: the modality whose tokens are also read within the prompt, as the last of `modalities` and
            `detectors`; `None` for none.
    """

    modalities: Sequence[ModalityCalibration]
    detectors: Sequence[Detector]
    clean_sets: Sequence[Conformal]

    def __init__(
        self,
        config: DMSConfig,
        sizes: Sequence[tuple[int, int]],
        evidence: Sequence[tuple[int, int, bool]],
        contents: Sequence[int],
        in_prompt: int | None = None,
    ):
        super().__init__()
        self.config, self.in_prompt, self.count = config, in_prompt, len(sizes)
        again = [] if in_prompt is None else [in_prompt]
        of = [*range(len(sizes)), *again]
        modalities = [ModalityCalibration(*sizes[index], config.subspace_size) for index in of]
        self.modalities = nn.ModuleList(modalities)  # type: ignore[assignment]
        self.detectors = nn.ModuleList(Detector(*evidence[index]) for index in of)  # type: ignore[assignment]
        self.agreement = Agreement(contents, config.subspace_size)
        self.joint = JointAgreement()
        self.sources = SourceAgreement(contents, config.subspace_size)
        # the oddness of the oddest of three and more sources of clean samples, by what these are
        self.clean_sets = nn.ModuleList(Conformal(1, {}) for _ in COMPOSITIONS)  # type: ignore[assignment]
        self.pixels = PixelRange()
        self.prompts = PromptKind()
        self.reliability = Reliability(len(sizes))

    def reset(self) -> None:
        """Back to the state before calibration, whatever was loaded."""
        for part in as_if_new(self).modules():
            if isinstance(part, Statistics):
                part.reset()

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` has run (or a calibrated checkpoint was loaded)."""
        return all(bool(detector.count > 0) for detector in self.detectors[: self.count])

    @property
    def reads_prompts(self) -> bool:
        """Whether it tells suspicious texts within their prompts."""
        return self.in_prompt is not None and bool(self.detectors[-1].count > 0)

    @property
    def reads_all(self) -> Tensor:
        """Whether all texts are to be read alone as well, since that tells whether pairs belong together: (), bool."""
        return self.joint.count > 0

    def distances(self, index: int, statistics: Tensor) -> Tensor:
        """`log_distances` of modality `index`: (B, L, F) -> (B, 2 L)."""
        return log_distances(statistics, self.modalities[index].fitted).flatten(1)

    def numbers(self, index: int, distances: Tensor | None, numbers: Tensor | None) -> Tensor:
        """What the detector of modality `index` reads: (B, P).

        Args:
            distances: (B, 2 L), of the layers; not needed where it does not read them.
            numbers: `ModalityFeatures.numbers`.
        """
        parts = [numbers, distances if self.detectors[index].reads_layers else None]
        return torch.cat([part for part in parts if part is not None], 1)

    def _scores(self, index: int, features: ModalityFeatures) -> tuple[Tensor, Tensor]:
        """The score of damage (B,), and the distances (B, 2 L)."""
        distances = self.distances(index, features.statistics.float())
        return self.detectors[index](self.numbers(index, distances, features.numbers)), distances

    def suspicious(self, features: ModalityFeatures) -> Tensor:
        """Which texts, read within their prompts, are to be read alone: (B,), bool."""
        return self.detectors[-1].p_value(self._scores(-1, features)[0]) <= LOOKED_AT

    def judge(self, index: int, features: ModalityFeatures) -> tuple[Tensor, Tensor]:
        """`typicality` and `p_clean` of modality `index`, (B,) each, see [`ModalitySignals`].

        A text that was read within its prompt is judged by that, unless it was suspicious and read alone as well. Both
        p-values are one: of clean texts a share of `LOOKED_AT` is suspicious, and the p-values of the others are above
        that.
        """
        which = -1 if features.in_prompt else index
        score, distances = self._scores(which, features)
        found = [self.modalities[which].typicality(distances), self.detectors[which].p_value(score)]
        if features.closer is not None:
            rows, alone = features.closer
            found = [
                every.index_copy(0, rows, own) for every, own in zip(found, self.judge(index, alone), strict=True)
            ]
        return tuple(found)  # type: ignore[return-value]
