"""What weights of sources do: one of several passages, or of several sources, is another sample's.

    python benchmarks/sources.py --photos PHOTOS [--parts photographs,questions,cost] [--out docs/sources.md]

Photographs and captions tell how well a wrong passage is found; questions of easy-VQA, how much that helps. The page
is made of `sources.json` beside this file, which keeps the parts that are not measured anew.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detection import load_photos
from torch import Tensor
from tqdm.auto import tqdm

from modeling_dms.evidence.typicality import auroc
from modeling_dms.observe.prompt import TEXT, VISION
from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.data.easy_vqa import COLORS, CONTEXTS, SHAPES
from modeling_dms.training.evaluate.baselines import make_methods
from modeling_dms.training.evaluate.documents import share, table
from modeling_dms.training.evaluate.grid import Condition, run_condition
from modeling_dms.training.evaluate.report import summarize
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.loading import load


BATCH, PASSAGES, LEAST_GAP = 25, 3, 0.02
# of the cost: sources of a prompt (an image and captions of it, again and again), prompts at a time, rounds, and
# samples that calibrate
COUNTED, TIMED, ROUNDS, CALIBRATED = (3, 4, 16), 8, 11, 100
RATES = (0.01, 0.03, 0.06)
METHODS = ("static", "by modality", "least likely dropped", "likeliest source", "rule", "oracle")
# conditions of the evaluation
INPUTS = {
    "clean": "clean",
    "one passage is another's": "text:mismatch",
    "the image is another's": "image:mismatch",
    "one passage is misspelt": "text:typos",
    "the image is blurred": "image:blur",
    "two passages are another's": "text:mismatch+text:mismatch",
}
HEAD = """# Several images and passages

Written by `python benchmarks/sources.py`. A prompt may hold several passages, as retrieval finds them, or several
images. With `source_ids` each of them has a weight of its own, and what all others contradict loses it. How to use it:
[Retrieval-augmented prompts](retrieval.md); how it is found: [the method](method.md#several-sources).
"""
PHOTOS = """## Which passage is wrong

{test} photographs of the test split with three captions each, as three passages; one of them, at a random place, is
replaced by a caption of another photograph. Calibrated on {train} other photographs with three captions each, without
labels. *Uniform*: prompts in which nothing is replaced and all weights are equal. *Lowest*: prompts in which the wrong
passage has the lowest weight of the three, alone. *AUROC*: of the weights of wrong against right passages; of equal
weights half. *Ranked*: prompts in which the wrong passage is the oddest of the three, whether or not that is odd
enough for its weight to fall. The backbone was not trained on photographs: nothing of this hangs on its answers."""
ANSWERS = """## What weights of sources change

{test} images of the test split of easy-VQA, one question each, with three passages that say the same in different
words. Calibrated on {train} training images with three passages each. What resembles a blur, or typing errors, is
left out of the detectors where these are tested. Shares of right answers, chosen among the training split's as in
`dms evaluate`, whose methods these are; the backbones were trained on one passage a prompt. *Static*: all sources
weigh alike. *By modality*: image and text as two modalities, all passages together. *Least likely dropped*: the
passage with the highest surprisal has weight 0. *Likeliest source*: the source alone whose answer's first token is
the likeliest. *Rule*: this package's, by source. *Oracle*: what is wrong has the best of the weights 0.05, 0.01 and 0,
as where a credibility of each source is given (the setting of CrAM, Deng et al., AAAI 2025). *Closed*: the share of
the gap between static and oracle that the rule closes, with its 95% interval, bootstrapped over the images; nothing
where the gap is below two points. *Left alone*: inputs whose weights are all equal."""

COST = """## What it costs

The same prompts of an image and one passage or more, {timed} at a time, read by the backbone alone, as two modalities
and by source, in turns, {rounds} rounds on {threads} threads; prompts in which neither raises an alarm. What looks
suspicious within a prompt, one passage of ten, is read once more, alone, and counts. Medians of ratios with their
quartiles."""


def sample_of(photo: dict[str, Any], captions: Sequence[str], with_image: bool) -> Sample:
    image = photo["path"] if with_image else None
    return Sample(photo["image"], image, captions[0], "describe the picture.", contexts=tuple(captions[1:]))


def photographs(name: str, photos: dict[str, list[dict[str, Any]]], split: str) -> list[list[str]]:
    """Rows of the first table."""
    model, processor = load(name)
    model, collator = model.eval(), PromptCollator(processor)
    clean = [sample_of(photo, photo["captions"][:PASSAGES], True) for photo in photos["train"]]
    model.calibrate(
        (collator(clean[start : start + BATCH]) for start in range(0, len(clean), BATCH)), 2, show_progress=False
    )
    generator, shown, rows = random.Random(0), photos[split], []
    for with_image in (True, False):
        right, wrong, places = [], [], []
        for number, photo in enumerate(shown):
            other = shown[(number + generator.randrange(1, len(shown))) % len(shown)]
            captions, place = photo["captions"][:PASSAGES], generator.randrange(PASSAGES)
            replaced = [*captions[:place], generator.choice(other["captions"]), *captions[place + 1 :]]
            right.append(sample_of(photo, captions, with_image))
            wrong.append(sample_of(photo, replaced, with_image))
            places.append(place)
        place = torch.tensor(places)
        types = torch.tensor([VISION] * with_image + [TEXT] * PASSAGES).expand(len(place), -1)
        signals = [seen(model, collator, of) for of in (right, wrong)]
        for rate in RATES:
            model.config.dms_config.false_alarm_rate = rate
            weights, changed = (model._rule_for_sources(types, *of)[0] for of in signals)
            uniform = float((weights == weights.amax(1, keepdim=True)).all(1).float().mean())
            weights, odd = changed[:, -PASSAGES:], -signals[1][1].nanmean(2)[:, -PASSAGES:]
            is_wrong = torch.nn.functional.one_hot(place, PASSAGES).bool()
            least = weights[~is_wrong].view(len(weights), -1).amin(1)
            lowest = float((weights[is_wrong] < least).float().mean())
            ranked = float((odd.argmax(1) == place).float().mean())
            area = auroc(-weights[~is_wrong], -weights[is_wrong])
            rows.append(
                [name, "given" if with_image else "absent", f"{rate:.0%}", f"{uniform:.3f}", f"{lowest:.3f}"]
                + [f"{area:.3f}", f"{ranked:.3f}"]
            )
    return rows


def seen(model: Any, collator: PromptCollator, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """`p_clean` (n, S) and `agreement` (n, S, S)."""
    found = []
    for start in tqdm(range(0, len(samples), BATCH), desc="photographs", leave=False):
        _, signals = model.get_modality_weights(**collator(samples[start : start + BATCH]))
        found.append((signals.p_clean, signals.agreement))
    p_clean, agreement = zip(*found, strict=True)
    return torch.cat(p_clean), torch.cat(agreement)


def with_passages(sample: Sample, start: int) -> Sample:
    """The sample with three passages, in three of the five wordings."""
    words = set((sample.context or "").rstrip(".").split())
    color, shape = next(c for c in COLORS if c in words), next(s for s in SHAPES if s in words)
    texts = [CONTEXTS[(start + k) % len(CONTEXTS)].format(color=color, shape=shape) for k in range(PASSAGES)]
    return sample.replace(context=texts[0], contexts=tuple(texts[1:]))


def questions(name: str, split: str, count: int, calibration: int) -> list[list[str]]:
    """Rows of the second table."""
    model, processor = load(name)
    model, collator = model.eval(), PromptCollator(processor)
    generator, train = random.Random(0), load_easy_vqa("train")
    clean = [with_passages(sample, generator.randrange(len(CONTEXTS))) for sample in one_per_image(train, calibration)]
    # in the same words, so that a passage about a like shape is none of another's
    tested = [with_passages(sample, 0) for sample in one_per_image(load_easy_vqa(split), count)]
    model.calibrate((collator(clean[s : s + BATCH]) for s in range(0, len(clean), BATCH)), show_progress=False)
    task = VisualQuestionAnswering(processor, sorted({sample.answers[0] for sample in train}))
    methods = make_methods(model, lambda _: task, [], [], METHODS, CorruptionConfig())
    rows = []
    for group, kinds in tqdm(INPUTS.items(), desc=name):
        cells = run_condition(model, task, methods, tested, Condition(kinds, group, 5), 0, BATCH, True)
        found = {row["method"]: row for row in summarize(cells)["groups"]}
        scores = [f"{found[method]['score']:.3f}" if method in found else "" for method in METHODS]
        static, oracle = found["static"]["score"], found.get("oracle", found["static"])["score"]
        gap = share(found["rule"]["gap_closed"]) if oracle - static >= LEAST_GAP else ""
        rows.append([name, group, *scores, gap, f"{1 - found['rule']['reweighted']:.2f}"])
    return rows


def read_as(by_source: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Arguments of `forward`, by what reads a batch."""
    ids = by_source["source_ids"]
    two = {name: value for name, value in by_source.items() if name != "source_ids"} | {
        "modality_ids": ids.clamp_max(2)
    }
    return {
        "alone": two | {"modality_weights": torch.full((len(ids), 2), 0.5)},
        "modalities": two,
        "sources": by_source,
    }


def uniform(out: Any) -> bool:
    return bool((out.modality_weights == out.modality_weights[:, :1]).all())


@torch.no_grad()
def cost(name: str, photos: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Rows of the third table: the same clean prompts read by the backbone alone, as two modalities, and by source, in
    turns; those in which neither raises an alarm."""
    model, processor = load(name)
    model, collator = model.eval(), PromptCollator(processor)
    clean = [sample_of(photo, photo["captions"][:PASSAGES], True) for photo in photos["train"][:CALIBRATED]]
    model.calibrate(
        (collator(clean[start : start + BATCH]) for start in range(0, len(clean), BATCH)), 2, show_progress=False
    )
    rows = []
    for count in COUNTED:
        some = photos["train"][CALIBRATED : CALIBRATED + 3 * TIMED]
        tried = [sample_of(photo, (photo["captions"] * count)[: count - 1], True) for photo in some]
        quiet = [all(uniform(model(**way)) for way in read_as(collator([one])).values()) for one in tried]
        ways = read_as(collator([one for one, is_quiet in zip(tried, quiet, strict=True) if is_quiet][:TIMED]))
        taken: dict[str, list[float]] = {way: [] for way in ways}
        order = list(ways)
        for number in tqdm(range(-1, ROUNDS), desc=f"{count} sources"):
            order = [*order[1:], order[0]]
            for way in order:
                began = time.perf_counter()
                model(**ways[way])
                if number >= 0:
                    taken[way].append(time.perf_counter() - began)
        ratios = [
            sorted(own / other for own, other in zip(taken[way], taken[base], strict=True))
            for way, base in (("modalities", "alone"), ("sources", "alone"), ("sources", "modalities"))
        ]
        middle = [f"{r[len(r) // 2]:.3f} [{r[len(r) // 4]:.3f}, {r[-1 - len(r) // 4]:.3f}]" for r in ratios]
        rows.append([name, str(count), str(ways["sources"]["input_ids"].shape[1]), *middle])
    return rows


RESULTS = Path(__file__).with_suffix(".json")
# of the page: text and heads of the table
PARTS = {
    "photographs": (
        PHOTOS,
        ("model", "image", "false alarms asked", "uniform", "lowest", "AUROC", "ranked"),
    ),
    "questions": (ANSWERS, ("model", "inputs", *METHODS, "closed", "left alone")),
    "cost": (COST, ("model", "sources", "tokens", "modalities / alone", "sources / alone", "sources / modalities")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with captions.jsonl and the photographs")
    parser.add_argument("--photo-models", default="llava-dinov2s-smollm2-135m")
    parser.add_argument("--models", default="demo-llava,demo-blip2")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--calibration-samples", type=int, default=600)
    parser.add_argument("--split", default="test", help="of all data; choices are made on validation")
    parser.add_argument("--out", type=Path, default=Path("docs/sources.md"))
    options = parser.parse_args()
    photos, split, count = captioned(options.photos), options.split, options.samples
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in filter(None, options.parts.split(",")):
        names = (options.models if part == "questions" else options.photo_models).split(",")
        if part == "photographs":
            rows = [row for name in names for row in photographs(name, photos, split)]
            said = {"test": len(photos[split]), "train": len(photos["train"])}
        elif part == "questions":
            rows = [row for name in names for row in questions(name, split, count, options.calibration_samples)]
            said = {"test": count, "train": options.calibration_samples}
        else:
            rows = [row for name in names for row in cost(name, photos)]
            said = {"timed": TIMED, "rounds": ROUNDS, "threads": torch.get_num_threads()}
        kept[part] = {"said": said, "rows": rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    sections = [HEAD.strip()]
    for part, (text, head) in PARTS.items():
        if part in kept:
            sections += [text.format(**kept[part]["said"]), table(head, kept[part]["rows"])]
    options.out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def captioned(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Photographs with all their captions, by split, see `load_photos`."""
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = {Path(row["image"]).name: row["captions"] for row in map(json.loads, lines)}
    return {
        split: [{"image": s.id, "path": s.image, "captions": captions[s.id]} for s in samples]
        for split, samples in load_photos(folder).items()
    }


if __name__ == "__main__":
    main()
