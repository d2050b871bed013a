"""Modality dropout: training samples of which now and then one modality is corrupted or missing."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from modeling_dms.training.corruptions.families import CorruptionConfig, check_rates, names_in
from modeling_dms.training.corruptions.registry import INPUTS, corrupt, seeded
from modeling_dms.training.data.samples import FIELDS, Sample, holds


# nothing of the sample is left in the modality, whatever the severity
REPLACING_FAMILIES = ("missing", "mismatch", "blank", "random_words")


class ModalityDropout(Dataset):
    """Samples with one modality corrupted now and then, or both.

    What is drawn depends on (seed, epoch, sample id) alone: workers, processes, batch size and order do not matter. A
    family is drawn first and then one of its kinds, so that a family of many kinds is no more frequent. Something of
    the sample is always left to answer from: a modality is not replaced (`REPLACING_FAMILIES`) where the other one is
    absent or replaced too. A sample keeps its id; one that cannot be corrupted as drawn stays as it is.

    Args:
        samples: with unique ids.
        image_rate: share of samples with only the image corrupted.
        text_rate: share of samples with only the context corrupted.
        image_families: families the image's corruptions are drawn from.
        text_families: families the context's corruptions are drawn from.
        both_rate: share of samples with both corrupted.
        severities: severities drawn from; replacing families always have 5.
        seed: changes all draws.

    Raises:
        ValueError: for rates outside 0..1 or of a sum above 1, a rate without families to draw from, an unknown
            family, a severity outside 1..5, or two samples of one id.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_rate: float,
        text_rate: float,
        image_families: Sequence[str],
        text_families: Sequence[str],
        both_rate: float = 0.0,
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        seed: int = 0,
    ):
        rates = {"both_rate": both_rate, "image_rate": image_rate, "text_rate": text_rate}
        check_rates(**rates)
        families = (tuple(image_families), tuple(text_families))
        self.names = [
            {family: names_in(modality, [family]) for family in chosen}
            for modality, chosen in zip(INPUTS, families, strict=True)
        ]
        # by case, in the rates' order and then clean: the families to draw from
        self.pairs: list[list[tuple[str | None, str | None]]] = [
            [pair for pair in product(*families) if not all(family in REPLACING_FAMILIES for family in pair)],
            [(family, None) for family in families[0]],
            [(None, family) for family in families[1]],
            [(None, None)],
        ]
        for (name, rate), pairs in zip(rates.items(), self.pairs, strict=False):
            if rate and not pairs:
                raise ValueError(
                    f"{name} is {rate}, but image_families {families[0]} and text_families {families[1]} "
                    "have nothing to draw"
                )
        if not severities or not set(severities) <= set(range(1, 6)):
            raise ValueError(f"severities must be integers from 1 to 5, got {severities!r}")
        # mismatch partners do not depend on the order of the samples
        self.partners = sorted(samples, key=lambda sample: sample.id)
        for one, next_one in zip(self.partners, self.partners[1:], strict=False):
            if one.id == next_one.id:
                raise ValueError(f"samples need unique ids, two are {one.id!r}")
        self.one_answer = len({sample.answers[:1] for sample in samples}) == 1
        self.samples, self.severities, self.seed = samples, tuple(severities), seed
        self.bounds = np.cumsum(list(rates.values()))
        # shared with the workers, which may outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def of(cls, samples: Sequence[Sample], config: CorruptionConfig, **kwargs: Any) -> "ModalityDropout":
        """With what a configuration says that training sees."""
        shared = ("image_rate", "text_rate", "image_families", "text_families", "both_rate")
        return cls(samples, **{name: getattr(config, name) for name in shared}, **kwargs)

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Changes the draws; give `Trainer` the `EpochCallback`, or every epoch may repeat the first one's."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        salt = f"@{self.seed}/{self.epoch.item()}"
        generator = seeded(sample.id, salt)
        pairs = self.pairs[int(np.searchsorted(self.bounds, generator.random(), side="right"))]
        present = [holds(getattr(sample, field)) for field in FIELDS]
        pairs = [
            pair
            for pair in pairs
            if any(here and family not in REPLACING_FAMILIES for here, family in zip(present, pair, strict=True))
        ]
        if not pairs:
            return sample
        pair = pairs[generator.integers(len(pairs))]
        clean = sample
        for field, family, here, names in zip(FIELDS, pair, present, self.names, strict=True):
            if family is None or not here:
                continue
            name = names[family][generator.integers(len(names[family]))]
            replaced = family in REPLACING_FAMILIES
            severity = 5 if replaced else self.severities[generator.integers(len(self.severities))]
            other = self._partner(clean, field, generator) if name.endswith(":mismatch") else None
            if other is not None or not name.endswith(":mismatch"):
                sample = corrupt(sample, name, severity, other, salt)
        return sample

    def _partner(self, sample: Sample, field: str, generator: np.random.Generator) -> Sample | None:
        """A sample of another image or context, and of another first answer if there is one."""
        start, fallback = int(generator.integers(len(self.partners))), None
        for step in range(len(self.partners)):
            other = self.partners[(start + step) % len(self.partners)]
            if not holds(getattr(other, field)) or getattr(other, field) == getattr(sample, field):
                continue
            if self.one_answer or other.answers[:1] != sample.answers[:1]:
                return other
            fallback = fallback or other
        return fallback


class EpochCallback(TrainerCallback):
    """Tells the training data its epoch. In several processes accelerate tells the sampler alone, and their draws
    would differ from those of one process."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Before the epoch's first batch is fetched."""
        train_dataloader.dataset.set_epoch(int(state.epoch))
