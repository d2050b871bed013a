"""`model.calibrate`: streams clean samples, corrupts copies of them, and hands the features to the fit."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_dms.calibrate.damage import IMAGE_FAMILIES, TEXT_FAMILIES, corrupt_images, corrupt_texts
from modeling_dms.calibrate.fit import CalibrationReport, ModalityRecord, fit_calibration
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.observe.pixels import changed_pictures
from modeling_dms.observe.prompt import TEXT


class CalibrationMixin:
    """Adds `calibrate` to a model that can extract features of its modalities (`DMSMixin`)."""

    @torch.no_grad()
    def calibrate(
        self,
        dataloader: Iterable[dict[str, Any]],
        level: int = 2,
        max_samples: int = 1000,
        show_progress: bool = True,
    ) -> CalibrationReport:
        """Fits clean statistics and, at level 2, a map from them to "this modality is damaged". No labels, no
        gradients.

        What is fitted is stored in buffers of `dms` and travels with the checkpoint, with a short code of up to 512 of
        the images (canonical coordinates, `subspace_size` numbers each). Only pooled features are kept in memory.

        Args:
            dataloader: batches of `input_ids`, `attention_mask`, `pixel_values` and, if you use them, `modality_ids`
                and `modality_mask`; other entries are ignored. Clean samples: whatever is damaged here will count as
                normal.
            level: 1 or 2.
            max_samples: stop after about so many.
            show_progress: show a progress bar.

        Returns:
            A report; print it for a table.

        Raises:
            ValueError: for fewer than 50 samples of a modality, pixels or features that are not finite, or another
                level.
        """
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        generator = torch.Generator().manual_seed(self.config.dms_config.mc_seed)
        training = {module: module.training for module in self.modules()}
        self.eval()
        clean: list[list[ModalityRecord]] = [[], []]
        corrupted: list[dict[str, list[ModalityRecord]]] = [{}, {}]
        present = []
        try:
            with tqdm(desc="calibrating", unit=" samples", disable=not show_progress) as progress:
                for batch in dataloader:
                    records, families, mask = self._calibration_batch(batch, generator)
                    present.append(mask)
                    for index in range(len(MODALITIES)):
                        clean[index].append(records[index])
                        for name, record in families[index].items():
                            corrupted[index].setdefault(name, []).append(record)
                    progress.update(len(mask))
                    if progress.n >= max_samples or sum(map(len, present)) >= max_samples:
                        break
        finally:
            for module, mode in training.items():
                module.training = mode
        if not present:
            raise ValueError("the calibration data are empty")
        return fit_calibration(
            self.dms.calibration,
            [ModalityRecord.cat(records) for records in clean],
            [{name: ModalityRecord.cat(rows) for name, rows in families.items()} for families in corrupted],
            torch.cat(present),
            level,
        )

    def _calibration_batch(self, batch: dict[str, Any], generator: torch.Generator):
        inputs = {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        pixel_values = inputs.pop("pixel_values", None)
        ids = inputs.get("modality_ids")
        if ids is None:
            ids = self.infer_modality_ids(inputs["input_ids"], inputs.get("attention_mask"), batch.get("labels"))
        placeholders = self._placeholders(inputs["input_ids"])
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.dtype)
            self._check_images(pixel_values)

        def vision(pixels: Tensor | None) -> ModalityRecord:
            images = None if pixels is None else self._observed_images({**inputs, "pixel_values": pixels})
            owner = None if images is None else images.rows(placeholders)
            return self.dms.record(0, self._vision_features(images, placeholders, ids, owner), self._readout)

        def text(input_ids: Tensor, is_text: Tensor) -> ModalityRecord:
            modality_ids = torch.where(is_text, TEXT, 0)
            features = self._text_features(input_ids, None, modality_ids)
            return self.dms.record(1, features, self._readout)

        is_text = ids == TEXT
        records = [vision(pixel_values), text(inputs["input_ids"], is_text)]
        families: list[dict[str, ModalityRecord]] = [{}, {}]
        if pixel_values is not None:
            for name in IMAGE_FAMILIES:
                damage = partial(corrupt_images, family=name, generator=generator)
                grid, tower = inputs.get("image_grid_thw"), self.config.vision_config
                families[0][name] = vision(changed_pictures(pixel_values, damage, grid, tower))
        for name in TEXT_FAMILIES:
            families[1][name] = text(*corrupt_texts(inputs["input_ids"], is_text, name, generator))
        present = torch.stack([(ids == m + 1).any(1) for m in range(len(MODALITIES))], 1)
        if pixel_values is None:
            present[:, 0] = False
        if inputs.get("modality_mask") is not None:
            present = present.cpu() & inputs["modality_mask"].cpu().bool()
        return records, families, present.cpu()
