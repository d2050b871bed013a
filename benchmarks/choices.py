"""What the defaults of the rule were chosen by: the demo's models on validation images, one choice changed at a time.

    python benchmarks/choices.py [--out benchmarks/choices.md]

The models have not seen the validation images; the demo's test images play no part.
"""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from modeling_dms import DMSConfig
from modeling_dms.training.apps.demo import BATCH, CONDITIONS
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.data.easy_vqa import ANSWERS
from modeling_dms.training.evaluate.grid import ORACLE, Cell, run_condition
from modeling_dms.training.evaluate.methods import Method, Scheduled
from modeling_dms.training.evaluate.report import summarize
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


CHOICES = (
    {},
    {"weight_floor": 0.02},
    {"weight_floor": 0.05},
    {"kappa": 4},
    {"kappa": 8},
    {"false_alarm_rate": 0.002},
    {"false_alarm_rate": 0.05},
)
GROUPS = ("unseen image", "unseen text", "conflict")


def measure(backbone: str) -> list[str]:
    """Rows of the table: clean accuracy and the oracle gap closed, for every choice."""
    held_out = load_easy_vqa("validation")
    # half of the open questions, and as many of the easier yes/no ones
    held_out = [s for i, s in enumerate(held_out) if i % (2 if s.answers[0] not in ("yes", "no") else 5) == 0]
    model, processor = load(f"demo-{backbone}")
    task, config, defaults = VisualQuestionAnswering(processor, ANSWERS), model.config.dms_config, DMSConfig()
    conditions = [condition for condition in CONDITIONS if condition.group in ("clean", *GROUPS)]

    def answered(*methods: Method) -> list[Cell]:
        found = [run_condition(model, task, methods, held_out, condition, 0, BATCH) for condition in conditions]
        return [cell for cells in found for cell in cells]

    fixed, rows = answered(Method(), Method(ORACLE)), []
    # none of the choices changes what the rule reads of it
    calibrate(model, PromptCollator(processor), load_easy_vqa("train"), 300, show_progress=False)
    for choice in tqdm(CHOICES, desc=f"{backbone}: choices", unit=""):
        for name in {name for some in CHOICES for name in some}:
            setattr(config, name, choice.get(name, getattr(defaults, name)))
        groups = summarize([*fixed, *answered(Scheduled())])["groups"]
        found = {row["group"]: row for row in groups if row["method"] == "rule"}
        clean = found["clean"]["score"]
        values = [f"{clean:.3f} ({clean - found['clean']['minus_static'][0]:.3f})"]
        for group in GROUPS:
            closed, gained = found[group]["gap_closed"], found[group]["minus_static"][0]
            values.append(f"{'no gap' if closed is None else f'{closed[0]:.2f}'} ({gained:+.3f})")
        changed = ", ".join(f"`{name}={value}`" for name, value in choice.items()) or "the defaults"
        rows.append(f"| {backbone} | {changed} | {' | '.join(values)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    head = "| backbone | changed | clean (static) | unseen image | unseen text | conflict |"
    lines = [head, "|---|---|---|---|---|---|", *measure("llava"), *measure("blip2")]
    text = (
        "# Choices\n\nWritten by `benchmarks/choices.py`: oracle gap closed (points gained over static) on validation "
        "images, by group of the demo's conditions.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
