"""Trains static LLaVA and BLIP-2 that describe photographs.

    python benchmarks/static.py --photos PHOTOS --model llava-dinov2s-smollm2-135m --out runs/llava [--resume]
    python benchmarks/static.py --photos PHOTOS --model blip2-dinov2s-smollm2-135m --teacher runs/llava/final \\
        --epochs 4 --out runs/blip2

Vision tower and image features are frozen and encoded once, and all that is asked of a photograph is read at once
(`photographs.Reader`), so a step costs a third of what `dms train` takes. Some questions see a caption as their
context, some another photograph's, and some do not see the image.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from photographs import Reader, by_photograph, encoded, measured
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_dms.training.data import Sample, load_flickr8k
from modeling_dms.training.finetune.stages import prepare
from modeling_dms.training.models.loading import load


# photographs a step; views of each that are kept: itself, and random crops
BATCH, VIEWS = 8, 8
# how a question is asked: with the image alone, with image and context, with the context alone (the image is there
# and not seen), with another photograph's context
FORMS = {"image": 0.4, "both": 0.3, "context": 0.15, "wrong context": 0.15}
# of a photograph, in one epoch
QUESTIONS = 3
WARM_UP, NOISE = 60, 0.2
# steps of each beginning, and what a cosine counts as a logit
ALIGNED, IMITATED, SCALE = 300, 1500, 20.0


def align(reader: Reader, states: dict[Any, Tensor], captions: dict[Any, list[Sample]], rng: random.Random) -> None:
    """Teaches what makes image tokens alone to say, in the language model's own embeddings, which words the captions
    hold: the closest image token's 20 cos(token, word), softly, is the logit of a word."""
    said = {name: [reader.asked(s)[1].answers[0][:-1] for s in own] for name, own in captions.items()}
    counts = Counter(token for own in said.values() for token in {token for line in own for token in line})
    words = [token for token, count in counts.items() if count >= 3]
    place = {token: number for number, token in enumerate(words)}
    wanted = {name: torch.zeros(len(words)) for name in said}
    for name, own in said.items():
        for line in own:
            for token in {token for token in line if token in place}:
                wanted[name][place[token]] += 1 / len(own)
    share = torch.stack(list(wanted.values())).mean(0)
    embedded, size = F.normalize(reader.embed.weight[words].float(), dim=-1), reader.embed.weight.norm(dim=-1).mean()
    bridge = [p for n, p in reader.model.named_parameters() if p.requires_grad and "lora_" not in n]
    level = nn.Parameter((share / (1 - share)).clamp_max(99).log())
    optimizer = torch.optim.AdamW([{"params": bridge, "weight_decay": 0.1}, {"params": [level], "lr": 1e-2}], lr=3e-4)
    names = list(said)
    for _ in tqdm(range(ALIGNED), desc="aligning"):
        chosen = rng.sample(names, 4 * BATCH)
        tokens = reader.tokens(torch.stack([states[name][rng.randrange(VIEWS)] for name in chosen]).float())
        cosines = SCALE * F.normalize(tokens, dim=-1) @ embedded.T  # (B, N, words)
        logits = cosines.logsumexp(1) - torch.tensor(cosines.shape[1]).log()
        logits = logits - logits.detach().mean() + level
        target = torch.stack([wanted[name] for name in chosen])
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
        loss = loss + (tokens.norm(dim=-1) / size - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def imitate(
    reader: Reader, states: dict[Any, Tensor], teacher: Reader, samples: Sequence[Sample], rng: random.Random
) -> None:
    """Teaches a Q-Former to say what another model's projector says, of as many neighbouring image tokens as there are
    to a query. By itself, of a few hundred photographs, a Q-Former does not learn to look."""
    shown = encoded(teacher, samples, VIEWS)
    queries = reader.tokens(next(iter(states.values()))[:1].float()).shape[1]
    with torch.no_grad():
        wanted = {
            name: teacher.tokens(seen.float()).unflatten(1, (queries, -1)).mean(2).half()
            for name, seen in shown.items()
        }
    every = torch.stack(list(wanted.values())).float()
    spread = (every - every.mean((0, 1))).pow(2).mean()
    bridge = [p for n, p in reader.model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW(bridge, betas=(0.9, 0.98), weight_decay=0.05)
    names = list(states)
    for step in tqdm(range(IMITATED), desc="imitating"):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - step / IMITATED)
        chosen = [(rng.choice(names), rng.randrange(VIEWS)) for _ in range(4 * BATCH)]
        said = reader.tokens(torch.stack([states[name][view] for name, view in chosen]).float())
        target = torch.stack([wanted[name][view] for name, view in chosen]).float()
        loss = (said - target).pow(2).mean() / spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bridge, 1.0)
        optimizer.step()
    print(json.dumps({"imitated": loss.item()}), flush=True)


def adopt(model: Any, teacher: Any) -> None:
    """Takes over what another model's language model, the same one, has learned."""
    learned = {n[n.index(".layers.") :]: p for n, p in teacher.named_parameters() if "lora_" in n}
    scales = [of.peft_config["default"].lora_alpha / of.peft_config["default"].r for of in (teacher, model)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                part = learned[name[name.index(".layers.") :]]
                if "lora_A" in name:
                    parameter[: len(part)] = part
                else:
                    # of the rest, which is random in A, as before nothing
                    parameter[:, : part.shape[1]] = part * (scales[0] / scales[1])


def lesson(
    reader: Reader, captions: Sequence[Sample], asked: Sequence[Sample], rng: random.Random, others: Sequence[str]
):
    """What a photograph teaches in one epoch: its captions, and some questions in a form each."""
    described = [sample.answers[0] for sample in captions]
    _, first = reader.asked(captions[0].replace(context=None), described)
    row = [first]
    for sample in rng.sample(asked, min(QUESTIONS, len(asked))):
        form = rng.choices(list(FORMS), list(FORMS.values()))[0]
        context = {"image": None, "wrong context": rng.choice(others)}.get(form, rng.choice(described))
        row.append(reader.asked(sample.replace(context=context), sees=form != "context")[1])
    return row


def saved(model: Any, processor: Any, folder: Path) -> None:
    """An adapter with what `load` reads beside it."""
    model.save_pretrained(folder)
    model.get_base_model().config.save_pretrained(folder)
    processor.save_pretrained(folder)


def train(options: argparse.Namespace) -> None:
    """Trains LoRA on all linear layers of the language model, and the projector or Q-Former."""
    torch.manual_seed(options.seed)
    model, processor = load(options.model, {"scheduler": "rule"}, merge=False)
    trained_before = hasattr(model, "peft_config")
    if not trained_before:
        model = prepare(model, "backbone", options.rank, train_bridge=True, lora_targets="all")
    reader = Reader(model, processor)
    captions = by_photograph(load_flickr8k("train", "caption", options.photos))
    questions = by_photograph(load_flickr8k("train", "vqa", options.photos)) if not options.captions_only else {}
    said = [sample.answers[0] for own in captions.values() for sample in own]
    prefix, _ = reader.asked(next(iter(captions.values()))[0].replace(context=None))
    states = encoded(reader, [own[0] for own in captions.values()], VIEWS)
    bridge = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    lora = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    groups = [{"params": lora, "lr": options.lr}, {"params": bridge, "lr": 2 * options.lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    rates = [group["lr"] for group in optimizer.param_groups]
    photographs, steps = list(captions), len(captions) // BATCH
    total, checkpoint = steps * options.epochs, options.out / "checkpoint.pt"
    start, log = 0, []
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"], strict=False)
        optimizer.load_state_dict(kept["optimizer"])
        start, log = kept["epoch"], kept["log"]
    elif options.teacher is not None:
        teacher, of_teacher = load(options.teacher, {"scheduler": "rule"}, merge=False)
        firsts = [own[0] for own in captions.values()]
        imitate(reader, states, Reader(teacher.eval(), of_teacher), firsts, random.Random(options.seed))
        adopt(model, teacher)
    elif not trained_before:
        align(reader, states, captions, random.Random(options.seed))
    model.train()
    began = time.time()
    for epoch in range(start, options.epochs):
        rng, losses = random.Random(f"{options.seed}-{epoch}"), []
        order = rng.sample(photographs, len(photographs))
        for step in tqdm(range(steps), desc=f"epoch {epoch + 1} of {options.epochs}"):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            rows = [lesson(reader, captions[name], questions.get(name, []), rng, said) for name in chosen]
            image = torch.stack([states[name][rng.randrange(VIEWS)] for name in chosen]).float()
            image = image + NOISE * image.std() * torch.randn(image.shape)
            done = epoch * steps + step
            slope = min(1, (done + 1) / WARM_UP) * (
                0.02 + 0.98 * (1 + torch.tensor(done / total * torch.pi).cos()) / 2
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * float(slope)
            answers = [one for line in reader.log_likelihoods(image, prefix, rows) for one in line]
            loss = -torch.cat(answers).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*lora, *bridge], 1.0)
            optimizer.step()
            losses.append(loss.item())
        log.append({"epoch": epoch + 1, "loss": sum(losses) / len(losses), "seconds": round(time.time() - began)})
        if (epoch + 1) % options.measure_every == 0:
            model.eval()
            log[-1] |= measured(reader, options.photos, "validation", options.measured).figures()
            model.train()
        print(json.dumps(log[-1]), flush=True)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save({"model": trained, "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "log": log}, checkpoint)
    saved(model, processor, options.out / "final")
    (options.out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of Flickr8k's files")
    parser.add_argument("--measured", type=int, help="the first photographs of the validation split alone")
    parser.add_argument("--model", default="llava-dinov2s-smollm2-135m", help="what is trained, or trained further")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", help="a trained model whose image tokens are imitated first")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions-only", action="store_true")
    parser.add_argument("--measure-every", type=int, default=2, help="epochs; on the validation split")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
