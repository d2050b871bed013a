"""`model.calibrate`: streams clean samples, corrupts copies of them, and hands the features to the fit."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_dms.calibrate.counterfactual import Answers, CounterfactualMixin, as_text
from modeling_dms.calibrate.damage import FAMILIES, IMAGE_FAMILIES, TEXT_FAMILIES, damaged_pictures, damaged_texts
from modeling_dms.calibrate.fit import fit_calibration
from modeling_dms.calibrate.records import MIN_SAMPLES, DamagedRecord, GainRecord, ModalityRecord
from modeling_dms.calibrate.report import CalibrationReport
from modeling_dms.calibrate.source_agreement import SourceRecord
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.observe.observation_mixin import of_rows
from modeling_dms.observe.prompt import OWN, TEXT, Prompt
from modeling_dms.weigh.reliability import abstention_threshold


def _check_families(families: Sequence[str]) -> None:
    known = [name for names in FAMILIES for name in names]
    if unknown := sorted(set(families) - set(known)):
        raise ValueError(f"leave_out must be some of {', '.join(known)}, got {', '.join(unknown)}")


def _watched(batches: Iterable[dict[str, Any]], whole: list[bool]) -> Iterable[dict[str, Any]]:
    """The same batches, of each of which is noted whether all words of its prompts are the text."""
    for batch in batches:
        whole.append(batch.get("modality_ids") is None and batch.get("source_ids") is None)
        yield batch


class CalibrationMixin(CounterfactualMixin):
    """Adds `calibrate` to a model that can extract features of its modalities (`DMSMixin`)."""

    @torch.no_grad()
    def calibrate(
        self,
        dataloader: Iterable[dict[str, Any]],
        level: int = 3,
        max_samples: int = 1000,
        show_progress: bool = True,
        leave_out: Sequence[str] = (),
        max_asked: int = 100,
    ) -> CalibrationReport:
        """Fits how clean samples look, from level 2 on what tells damage from them, and at level 3 how far answers can
        be relied on. No labels, no gradients.

        What is fitted is stored in buffers of `dms` and travels with the checkpoint: no sample can be made out in it.
        Only pooled features are kept in memory.

        Args:
            dataloader: batches of `input_ids`, `attention_mask`, `pixel_values` and, if you use them, `modality_ids`
                and `modality_mask`; other entries are ignored. With `source_ids` instead, samples of several images or
                passages tell how far such agree; all else is fitted to the first image and one passage of each. Clean
                samples: whatever is damaged here will count as normal. Best one sample an image: others of the same
                image add little.
            level: 1, 2 or 3. A class that does not continue prompts has no third level, and stops at the second.
            max_samples: stop after about so many.
            show_progress: show a progress bar.
            leave_out: families of self-made damage, of `IMAGE_FAMILIES` or `TEXT_FAMILIES`, that the detectors
                must not know, so that they count as unseen in an evaluation.
            max_asked: of about so many samples the model is asked, at level 3, what it would answer if image and text
                were damaged or another sample's, to both and to each alone: 14 to 17 passes over each prompt.

        Returns:
            A report; print it for a table.

        Raises:
            ValueError: for fewer than 50 different images or 50 texts, pixels or features that are not finite, another
                level, or an unknown family.
        """
        if level not in (1, 2, 3):
            raise ValueError(f"level must be 1, 2 or 3, got {level!r}")
        _check_families(leave_out)
        pixels = self.dms.calibration.pixels
        before = {name: buffer.clone() for name, buffer in pixels.state_dict().items()}
        try:
            if level == 3 and not self.can_generate():
                level = 2
            whole: list[bool] = []
            batches = _watched(dataloader, whole)
            found = self._calibration_data(batches, level, max_samples, show_progress, max_asked)
            told_by = "matching head" if self._has_matching_head else "likelihood gain"
            report = fit_calibration(self.dms.calibration, *found[:3], level, leave_out, *found[3:], told_by)
            self.dms.calibration.prompts.whole.fill_(float(all(whole)))
            return report
        except BaseException:
            pixels.load_state_dict(before)
            raise

    @torch.no_grad()
    def _calibration_data(
        self, dataloader: Iterable[dict[str, Any]], level: int, max_samples: int, show_progress: bool, max_asked: int
    ):
        """The data that `fit_calibration` takes, in its order. Sets the range of the pixels."""
        generator = torch.Generator().manual_seed(self.config.dms_config.mc_seed)
        training = {module: module.training for module in self.modules()}
        self.eval()
        found, seen = [], 0
        try:
            with tqdm(desc="calibrating", unit=" samples", disable=not show_progress) as progress:
                for number, batch in enumerate(self._with_pixel_range(dataloader)):
                    asked = None
                    if level == 3 and seen < max_asked:
                        asked = number % len(IMAGE_FAMILIES), number % len(TEXT_FAMILIES), seen
                    found.append(self._calibration_batch(batch, level, generator, asked, seen))
                    count = len(found[-1][2])
                    seen += count
                    progress.update(count)
                    if seen >= max_samples:
                        break
        finally:
            for module, mode in training.items():
                module.training = mode
        if not found:
            raise ValueError("the calibration data are empty")
        clean, damaged, present, in_prompt, answers, sources, gains = zip(*found, strict=True)
        answers = [said for said in answers if said is not None]
        sources = [some for some in sources if some is not None]  # of batches where a sample has several
        return (
            [ModalityRecord.cat(records) for records in zip(*clean, strict=True)],
            [
                {name: DamagedRecord.cat([families[name] for families in some]) for name in some[0]}
                for some in zip(*damaged, strict=True)
            ],
            torch.cat(present),
            None if None in in_prompt else ModalityRecord.cat(in_prompt),
            Answers.cat(answers) if answers else None,
            SourceRecord.cat(sources) if sources else None,
            None if None in gains else GainRecord.cat(gains),
        )

    def abstention_threshold(self, risk: float = 0.1) -> float:
        """The reliability below which a caller abstains, so that answers that are given and differ from those to
        undamaged inputs are at most a share `risk` of all samples. That holds on average (conformal risk control)
        where samples are like those that calibration has made: clean, damaged and mismatched ones.

        Args:
            risk: above 0 and below 1.

        Returns:
            In [0, 1]; `inf`, which answers nothing, where so few samples promise nothing.

        Raises:
            ValueError: for another risk, or before calibration at level 3.
        """
        trust = self.dms.calibration.reliability
        looks = 2 * (self.config.dms_config.conflict_prior == "learned")
        kept = trust.kept[: int(trust.count)].cpu()
        return abstention_threshold(kept[:, looks], kept[:, looks + 1], kept[:, -1], risk)

    @contextlib.contextmanager
    def families_left_out(self, families: Sequence[str]) -> Iterator[None]:
        """Within it the model knows nothing of some families of self-made damage, as if it had been calibrated without
        them: what resembles them is unseen.

        Raises:
            ValueError: for an unknown family.
        """
        _check_families(families)
        calibration = self.dms.calibration
        detectors = calibration.detectors
        before = [detector.left_out.clone() for detector in detectors]
        again = [] if calibration.in_prompt is None else [FAMILIES[calibration.in_prompt]]
        for detector, names in zip(detectors, [*FAMILIES, *again], strict=True):
            for number, name in enumerate(names):
                if name in families:
                    detector.left_out[number] = 1
        try:
            yield
        finally:
            for detector, kept in zip(detectors, before, strict=True):
                detector.left_out.copy_(kept)

    def _with_pixel_range(self, dataloader: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """The same batches, once the first 50 pictures have told which values are black and white."""
        batches, held, lowest, highest = iter(dataloader), [], [], []
        for batch in batches:
            held.append(batch)
            if batch.get("pixel_values") is not None:
                pixels = batch["pixel_values"].to(self.device, self.dtype)
                self._check_images(pixels)
                for pictures in self._pictures({**batch, "pixel_values": pixels}):
                    lowest += list(pictures.float().amin((2, 3)))
                    highest += list(pictures.float().amax((2, 3)))
            if len(lowest) >= MIN_SAMPLES:
                break
        if lowest:
            low = torch.stack(lowest[:MIN_SAMPLES]).amin(0)
            pixels = self.dms.calibration.pixels
            pixels.location.copy_(low)
            pixels.scale.copy_((torch.stack(highest[:MIN_SAMPLES]).amax(0) - low).clamp_min(1e-6))
        return itertools.chain(held, batches)

    def _calibration_batch(
        self,
        batch: dict[str, Any],
        level: int,
        generator: torch.Generator,
        asked: tuple[int, int, int] | None = None,
        place: int = 0,
    ):
        """What calibration keeps of a batch.

        Args:
            place: of the batch's first sample.
            asked: the numbers of the families of images and texts by whose damage the model is asked about, and the
                place of the batch's first sample; `None` if it is not asked.
        """
        prompt, inputs, given, sources = self._clean_prompt(batch, place)
        ids, present = prompt.modality_ids, prompt.modality_mask
        records = [
            self.dms.record(0, self._vision_features(prompt), self._readout),
            self.dms.record(1, self._text_features(inputs["input_ids"], None, ids), self._readout),
        ]
        read = self._text_within(prompt, given)
        in_prompt = None if read is None else self.dms.record(1, read, self._readout)
        damaged: list[dict[str, DamagedRecord]] = [{}, {}]
        image: dict[str, Any] = {}
        text, of_text = {}, records[1].content
        for number, name in enumerate(IMAGE_FAMILIES if level > 1 else ()):
            damaged[0][name], changed = self._damaged_images(prompt, inputs, name, generator)
            if changed is None:
                damaged[0][name].numbers = records[0].numbers
            elif asked is not None and number == asked[0]:
                image = {"pixel_values": changed["pixel_values"]}
        # of the embeddings: BLIP-2's retrieval keeps the vocabulary of a language model that it does not have
        vocabulary = torch.arange(len(self.get_input_embeddings().weight))
        special = torch.isin(vocabulary, torch.tensor(self._special_ids())) | self._placeholders(vocabulary)
        vocabulary = vocabulary[~special]
        for number, name in enumerate(TEXT_FAMILIES if level > 1 else ()):
            severity = torch.rand(len(ids), generator=generator)
            input_ids, still = damaged_texts(inputs["input_ids"], ids == TEXT, name, severity, vocabulary, generator)
            features = self._text_features(input_ids, None, torch.where(still, TEXT, 0))
            seen = [None if part is None else part.float().cpu() for part in (features.statistics, features.numbers)]
            damaged[1][name] = DamagedRecord(severity, *seen)
            if asked is not None and number == asked[1]:
                text, of_text = as_text(inputs, ids, input_ids, still), features.content
        answers = gains = None
        both = (present & present.roll(1, 0)).all(1).cpu()
        clean = {"attention_mask": torch.ones_like(ids), **given, "modality_ids": ids}
        # what a conflict is told by may cost more where somebody wants to know of it
        told = read is not None or self._has_matching_head
        weighs_gain = level > 1 and told and self.config.dms_config.conflict_prior is not None
        if weighs_gain:
            gains = self._gains(prompt, clean, both, place)
        if asked is not None and prompt.images is not None and bool(both.any()):
            contents = (records[0].content, records[1].content, of_text)
            copies = self._copies(prompt, inputs, image, text, contents, asked[:2])
            labels = None if batch.get("labels") is None else batch["labels"].to(self.device)
            answers = self._answers(clean, copies, labels, both, asked[2], prompt if weighs_gain else None)
        return records, damaged, present.cpu(), in_prompt, answers, sources, gains

    def _clean_prompt(
        self, batch: dict[str, Any], place: int
    ) -> tuple[Prompt, dict[str, Any], dict[str, Any], SourceRecord | None]:
        """The prompts of a batch with one image and one text each, what `forward` takes of them without labels and
        DMS's own arguments, the same with encoded images, and all their sources where they have several.

        Args:
            place: of the batch's first sample.
        """
        own = {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        inputs = {name: v for name, v in own.items() if name not in OWN and name != "labels"}
        ids, given_ids = own.get("modality_ids"), own.get("source_ids")
        if given_ids is not None:
            ids = given_ids
        elif ids is None:
            ids = self.infer_modality_ids(inputs["input_ids"], inputs.get("attention_mask"), own.get("labels"))
        placeholders = self._placeholders(inputs["input_ids"])
        images, owner, given = None, None, inputs
        if inputs.get("pixel_values") is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
            self._check_images(inputs["pixel_values"])
            given = dict(inputs)
            images = self._observed_images(given)
            owner = images.rows(placeholders)
        present = torch.stack([(ids == m + 1).any(1) for m in range(len(MODALITIES))], 1)
        mask = inputs.get("attention_mask")
        prompt = Prompt(inputs["input_ids"], None, mask, ids, present, placeholders, images, owner, None)
        if given_ids is not None:
            prompt = self._with_sources(prompt, {name: own.get(name) for name in OWN})
        if prompt.source_types is not None:
            # statistics are those of one image and one passage; all of them tell how far sources agree
            return self._one_of_each(prompt, place), inputs, given, self._source_record(prompt)
        if images is None:
            present[:, 0] = False
        if own.get("modality_mask") is not None:
            present = present & own["modality_mask"].bool()
        return replace(prompt, modality_mask=present), inputs, given, None

    def _damaged_images(
        self, prompt: Prompt, inputs: dict[str, Any], family: str, generator: torch.Generator
    ) -> tuple[DamagedRecord, dict[str, Any] | None]:
        """The record of a copy whose images are damaged, and its inputs; without numbers, and `None`, where there are
        no images."""
        severity = torch.rand(len(prompt.modality_ids), generator=generator)
        images, owner = prompt.images, prompt.owner
        if images is None or owner is None:
            return DamagedRecord(severity, None, None), None
        # images that are not looked at stay as they are
        of_image = torch.cat([severity, torch.zeros(1)])[owner.cpu()]

        def damage(pictures: Tensor, number: Tensor) -> Tensor:
            return damaged_pictures(pictures, family, of_image[number], generator)

        pooled = images.tokens.split(images.lengths.tolist())
        changed = self._changed_images(inputs, pooled, damage)
        numbers = of_rows(self._pixel_statistics(changed, pooled), owner, len(severity)).cpu()
        return DamagedRecord(severity, None, numbers), changed
