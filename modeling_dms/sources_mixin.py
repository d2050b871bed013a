"""Prompts with several images or passages, each of which has a weight of its own."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from modeling_dms.calibrate.source_agreement import SourceRecord, composition, p_odd
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.observe.images import Images
from modeling_dms.observe.observation_mixin import of_rows, of_words
from modeling_dms.observe.prefill import Reading
from modeling_dms.observe.prompt import TEXT, VISION, ModalityFeatures, Prompt
from modeling_dms.outputs import ModalitySignals, WeighedSources
from modeling_dms.weigh.odd_ones import alarm_rates, odd_ones, source_weights
from modeling_dms.weigh.scheduler import uniform_weights


class SourcesMixin:
    """Adds sources to a model that observes prompts (`ObservationMixin`)."""

    dms: Any
    config: Any

    def _infer_sources(self, prompt: Prompt) -> Tensor | None:
        """Each image of a row a source, and all its text one more, (B, P), where a row has several images and
        calibration knows how far sources agree; else `None`.

        Args:
            prompt: whose modalities are told apart.
        """
        images, owner = prompt.images, prompt.owner
        if torch.compiler.is_compiling() or images is None or owner is None or len(owner) < 2:
            return None
        if self.config.dms_config.scheduler != "rule" or not self.dms.calibration.sources.known.any():
            return None
        before = (owner[:, None] == owner).long().tril().sum(1)  # images of the row, up to each
        if int(before.max()) < 2:
            return None
        ids = torch.where(prompt.modality_ids == TEXT, before.max() + 1, 0)
        return ids.masked_scatter(prompt.placeholders, before.repeat_interleave(images.lengths.to(before.device)))

    def _with_sources(self, prompt: Prompt, own: dict[str, Tensor | None]) -> Prompt:
        """A prompt whose modalities are told apart by `source_ids`. Where each row has one image first and one text
        second, these are its modalities.

        Args:
            prompt: whose `modality_ids` are numbers of sources.
            own: the caller's `source_types` and `modality_mask`.

        Raises:
            ValueError: for types, a mask or weights that do not fit, a sample without a source, or a scheduler that
                weighs modalities alone.
        """
        ids, types = prompt.modality_ids, own["source_types"]
        if torch.compiler.is_compiling():
            raise ValueError("sources are weighed outside of compiled programs: pass `modality_weights` to those")
        count = max(1, int(ids.max()) if types is None else types.shape[-1])
        there = torch.stack([(ids == number).any(1) for number in range(1, count + 1)], 1)
        image = torch.stack([((ids == number) & prompt.placeholders).any(1) for number in range(1, count + 1)], 1)
        found = torch.where(image, VISION, TEXT)
        if types is not None:
            types = types.to(ids.device).expand_as(there)
            if bool(((types != found) & there).any()) or int(ids.max()) > count:
                raise ValueError(
                    f"source_types must be (batch, source), {VISION} for tokens of an image and {TEXT} for others: "
                    f"got {types.tolist()} for {found.masked_fill(~there, 0).tolist()}"
                )
        if prompt.images is None and prompt.given is None:
            there = there & ~image
        mask = own["modality_mask"]
        if mask is not None and mask.shape != there.shape:
            raise ValueError(f"modality_mask must be (batch, source) {tuple(there.shape)}, got {tuple(mask.shape)}")
        there = there if mask is None else mask.bool().to(there.device) & there
        uniform_weights(there)  # raises for a sample without any
        given = None if prompt.given is None else self._check_weights(prompt.given, there)  # type: ignore[attr-defined]
        types, prompt = found.masked_fill(~there, 0), replace(prompt, modality_mask=there, given=given)
        in_order = torch.tensor([VISION, TEXT], device=ids.device)
        if count == len(MODALITIES) and bool(((types == in_order) | (types == 0)).all()):
            return prompt
        scheduler = self.config.dms_config.scheduler
        if scheduler not in ("rule", "uniform") and given is None:
            raise ValueError(f"several sources are weighed by scheduler='rule' or 'uniform', got {scheduler!r}")
        return replace(prompt, source_types=types)

    def _weigh_sources(self, prompt: Prompt, reading: Reading | None) -> WeighedSources:
        """Weights and signals of each source: (B, S)."""
        calibration, types = self.dms.calibration, cast(Tensor, prompt.source_types)
        features = [self._images_of_sources(prompt), self._texts_of_sources(prompt, reading)]
        shape, device = types.shape, types.device
        p_clean = torch.ones(shape, device=device)
        typicality, surprisal = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        contents = []
        for index, feature in enumerate(features):
            size = calibration.sources.get_buffer(f"{index}_location").shape[0]
            contents.append(torch.zeros(*shape, size, device=device))
            if feature is None:
                continue
            where = types == index + 1
            contents[-1][where] = feature.content.float()
            if calibration.is_calibrated:
                typicality[where], p_clean[where] = calibration.judge(index, feature)
            if feature.surprisal is not None:
                surprisal[where] = feature.surprisal.float()
        sources = calibration.sources
        agreement = sources.ratios(*sources.cosines(calibration.agreement, types, contents))
        weights, p_match = self._rule_for_sources(types, p_clean, agreement)
        pairs = ((types == VISION).sum(1) < 2) & ((types == TEXT).sum(1) < 2)
        p_values = None
        if pairs.any():
            # one image and one text are weighed as modalities, whatever stands beside them in the batch
            weights, p_clean, p_match = weights.clone(), p_clean.clone(), p_match.clone()  # the graph holds what was
            alone = replace(self._one_of_each(prompt, 0), given=None)
            said = self._weigh_modalities(alone, reading)  # type: ignore[attr-defined]
            pairs_of = (weights, said.weights), (p_clean, said.signals.p_clean), (p_match, said.signals.p_match)
            for index in range(len(MODALITIES)):
                where = pairs[:, None] & (types == index + 1)
                for of_sources, of_pairs in pairs_of:
                    of_sources[where] = of_pairs[where.any(1), index].to(of_sources)
            p_values = said.signals.p_values.masked_fill(~pairs[:, None], torch.nan)
        signals = ModalitySignals(
            typicality=typicality, surprisal=surprisal, p_clean=p_clean, p_match=p_match, agreement=agreement
        )
        return WeighedSources(weights if prompt.given is None else prompt.given, signals, p_values)

    def _rule_for_sources(self, types: Tensor, p_clean: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
        """The rule's weights (B, S), and the p-values (B, S) of how far each source belongs with the others.

        Args:
            types: (B, S), 0 for what is not there.
            p_clean, agreement: of `ModalitySignals`.
        """
        config, calibration, present = self.config.dms_config, self.dms.calibration, types > 0
        damage_rate, odd_rate = alarm_rates(present, config.false_alarm_rate)
        # what is damaged has no say in what belongs together
        compared = present & (p_clean > damage_rate)
        which = composition(types, compared)
        p_match, odd = odd_ones(agreement, compared, lambda o: p_odd(calibration.clean_sets, o, which), odd_rate)
        # beside a sound source of its type another one need not stand in
        kinds, known = (types - 1).clamp_min(0), calibration.reliability
        spared, dropped = known.spared[kinds] > 0, known.dropped[kinds] > 0
        spared &= ~((types[:, :, None] == types[:, None]) & compared[:, None]).any(2)
        rate, kappa, floor = config.false_alarm_rate, config.kappa, config.weight_floor
        return source_weights(p_clean, odd, present, rate, kappa, floor, spared, dropped), p_match

    def _source_of_images(self, images: Images, placeholders: Tensor, source_ids: Tensor) -> Tensor:
        """The number of the source, from 1, that each image is: (I,).

        Raises:
            ValueError: for an image whose tokens are not all of one source.
        """
        numbers = source_ids[placeholders]
        lengths = images.lengths.to(numbers.device)
        ends = lengths.cumsum(0)
        first = numbers[(ends - lengths).clamp_max(len(numbers) - 1)]
        if bool((numbers != first.repeat_interleave(lengths)).any()):
            raise ValueError(
                "source_ids must give all tokens of an image one number; some backbones encode all images of a row as "
                "one, whose images cannot be weighed apart"
            )
        return first

    def _images_of_sources(self, prompt: Prompt) -> ModalityFeatures | None:
        """Features of all sources that are images, in the order of rows and numbers."""
        images, owner = prompt.images, prompt.owner
        where = cast(Tensor, prompt.source_types) == VISION
        if images is None or owner is None or images.statistics is None or images.pixels is None or not where.any():
            return None
        source = self._source_of_images(images, prompt.placeholders, prompt.modality_ids)
        count = int(where.sum())
        # the number of a source among those, or `count` for an image that is no source
        number = torch.where(where, where.flatten().long().cumsum(0).view_as(where.long()) - 1, count)
        number = torch.cat([torch.full_like(number[:, :1], count), number], 1)
        place = number[owner.to(number.device), source]
        statistics = of_rows(images.statistics.to(place.device), place, count)
        numbers = of_rows(images.pixels.to(place.device), place, count)
        # their tokens are not looked at
        tokens, mask = statistics.new_zeros(count, 0, 0), where.new_zeros(count, 0)
        return ModalityFeatures(tokens, mask, statistics, statistics[:, -1], numbers)

    def _texts_of_sources(self, prompt: Prompt, reading: Reading | None) -> ModalityFeatures | None:
        """Features of all sources that are texts, in the order of rows and numbers, as one prompt each."""
        rows, numbers = (cast(Tensor, prompt.source_types) == TEXT).nonzero(as_tuple=True)
        if not len(rows):
            return None
        ids = torch.where(prompt.modality_ids[rows] == numbers[:, None] + 1, TEXT, 0)
        input_ids = cast(Tensor, prompt.input_ids)[rows]
        if reading is None:
            return self._text_features(input_ids, None, ids)  # type: ignore[attr-defined]
        mask = None if prompt.attention_mask is None else prompt.attention_mask[rows]
        of_each = replace(prompt, input_ids=input_ids, modality_ids=ids, attention_mask=mask)
        text: ModalityFeatures = self._text_in_prompt(of_each, reading, rows)  # type: ignore[attr-defined]
        some = self.dms.calibration.suspicious(text).nonzero()[:, 0]
        if len(some):
            text.closer = (some, self._text_features(input_ids[some], None, ids[some]))  # type: ignore[attr-defined]
        return text

    def _source_record(self, prompt: Prompt) -> SourceRecord:
        """What all sources of clean samples are about, for calibration."""
        types = cast(Tensor, prompt.source_types)
        images = self._images_of_sources(prompt)
        contents: list[Tensor] = []
        for index in range(len(MODALITIES)):
            size = self.dms.calibration.sources.get_buffer(f"{index}_location").shape[0]
            contents.append(torch.zeros(*types.shape, size))
        if images is not None:
            contents[0][(types == VISION).cpu()] = images.content.float().cpu()
        rows, numbers = (types == TEXT).nonzero(as_tuple=True)
        if len(rows):
            ids = torch.where(prompt.modality_ids[rows] == numbers[:, None] + 1, TEXT, 0)
            _, mask, tokens = self._text_tokens(cast(Tensor, prompt.input_ids)[rows], None, ids)  # type: ignore[attr-defined]
            contents[1][(types == TEXT).cpu()] = of_words(tokens, mask).float().cpu()
        return SourceRecord(types.cpu(), contents)

    def _one_of_each(self, prompt: Prompt, number: int) -> Prompt:
        """The same prompts with one image and one passage as their modalities, all else neutral: the first image, and
        of the passages each in turn.

        Args:
            number: of the first row, by which the turn goes.
        """
        types, ids = cast(Tensor, prompt.source_types), prompt.modality_ids
        chosen = []
        for kind in (VISION, TEXT):
            of_kind = (types == kind).long()
            count = of_kind.sum(1)
            turn = torch.arange(number, number + len(ids), device=ids.device) % count.clamp_min(1)
            turn = torch.zeros_like(turn) if kind == VISION else turn
            here = (of_kind.cumsum(1) == turn[:, None] + 1) & (of_kind > 0)
            chosen.append(torch.where(count > 0, here.long().argmax(1) + 1, -1))
        modality_ids = torch.zeros_like(ids)
        for kind, source in zip((VISION, TEXT), chosen, strict=True):
            modality_ids = modality_ids.masked_fill(ids == source[:, None], kind)
        owner = prompt.owner
        if owner is not None and prompt.images is not None:
            source = self._source_of_images(prompt.images, prompt.placeholders, ids)
            owner = torch.where(source == chosen[0][owner], owner, len(ids))
        present = torch.stack([(modality_ids == m + 1).any(1) for m in range(len(MODALITIES))], 1)
        return replace(prompt, modality_ids=modality_ids, modality_mask=present, owner=owner, source_types=None)
