"""What the defaults of the rule were chosen by: the demo's models on validation images, one choice changed at a time.

    python benchmarks/choices.py [--out benchmarks/choices.md]

The models have not seen the validation images; the demo's test images play no part.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from modeling_dms import DMSConfig
from modeling_dms.training.apps.demo import (
    CONDITIONS,
    ORACLES,
    STATIC,
    batches_of,
    corrupted,
    load_demo_model,
    one_per_image,
)
from modeling_dms.training.apps.evaluation import answer_tokens, predict
from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.evaluate.metrics.robust import oracle_gap_closed


CHOICES = (
    {},
    {"weight_floor": 0.02},
    {"weight_floor": 0.05},
    {"kappa": 4},
    {"kappa": 8},
    {"arbitration_rate": 0.01},
    {"arbitration_rate": 0.1},
    {"arbitration_rate": 0.3},
)
GROUPS = ("unseen image", "unseen text", "conflict")


def measure(backbone: str) -> list[str]:
    """Rows of the table: clean accuracy and the oracle gap closed, for every choice."""
    held_out = load_easy_vqa("validation")
    # half of the open questions, and as many of the easier yes/no ones
    held_out = [s for i, s in enumerate(held_out) if i % (2 if s.answers[0] not in ("yes", "no") else 5) == 0]
    clean = one_per_image(load_easy_vqa("train"), 300)
    model, collator = load_demo_model(backbone)
    conditions = [condition for condition in CONDITIONS if condition.group in ("clean", *GROUPS)]
    config, wanted = model.config.dms_config, answer_tokens(collator, held_out)
    batches = {c.name: batches_of(collator, corrupted(held_out, c)) for c in conditions}
    fixed = {}
    for condition in tqdm(conditions, desc=f"{backbone}: static and oracle", unit=""):
        lows = [(low, 1 - low) if condition.modality == 0 else (1 - low, low) for low in ORACLES]
        scores = [p.correct(wanted) for p in predict(model, batches[condition.name], [STATIC, *lows])]
        fixed[condition.name] = scores[0], max(scores[1:], key=np.mean)
    rows, defaults = [], DMSConfig()
    for choice in tqdm(CHOICES, desc=f"{backbone}: choices", unit=""):
        for name in ("weight_floor", "kappa", "arbitration_rate"):
            setattr(config, name, choice.get(name, getattr(defaults, name)))
        model.calibrate(batches_of(collator, clean), show_progress=False)
        dms = {name: predict(model, batch, [None])[0].correct(wanted) for name, batch in batches.items()}
        values = [f"{dms['clean'].mean():.3f} ({fixed['clean'][0].mean():.3f})"]
        for group in GROUPS:
            names = [c.name for c in conditions if c.group == group]
            static, oracle = (np.stack([fixed[name][i] for name in names]) for i in (0, 1))
            steered = np.stack([dms[name] for name in names])
            closed = oracle_gap_closed(static, steered, oracle)
            gap = "no gap" if np.isnan(closed) else f"{closed:.2f}"
            values.append(f"{gap} ({steered.mean() - static.mean():+.3f})")
        changed = ", ".join(f"`{name}={value}`" for name, value in choice.items()) or "the defaults"
        rows.append(f"| {backbone} | {changed} | {' | '.join(values)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    head = (
        "| backbone | `arbitration_rate` | `weight_floor` | clean (static) | unseen image | unseen text | conflict |"
    )
    lines = [head, "|---|---|---|---|---|---|---|", *measure("llava"), *measure("blip2")]
    text = (
        "# Choices\n\nWritten by `benchmarks/choices.py`: oracle gap closed (points gained over static) on validation "
        "images, by group of the demo's conditions.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
