"""What each loss gives, and weights in the loop of the backbone's training: an assembled checkpoint's adapter trained
further, in several ways, for the same steps on the same samples and corruptions.

    python benchmarks/losses.py blip2 --output_dir runs/losses [--steps 300] [--out docs/study/blip2-losses.md]

The learned scheduler begins with equal weights and hears nothing of the rule (`kappa` 0): what the losses do not teach
it, it does not know.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablations import (
    BATCH,
    GROUPS,
    SAMPLES,
    SEED,
    Variant,
    conditions_of,
    loaded,
    measure,
    named,
    parser_of,
    rows_of,
    scan_of,
    write,
)
from study import MODELS

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.evaluate.grid import Condition, with_images_encoded
from modeling_dms.training.evaluate.methods import Scheduled
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.train import run_training


# as the last stage of the presets, which trained the adapters, but in smaller batches and larger steps
TRAINING = """
--lora_rank 8 --lora_targets all --data easy-vqa,easy-vqa:caption --max_samples 8000 --calibration_samples 100
--image_rate 0.3 --text_rate 0.4 --both_rate 0.1 --image_families noise blank blur occlusion missing
--text_families word_drop random_words missing mismatch --held_out_text_families characters
--per_device_train_batch_size 4 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 4 --logging_steps 5
--save_steps 40 --save_total_limit 1 --report_to none --use_cpu true --bf16 true --seed 0
"""
BRIDGE = {"llava": ["--train_bridge", "true"], "blip2": ["--save_bridge", "true"]}
LOSSES = ("mwc", "unimodal", "consistency", "schedule")
NONE = {f"lambda_{name}": 0.0 for name in LOSSES}
# the released checkpoints' own are 0: they were trained without DMS
ALL = {name: getattr(DMSConfig(), name) for name in NONE}
STATIC = ["--stage", "backbone", "--schedule_target", "none"]
LEARNED = {"scheduler": "learned", "kappa": 0.0, **ALL}
JOINT = ["--stage", "joint", "--schedule_target", "severity", "--scheduler_warmup_ratio", "0.2"]
# as the preset `demo-scheduler`: from equal weights there is much to learn
JOINT += ["--scheduler_learning_rate", "4e-3"]
# by name: fields of DMSConfig, and options of `dms train`
WAYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LoRA alone, weights uniform": ({"scheduler": "uniform", **NONE}, STATIC),
    "LoRA alone, the rule's weights in the loop": ({"scheduler": "rule", **NONE}, STATIC),
    "LoRA and scheduler, all losses": (LEARNED, JOINT),
    **{
        f"LoRA and scheduler, without {name}": (
            {**LEARNED, f"lambda_{name}": 0.0},
            JOINT if name != "schedule" else [*JOINT, "--schedule_target", "none"],
        )
        for name in LOSSES
    },
}


def train(model: str, way: str, steps: int, folder: Path) -> Path:
    """Trains an adapter further, unless it has been; the folder of what it became."""
    choices, options = WAYS[way]
    given = ["--model", MODELS[model], "--max_steps", str(steps), "--dms", json.dumps(choices), *options]
    given = [*TRAINING.split(), *given, *BRIDGE[model]]
    # one that was trained otherwise is another
    run = folder / f"{model}-{hashlib.sha256(repr(given).encode()).hexdigest()[:12]}"
    if not (run / "run.json").exists():
        run_training(read_arguments(None, [*given, "--output_dir", str(run)]), resume=True)
    return run / "final"


@torch.no_grad()
def image_weights(model: Any, task: VisualQuestionAnswering, conditions: list[Condition]) -> list[str]:
    """The mean weight of the image, by group of conditions."""
    samples = one_per_image(load_easy_vqa("test"), SAMPLES, SEED)
    found: dict[str, list[np.ndarray]] = {group: [] for group in GROUPS}
    for condition in conditions:
        damaged, _ = condition.apply(samples, SEED)
        for start in range(0, len(damaged), BATCH):
            batch = with_images_encoded(model, task.collate(damaged[start : start + BATCH]))
            found[condition.group].append(Scheduled().decide(model, batch)[:, 0].float().numpy())
    return [f"{np.concatenate(weights).mean():.2f}" if weights else "-" for weights in found.values()]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="What is trained goes here.")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    conditions = [condition for condition in conditions_of(scan_of(options.model)) if condition.severity != 3]
    rows, weights = [], []
    for way in WAYS:
        folder = train(options.model, way, options.steps, options.output_dir)
        # the static arm is weighed by the rule afterwards
        own = WAYS[way][0]["scheduler"]
        model, task = loaded(folder, {"scheduler": "rule"} if own == "uniform" else None)
        variant = Variant("as it weighs", scheduler=model.dms.scheduler)
        scores = measure(model, task, [variant], conditions)
        rows += [[way, *row] for row in rows_of(scores) if row[0] != "oracle"]
        weights.append([way, *image_weights(model, task, conditions)])
    lines = [
        f"# {Path(MODELS[options.model]).name} trained further",
        "",
        f"Written by `python benchmarks/losses.py {options.model}`: {options.steps} steps of 4 samples each from",
        "the released adapter, the learned scheduler from equal weights (`kappa` 0). Accuracy on",
        f"{SAMPLES} test images of easy-VQA, one question each; {named(conditions)}.",
        "*static*: equal weights; behind the comma the share of the oracle gap closed, with a 95% interval. The",
        "first row's model is weighed by the rule afterwards.",
        "",
        table(["trained further", "weighed", *GROUPS], rows),
        "",
        "Mean weight of the image:",
        "",
        table(["trained further", *GROUPS], weights),
        "",
    ]
    write("\n".join(lines), options.out)


if __name__ == "__main__":
    main()
