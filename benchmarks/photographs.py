"""What static LLaVA and BLIP-2 make of photographs: whether they describe them, and what they answer about them.

    python benchmarks/photographs.py --photos PHOTOS --models runs/llava/final,... [--out docs/photographs.md]

A photograph's image tokens are read once for all that is asked of it: its captions and questions stand side by side in
one row, under a mask by which they do not see each other (as in packing; the positions of each go on from the image).
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_dms.evidence.typicality import auroc
from modeling_dms.observe.prompt import VISION
from modeling_dms.training.data import PromptCollator, Sample, load_flickr8k
from modeling_dms.training.data.flickr8k import ANIMALS, COUNTED, PLACES, THINGS, told_by_context
from modeling_dms.training.data.samples import SPLITS
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.models.loading import load


# random crops of a photograph have this share of its area, and half are mirrored
AREA = (0.6, 1.0)
# other photographs' captions that one is told from
OTHERS, RESAMPLED = 20, 1000

FIGURES = ("captions", "things", "things, blind", "things, caption", "rest", "rest, blind", "rest, caption")
PAGE = """# What the static models make of photographs

Written by `python benchmarks/photographs.py` from the photographs of the {split} split of Flickr8k, which nothing
was trained on or chosen by. Flickr8k is for research; its photographs belong to their photographers, and none is
shown here.

## What is asked

Questions on which at least three of a photograph's five captions agree and none says otherwise; a thing is asked for
as often where it is not as where it is. One caption is the context. *Told*: the share of questions whose answer that
caption names; that a thing is not there it never names.

{asked}

## What is answered

*Captions*: the AUROC by which the likelihood of a caption tells its own photograph from {others} others', where what
counts is by how much the image makes the caption likelier than no image does. *Things*: the share of right answers
to whether a thing is there, from the image alone; *blind*: without seeing it; *caption*: from the context alone.
*Rest*: which animal, where, how many people. The likeliest of all answers of a kind counts. With 95% intervals,
bootstrapped over the photographs."""


@dataclass
class Asked:
    """A prompt behind the image, and what may follow it.

    Attributes:
        prompt: ids.
        answers: ids each, with the end token.
        sees: whether the image tokens are seen.
    """

    prompt: list[int]
    answers: list[list[int]]
    sees: bool = True


class Reader:
    """A model's parts, on their own: what encodes images, makes image tokens of that, and reads them with text."""

    def __init__(self, model: Any, processor: Any):
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.model, self.base, self.collate = model, base, PromptCollator(processor, with_labels=True)
        self.processor, self.llava = processor, hasattr(base.config, "vision_feature_layer")
        inner = base.model if self.llava else base
        self.decoder = inner.language_model if self.llava else inner.language_model.model
        self.head = base.lm_head if self.llava else inner.language_model.lm_head
        self.inner, self.embed = inner, base.get_input_embeddings()
        self._known: dict[Any, tuple[list[int], Asked]] = {}

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """What the frozen tower says: (n, N, D)."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        if self.llava:
            states = self.inner.vision_tower(pixels, output_hidden_states=True).hidden_states
            return states[self.base.config.vision_feature_layer][:, 1:]
        return self.inner.vision_model(pixels).last_hidden_state

    def tokens(self, states: Tensor) -> Tensor:
        """Image tokens (n, N, D) as the language model reads them."""
        if self.llava:
            return self.inner.multi_modal_projector(states)
        queries = self.inner.query_tokens.expand(len(states), -1, -1)
        seen = self.inner.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
        return self.inner.language_projection(seen)

    def asked(self, sample: Sample, answers: Sequence[str] = (), sees: bool = True) -> tuple[list[int], Asked]:
        """The ids up to the image, and what follows; the answers are the sample's first one, or those given."""
        answers = tuple(answers or sample.answers[:1])
        key = sample.context, sample.question, answers, sees
        if key in self._known:
            return self._known[key]
        blank = sample.replace(image=Image.new("RGB", (32, 32)))
        found = []
        for answer in answers:
            batch = self.collate([blank.replace(answers=(answer,))])
            ids, modalities = batch["input_ids"][0].tolist(), batch["modality_ids"][0].tolist()
            first = len(modalities) - modalities[::-1].index(VISION)
            start = int((batch["labels"][0] != -100).int().argmax())
            found.append((ids[:first], ids[first:start], ids[start:]))
        self._known[key] = found[0][0], Asked(found[0][1], [answer for _, _, answer in found], sees)
        return self._known[key]

    def log_likelihoods(
        self, states: Tensor, prefix: list[int], rows: Sequence[Sequence[Asked]]
    ) -> list[list[Tensor]]:
        """Log-likelihoods of the tokens of each answer to each of a row's prompts, one row a photograph, its answers
        one after the other.

        Args:
            states: (B, N, D), see `encode`.
            prefix: ids up to the image and its tokens.
        """
        start, image = len(prefix), torch.tensor(prefix) == self.base.config.image_token_id
        lines = [[token for asked in row for part in (asked.prompt, *asked.answers) for token in part] for row in rows]
        length = start + max(map(len, lines))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        ids[:, :start] = torch.tensor(prefix)
        # of each position: its place, prompt, and answer, 0 for what all see
        place, prompt, answer, blind = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(4))
        place[:, :start] = torch.arange(start)
        prompt[:, start:] = -1
        read, written, whose = [], [], []  # (row, position), the token that follows, (row, answer)
        for row, line in enumerate(rows):
            ids[row, start : start + len(lines[row])] = torch.tensor(lines[row])
            at, answers = start, 0
            for number, asked in enumerate(line, 1):
                last = at + len(asked.prompt) - 1
                for kind, part in enumerate((asked.prompt, *asked.answers)):
                    own = slice(at, at + len(part))
                    prompt[row, own], answer[row, own], blind[row, own] = number, kind, int(not asked.sees)
                    place[row, own] = start + torch.arange(len(part)) + (len(asked.prompt) if kind else 0)
                    if kind:
                        read += [(row, last), *((row, position) for position in range(at, at + len(part) - 1))]
                        written += part
                        whose += [(row, answers)] * len(part)
                        answers += 1
                    at += len(part)
        of_image = F.pad(image, (0, length - start))
        keys, queries = (prompt[:, None], answer[:, None], of_image), (prompt[..., None], answer[..., None])
        common = (keys[0] == 0) & ~(blind[..., None].bool() & keys[2])
        seen = common | ((keys[0] == queries[0]) & ((keys[1] == 0) | (keys[1] == queries[1])))
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
        embeddings = self.embed(ids)
        embeddings[:, :start][:, image] = self.tokens(states).to(embeddings.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.decoder(
                inputs_embeds=embeddings, attention_mask=seen[:, None], position_ids=place, use_cache=False
            ).last_hidden_state
            at_rows, positions = torch.tensor(read).T
            logits = self.head(hidden[at_rows, positions])
        found = -F.cross_entropy(logits.float(), torch.tensor(written), reduction="none")
        counts = [len(part) for line in rows for asked in line for part in asked.answers]
        parts = iter(found.split(counts))
        return [[next(parts) for asked in line for _ in asked.answers] for line in rows]


def views(image: Image.Image, count: int, rng: random.Random) -> Iterator[Image.Image]:
    """The image, and random crops of it, half of them mirrored."""
    yield image
    for _ in range(count - 1):
        side = rng.uniform(*AREA) ** 0.5
        width, height = image.width * side, image.height * side
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        crop = image.crop((round(left), round(top), round(left + width), round(top + height)))
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def encoded(reader: Reader, samples: Sequence[Sample], count: int) -> dict[Any, Tensor]:
    """Views (V, N, D), in half precision, of each of the samples' photographs."""
    rng, found = random.Random(0), {}
    for sample in tqdm({sample.image: sample for sample in samples}.values(), desc="encoding photographs"):
        image = sample.load_image()
        assert image is not None
        found[sample.image] = reader.encode(list(views(image, count, rng))).half()
    return found


def by_photograph(samples: Sequence[Sample]) -> dict[Any, list[Sample]]:
    """The samples of each photograph."""
    found: dict[Any, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.image, []).append(sample)
    return found


@dataclass
class Measured:
    """What likelihoods tell, of n photographs.

    Attributes:
        gains: (n, 1 + `OTHERS`), by how much an image makes its own caption, and those of others, likelier than no
            image does: means over the captions' tokens.
        right: by name of questions, of each question the photograph's number and whether it is answered rightly.
    """

    gains: Tensor
    right: dict[str, list[tuple[int, bool]]]

    def figures(self, drawn: Sequence[int] | None = None) -> dict[str, float]:
        """The AUROC of own captions against others', and accuracies; of photographs that were drawn, if any were."""
        counts = Counter(range(len(self.gains)) if drawn is None else drawn)
        gains = self.gains[sorted(counts.elements())]
        found = {"captions": auroc(gains[:, 1:].flatten(), gains[:, 0])}
        for name, hits in self.right.items():
            total = sum(counts[place] for place, _ in hits)
            found[name] = sum(counts[place] * hit for place, hit in hits) / max(1, total)
        return found

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95%, bootstrapped over the photographs."""
        rng, count = random.Random(0), len(self.gains)
        drawn = [self.figures(rng.choices(range(count), k=count)) for _ in range(RESAMPLED)]
        edges = torch.tensor([0.025, 0.975])
        values = {name: torch.tensor([one[name] for one in drawn]).quantile(edges) for name in drawn[0]}
        return {name: (float(low), float(high)) for name, (low, high) in values.items()}


@torch.no_grad()
def measured(reader: Reader, photos: Path, split: str, limit: int | None = None) -> Measured:
    """How well likelihoods tell a caption's photograph from others, and which questions are answered rightly: whether
    a thing is there (`things`), and all others (`rest`), from the image alone, without seeing it (`, blind`), and from
    a caption alone (`, caption`)."""
    captions = load_flickr8k(split, "caption", photos)[:limit]
    asked = by_photograph(load_flickr8k(split, "vqa", photos))
    prefix, _ = reader.asked(captions[0].replace(context=None))
    states = encoded(reader, captions, 1)
    gains: list[Tensor] = []
    right: dict[str, list[tuple[int, bool]]] = {}
    for place, sample in enumerate(tqdm(captions, desc="measuring")):
        image = states[sample.image].float()
        near = [captions[(place + step) % len(captions)] for step in range(min(OTHERS + 1, len(captions)))]
        texts = [one.answers[0] for one in near]
        forms = [reader.asked(sample.replace(context=None), texts, sees)[1] for sees in (True, False)]
        scores = torch.stack([one.mean() for one in reader.log_likelihoods(image, prefix, [forms])[0]])
        gains.append(scores[: len(texts)] - scores[len(texts) :])
        for question in asked.get(sample.image, []):
            kind = question.id.rpartition("-")[2]
            choices = {"animal": list(ANIMALS), "place": list(PLACES), "people": list(COUNTED.values())}.get(kind)
            answers, alone = choices or ["yes", "no"], question.replace(context=None)
            forms = [
                reader.asked(one, answers, sees)[1] for one, sees in ((alone, True), (alone, False), (question, False))
            ]
            sums = torch.stack([one.sum() for one in reader.log_likelihoods(image, prefix, [forms])[0]])
            for name, values in zip(("", ", blind", ", caption"), sums.split(len(answers)), strict=True):
                hit = answers[int(values.argmax())] == question.answers[0]
                right.setdefault(("rest" if choices else "things") + name, []).append((place, hit))
    return Measured(torch.stack(gains), right)


def asked_table(photos: Path) -> str:
    """How many questions there are, and how many of their contexts tell the answer."""
    rows = []
    asked = {
        "is there a ...?": [*THINGS],
        "which animal": ["animal"],
        "where": ["place"],
        "how many people": ["people"],
    }
    for name, kinds in asked.items():
        cells = []
        for split in SPLITS:
            samples = [s for s in load_flickr8k(split, "vqa", photos) if s.id.rpartition("-")[2] in kinds]
            told = sum(map(told_by_context, samples)) / max(1, len(samples))
            cells += [str(len(samples)), f"{told:.2f}"]
        rows.append([name, *cells])
    return table(("question", *(name for split in SPLITS for name in (split, "told"))), rows)


def measure(options: argparse.Namespace) -> None:
    """Writes the page."""
    rows = []
    for name in options.models.split(","):
        model, processor = load(name)
        found = measured(Reader(model.eval(), processor), options.photos, options.split, options.measured)
        figures, edges = found.figures(), found.intervals()
        cells = [f"{figures[k]:.2f} [{edges[k][0]:.2f}, {edges[k][1]:.2f}]" for k in FIGURES]
        log = Path(name).parent / "log.json"
        epochs = str(len(json.loads(log.read_text(encoding="utf-8")))) if log.exists() else ""
        rows.append([Path(name).parent.name if log.exists() else name, epochs, *cells])
    page = PAGE.format(split=options.split, others=OTHERS, asked=asked_table(options.photos))
    page += "\n\n" + table(("model", "epochs", *FIGURES), rows) + "\n"
    options.out.write_text(page, encoding="utf-8")
    print(f"wrote {options.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of Flickr8k's files")
    parser.add_argument("--models", required=True, help="folders, separated by commas")
    parser.add_argument("--split", default="test", help="choices are made on validation")
    parser.add_argument("--measured", type=int, help="the first photographs of the split alone")
    parser.add_argument("--out", type=Path, default=Path("docs/photographs.md"))
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
