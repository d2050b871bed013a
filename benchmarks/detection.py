"""What calibration finds of damage that it has not seen: shares of damaged inputs that are flagged.

    python benchmarks/detection.py --photos PHOTOS [--models NAMES] [--out docs/detection.md]

PHOTOS is a folder of photographs with captions: `captions.jsonl`, one object a line with `image` and `captions`, as a
part of Flickr8k is distributed. A photograph's split is told by its name. Each model is calibrated on the photographs
of the training split, one caption each, without labels, and looked at on those of the test split.
"""

import argparse
import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from modeling_dms.calibrate.calibration import LOOKED_AT, Calibration
from modeling_dms.calibrate.damage import FAMILIES
from modeling_dms.calibrate.fit import fit_calibration
from modeling_dms.calibrate.records import DamagedRecord, ModalityRecord
from modeling_dms.evidence.pixels import PIXEL_STATISTICS
from modeling_dms.evidence.surprisal import SURPRISAL_STATISTICS
from modeling_dms.evidence.typicality import auroc
from modeling_dms.training.corruptions.families import self_made_families
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa, load_openmoji
from modeling_dms.training.data.flickr8k import split_by_name
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.evaluate.grid import Condition
from modeling_dms.training.models.loading import load


MODELS = ("llava-dinov2s-smollm2-135m", "blip2-dinov2s-smollm2-135m")
IMAGE_KINDS = (
    *("blur", "occlusion", "noise", "pixelate", "jpeg", "posterize", "dark", "low_contrast", "fog"),
    *("imagenet_c/motion_blur", "color_cast", "invert", "imagenet_c/snow", "imagenet_c/frost", "glitch", "jigsaw"),
)
TEXT_KINDS = ("typos", "scramble", "random_words", "drop_words", "shuffle_words")
KINDS = (tuple(f"image:{kind}" for kind in IMAGE_KINDS), tuple(f"text:{kind}" for kind in TEXT_KINDS))
MISMATCHES = {"image:mismatch": "another's image", "text:mismatch": "another's caption"}
SEVERITIES = (3, 5)
BATCH, RESAMPLED, SPLITS = 32, 2000, 20
# columns of `pixel_statistics`, in its order
GROUPS = {
    "contrasts and gradients": range(69),
    "the spectrum": range(69, 133),
    "colors": range(133, 177),
    "the agreement of color channels": range(177, 192),
    "seams": range(192, 216),
}
OTHERS_TEST = 50
OTHERS = {"easy-VQA": (load_easy_vqa, 300), "OpenMoji": (load_openmoji, 300)}


HEAD = """# What is seen of damage

Shares of damaged inputs that a calibrated model flags, by `python benchmarks/detection.py`. Calibrated on {train}
photographs with one caption each (a part of Flickr8k), without labels, and looked at on the {test} of the {split}
split, which nothing was chosen by. *Unseen*: the families of calibration's self-made damage that the kind resembles
are left out, so that the detector knows nothing like it. *Known*: it knows them, as a user's model does. Intervals:
95%, bootstrapped over the images. A flagged input may lose its weight beside one that is not, where the other can
stand in for it ([the rule](method.md#the-rule)). Drawings, at the end, are calibrated and looked at likewise, on
{drawn} and {drawn_test} of each set. The two models below share image processor, vision tower and language model, and
so what they see."""
ABLATIONS = """Means over all kinds, unseen, with the difference from the release and its interval."""


def load_photos(folder: Path) -> dict[str, list[Sample]]:
    """Photographs with their first caption, by split."""
    found: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = Path(row["image"]).name
        path = next(p for p in (folder / row["image"], folder / "images" / name) if p.exists())
        # the name stands for an answer, by which mismatches tell samples apart
        found[split_by_name(name)].append(Sample(name, path, row["captions"][0], "", (name,)))
    return found


@dataclass
class Seen:
    """What a model made of n samples.

    Attributes:
        numbers: what each detector reads, (n, P): of images, of texts alone and, last, of texts within their prompts;
            `None` where those were not looked at.
        shared: of each modality, its canonical coordinates, (n, K).
    """

    numbers: list[Tensor | None]
    shared: list[Tensor]


@dataclass
class Looked:
    """What a model made of a data set: its clean samples, and by kind and severity their damaged copies."""

    clean: Seen
    damaged: dict[tuple[str, int], Seen]


@torch.no_grad()
def look(model: Any, collator: PromptCollator, samples: Sequence[Sample], in_prompt: bool = True) -> Seen:
    """Runs a calibrated model on samples."""
    calibration, generator, found = model.dms.calibration, torch.Generator(), []
    if not in_prompt:
        model._text_within = lambda *_: None
    for start in range(0, len(samples), BATCH):
        records, _, _, read, *_ = model._calibration_batch(collator(samples[start : start + BATCH]), 1, generator)
        found.append([*records, read])
    if not in_prompt:
        del model._text_within
    numbers: list[Tensor | None] = []
    for index, parts in enumerate(zip(*found, strict=True)):
        if parts[0] is None:
            numbers.append(None)
            continue
        record = ModalityRecord.cat(parts)
        numbers.append(calibration.numbers(index, calibration.distances(index, record.statistics), record.numbers))
    contents = [torch.cat([parts[index].content for parts in found]) for index in range(2)]
    return Seen(numbers, [calibration.agreement.shared(index, content) for index, content in enumerate(contents)])


def look_at_all(model: Any, collator: PromptCollator, samples: Sequence[Sample]) -> Looked:
    """Clean, damaged and mismatched copies of the samples."""
    conditions = [Condition(name, "unseen", severity) for own in KINDS for name in own for severity in SEVERITIES]
    conditions += [Condition(name, "mismatch", 5) for name in MISMATCHES]
    damaged = {}
    for condition in tqdm(conditions, desc="conditions", unit=""):
        changed, failed = condition.apply(samples, 0)
        if failed:
            raise ValueError(f"{condition.name}: {next(iter(failed.values()))}")
        of_text = condition.group == "unseen" and condition.damaged == 1
        if condition.group == "unseen" and not of_text:
            # the text, which is not looked at, need not be read
            changed = [sample.replace(context=None) for sample in changed]
        damaged[condition.name, condition.severity] = look(model, collator, changed, in_prompt=of_text)
    return Looked(look(model, collator, samples), damaged)


@dataclass
class Rule:
    """What is flagged: by default as the calibration has it.

    Attributes:
        counts: which scores of a detector of D families count, (D + 1,) bool: those of the families, then the
            distance. All by default.
        kept: columns of each modality's numbers that its detector has been fitted on; all by default.
        factor: on the rate of false alarms.
        screens: read a text alone only where it looks suspicious within its prompt.
    """

    calibration: Calibration
    counts: Callable[[int], Tensor] = lambda families: torch.ones(families + 1, dtype=torch.bool)
    kept: tuple[slice | list[int], slice | list[int]] = (slice(None), slice(None))
    factor: float = 1.0
    screens: bool = True

    def scores(self, seen: Seen, index: int, left_out: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Of what was seen, (n,), and of the clean samples of the calibration."""
        detector = self.calibration.detectors[index]
        numbers = cast(Tensor, seen.numbers[index])[:, self.kept[min(index, 1)]]
        used = self.counts(len(detector.offsets))
        used[list(left_out)] = False
        found = (detector.raw_scores(numbers) - detector.score_location) / detector.score_scale
        both = (found, detector.clean[: int(detector.count)])
        return tuple(values.masked_fill(~used, -torch.inf).amax(1) for values in both)  # type: ignore[return-value]

    def flagged(self, seen: Seen, index: int, left_out: Sequence[int] = ()) -> np.ndarray:
        """Which samples' modality `index` is taken for damaged: (n,) of 0 and 1."""
        found, clean = self.scores(seen, index, left_out)
        flags = found > highest(clean, self.factor * self.calibration.config.alarm_rate)
        if index == 1 and self.screens and seen.numbers[2] is not None:
            flags &= self.suspicious(seen, left_out)
        return flags.float().numpy()

    def suspicious(self, seen: Seen, left_out: Sequence[int] = ()) -> Tensor:
        """Which texts look suspicious within their prompts: (n,)."""
        found, clean = self.scores(seen, 2, left_out)
        return found > highest(clean, LOOKED_AT)

    def kinds(self, looked: Looked, index: int, severity: int, unseen: bool = True) -> np.ndarray:
        """The same of all kinds, each without the families that it resembles: (kinds, n)."""
        rows = []
        for name in KINDS[index]:
            left_out = [FAMILIES[index].index(family) for family in self_made_families(name)] if unseen else []
            rows.append(self.flagged(looked.damaged[name, severity], index, left_out))
        return np.stack(rows)

    def any_clean(self, looked: Looked) -> np.ndarray:
        """Which clean samples are taken for damaged for whatever reason: (n,)."""
        return np.maximum(*(self.flagged(looked.clean, index) for index in range(2)))


def highest(values: Tensor, rate: float) -> float:
    """What new values of the same distribution exceed with probability `rate`, see `Conformal.threshold`."""
    return float(values.sort(descending=True).values[max(1, int(rate * (len(values) + 1))) - 1])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (kinds, n), or (n,), and its bootstrapped 95% interval over the n samples."""
    means = values.mean(0) if values.ndim == 2 else values
    drawn = np.random.default_rng(0).integers(len(means), size=(RESAMPLED, len(means)))
    low, high = np.quantile(means[drawn].mean(1), (0.025, 0.975))
    return float(means.mean()), float(low), float(high)


def shown(values: np.ndarray) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values))


def kinds_table(rule: Rule, looked: Looked) -> str:
    """Shares flagged by kind and severity, and the area under the ROC curve."""
    rows = []
    for index, own in enumerate(KINDS):
        unseen = {severity: rule.kinds(looked, index, severity) for severity in SEVERITIES}
        known = {severity: rule.kinds(looked, index, severity, unseen=False) for severity in SEVERITIES}
        for number, name in enumerate(own):
            left_out = [FAMILIES[index].index(family) for family in self_made_families(name)]
            clean = rule.scores(looked.clean, index, left_out)[0]
            areas = [
                auroc(clean, rule.scores(looked.damaged[name, severity], index, left_out)[0])
                for severity in SEVERITIES
            ]
            cells = [f"{part[severity][number].mean():.2f}" for part in (unseen, known) for severity in SEVERITIES]
            rows.append([name.replace(":", ": ").replace("_", " "), *cells, *(f"{area:.3f}" for area in areas)])
        means = [f"**{shown(part[severity])}**" for part in (unseen, known) for severity in SEVERITIES]
        rows.append([f"**mean of {len(own)}**", *means, "", ""])
    head = ("damage", "unseen, severity 3", "5", "known, severity 3", "5", "unseen, AUROC at 3", "5")
    return table(head, rows)


def mismatch_lines(looked: Looked) -> list[str]:
    lines, (image, text) = [], looked.clean.shared
    matched = cosine_similarity(image, text)
    for name, what in MISMATCHES.items():
        image, text = looked.damaged[name, 5].shared
        area = auroc(-matched, -cosine_similarity(image, text))
        lines.append(f"- consistency tells matched pairs from those with {what}: AUROC {area:.3f}")
    return lines


def clean_line(rule: Rule, looked: Looked) -> str:
    image, text = (rule.flagged(looked.clean, index) for index in range(2))
    again = rule.suspicious(looked.clean).float().mean()
    return (
        f"Clean texts that are read once more, alone: {again:.3f} ({LOOKED_AT:.3f} asked for). Clean samples that are "
        f"flagged: image {image.mean():.3f}, text {text.mean():.3f}, either "
        f"{shown(rule.any_clean(looked))} ({rule.calibration.config.false_alarm_rate:.3f} asked for)."
    )


Data = tuple[list[ModalityRecord], list[dict[str, DamagedRecord]], Tensor, ModalityRecord]


def refitted(
    model: Any, data: Data, rows: Tensor | None = None, pixels: Sequence[int] | None = None, text: str = "all"
) -> Calibration:
    """A calibration on some of the samples, by some of the numbers.

    Args:
        pixels: columns of the pixels' statistics.
        text: `"surprisal"`, `"layers"` or `"all"`.
    """
    clean, damaged, present, in_prompt = copy.deepcopy(data)
    if rows is not None:
        clean, present, in_prompt = [record[rows] for record in clean], present[rows], in_prompt[rows]
        damaged = [{name: copies[rows] for name, copies in families.items()} for families in damaged]
    for record in (clean[0], *damaged[0].values()):
        if pixels is not None:
            record.numbers = record.numbers[:, pixels]
    for record in (clean[1], in_prompt, *damaged[1].values()):
        if text == "layers":
            record.numbers = None
    layers = text != "surprisal"
    size = 2 * clean[1].statistics.shape[1] * layers + (0 if text == "layers" else SURPRISAL_STATISTICS)
    calibration = Calibration(
        model.config.dms_config,
        [(record.statistics.shape[1], record.statistics.shape[2]) for record in clean],
        [
            (clean[0].numbers.shape[1], len(FAMILIES[0]), False),
            (size, len(FAMILIES[1]), layers),
        ],
        [record.content.shape[1] for record in clean],
        in_prompt=1,
    )
    fit_calibration(calibration, clean, damaged, present, in_prompt=in_prompt)
    return calibration


def ablations(model: Any, data: Data, looked: Looked) -> str:
    """What each part of the evidence is worth: a table of what is flagged without it, and the paired difference."""
    calibration = model.dms.calibration
    whole = Rule(calibration)
    variants: dict[str, tuple[Rule, Sequence[int]]] = {
        "as released": (whole, (0, 1)),
        "without the distance": (Rule(calibration, lambda d: torch.arange(d + 1) < d), (0, 1)),
        "the distance alone (`level=1`)": (Rule(calibration, lambda d: torch.arange(d + 1) == d), (0, 1)),
        "every text read alone": (Rule(calibration, screens=False), (1,)),
        "three times the false alarms": (Rule(calibration, factor=3), (0, 1)),
    }
    for name, group in GROUPS.items():
        columns = [column for column in range(PIXEL_STATISTICS) if column not in group]
        variants[f"pixels without {name}"] = (
            Rule(refitted(model, data, pixels=columns), kept=(columns, slice(None))),
            (0,),
        )
    layers = refitted(model, data, text="layers")
    variants["text by its layers alone"] = (Rule(layers, kept=(slice(None), slice(SURPRISAL_STATISTICS, None))), (1,))
    surprisal = refitted(model, data, text="surprisal")
    variants["text by surprisal alone"] = (Rule(surprisal, kept=(slice(None), slice(SURPRISAL_STATISTICS))), (1,))
    rows = []
    for name, (rule, sides) in variants.items():
        cells = []
        for index in range(2):
            for severity in SEVERITIES:
                if index not in sides:
                    cells.append("")
                    continue
                own = rule.kinds(looked, index, severity)
                difference = own - whole.kinds(looked, index, severity)
                cells.append(f"{own.mean():.3f}" if rule is whole else f"{own.mean():.3f} ({shown(difference)})")
        rows.append([name, f"{rule.any_clean(looked).mean():.3f}", *cells])
    head = ("", "clean, either", *(f"{what}, severity {s}" for what in ("image", "text") for s in SEVERITIES))
    return table(head, rows)


def joined(one: Data, two: Data) -> Data:
    """Both one after the other."""
    clean = [ModalityRecord.cat(records) for records in zip(one[0], two[0], strict=True)]
    damaged = [
        {name: DamagedRecord.cat([copies, second[name]]) for name, copies in first.items()}
        for first, second in zip(one[1], two[1], strict=True)
    ]
    return clean, damaged, torch.cat([one[2], two[2]]), ModalityRecord.cat([one[3], two[3]])


def false_alarms(model: Any, data: Data) -> str:
    """Shares of clean samples flagged, calibrated on a random 60% of all and looked at on the others, many times."""
    clean, _, present, in_prompt = data
    shares, count = [], len(present)
    for seed in tqdm(range(SPLITS), desc="splits", unit=""):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        calibration = refitted(model, data, rows=order[: 6 * count // 10])
        rest = order[6 * count // 10 :]
        flags = []
        for index in range(2):
            record = clean[index][rest]
            away = calibration.distances(index, record.statistics)
            damage = calibration.detectors[index](calibration.numbers(index, away, record.numbers))
            flags.append(calibration.detectors[index].p_value(damage) <= calibration.config.alarm_rate)
        read = in_prompt[rest]
        away = calibration.distances(-1, read.statistics)
        score = calibration.detectors[-1](calibration.numbers(-1, away, read.numbers))
        flags[1] &= calibration.detectors[-1].p_value(score) <= LOOKED_AT
        shares.append(float((flags[0] | flags[1]).float().mean()))
    mean = float(np.mean(shares))
    asked = model.config.dms_config.false_alarm_rate
    # clean photographs of the splits are the same few hundred: they count once
    low, high = (asked + sign * 1.96 * (asked * (1 - asked) / count) ** 0.5 for sign in (-1, 1))
    return (
        f"Calibrated on a random 60% of {count} clean photographs and looked at on the others, {SPLITS} times: "
        f"{mean:.4f} of them are flagged for either reason on average (from {min(shares):.3f} to {max(shares):.3f}); "
        f"{asked:.3f} was asked for, of which the 95% interval of so many photographs is {max(low, 0):.4f} to "
        f"{high:.4f}."
    )


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, or returned when this ran before."""
    if path.exists():
        return torch.load(path, weights_only=False)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return made


@dataclass
class Run:
    """A model, calibrated on some samples, and what it made of others."""

    model: Any
    data: Data
    looked: Looked

    @classmethod
    def of(cls, name: str, title: str, train: Sequence[Sample], test: Sequence[Sample], cache: Path) -> "Run":
        """Takes half an hour, or what it left in `cache`, which is to be deleted where the package has changed."""
        model, processor = load(name)
        collator = PromptCollator(processor)
        prefix = cache / f"{name}-{title}"
        data, pixels = kept(Path(f"{prefix}-data.pt"), lambda: cls.collected(model, collator, train))
        model.dms.calibration.pixels.load_state_dict(pixels)
        print(f"{title}, {name}\n{fit_calibration(model.dms.calibration, *data[:3], in_prompt=data[3])}", flush=True)
        shown = hashlib.sha256("\n".join(sample.id for sample in test).encode()).hexdigest()[:12]
        looked = kept(Path(f"{prefix}-{shown}.pt"), lambda: look_at_all(model, collator, test))
        return cls(model, data, looked)

    @staticmethod
    def collected(model: Any, collator: PromptCollator, samples: Sequence[Sample]) -> tuple[Data, dict[str, Tensor]]:
        """What a calibration is fitted to, and the range of the pixels."""
        batches = (collator(samples[start : start + BATCH]) for start in range(0, len(samples), BATCH))
        found = model._calibration_data(batches, 2, len(samples), True, 0)[:4]
        return found, model.dms.calibration.pixels.state_dict()

    def section(self) -> list[str]:
        """Clean samples, kinds of damage, mismatches."""
        rule = Rule(self.model.dms.calibration)
        lines = "\n".join(mismatch_lines(self.looked))
        return [clean_line(rule, self.looked), kinds_table(rule, self.looked), lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with captions.jsonl and the photographs")
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--split", default="test", help="what is looked at: test, or validation to choose by")
    parser.add_argument("--out", type=Path, default=Path("docs/detection.md"))
    parser.add_argument("--cache", type=Path, default=Path("runs/detection"), help="what was seen is kept here")
    options = parser.parse_args()
    photos = load_photos(options.photos)
    train, test = photos["train"], photos[options.split]
    drawn = {"drawn": max(count for _, count in OTHERS.values()), "drawn_test": OTHERS_TEST}
    parts = [HEAD.format(train=len(train), test=len(test), split=options.split, **drawn)]

    def add(*more: str) -> None:
        parts.extend(more)
        options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    names = options.models.split(",")
    for name in names:
        run = Run.of(name, "photos", train, test, options.cache)
        add(f"## Photographs, `{name}`", *run.section())
        if name == names[0]:
            collator = PromptCollator(load(name)[1])
            rest = [sample for split in ("validation", "test") for sample in photos[split]]
            path = options.cache / f"{name}-photos-rest-data.pt"
            more, _ = kept(path, partial(Run.collected, run.model, collator, rest))
            add("### Clean photographs", false_alarms(run.model, joined(run.data, more)))
            add("### What each part is worth", ABLATIONS, ablations(run.model, run.data, run.looked))
    # the model whose prompts are short
    other = names[-1]
    for title, (source, size) in OTHERS.items():
        some = {}
        for split in ("train", options.split):
            whole = [sample for sample in source(split) if (sample.context or "").strip()]
            # from the first to the last: neighbours are of one kind
            count = size if split == "train" else OTHERS_TEST
            some[split] = [whole[place * len(whole) // count] for place in range(min(count, len(whole)))]
        run = Run.of(other, title, some["train"], some[options.split], options.cache)
        add(f"## {title}, `{other}`", *run.section())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
