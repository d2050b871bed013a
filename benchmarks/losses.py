"""What each loss gives, and weights in the loop of the backbone's training: an assembled checkpoint's adapter trained
further, in several ways, for the same steps on the same samples and corruptions.

    python benchmarks/losses.py blip2 --output_dir runs/losses [--steps 24] [--out docs/study/blip2-losses.md]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ablations import GROUPS, SAMPLES, Variant, conditions_of, measure, rows_of
from study import MODELS, read

from modeling_dms.training.arguments import read_arguments
from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.documents import table
from modeling_dms.training.loading import load
from modeling_dms.training.tasks import VisualQuestionAnswering
from modeling_dms.training.train import run_training


# as the last stage of the presets, which trained the adapters
TRAINING = """
--lora_rank 8 --lora_targets all --data easy-vqa,easy-vqa:caption --max_samples 8000 --calibration_samples 100
--image_rate 0.3 --text_rate 0.4 --both_rate 0.1 --image_families noise blank blur occlusion missing
--text_families word_drop random_words missing mismatch --held_out_text_families characters
--per_device_train_batch_size 16 --learning_rate 3e-4 --lr_scheduler_type cosine --warmup_steps 4 --logging_steps 5
--save_steps 20 --save_total_limit 1 --report_to none --use_cpu true --bf16 true --seed 0
"""
BRIDGE = {"llava": ["--train_bridge", "true"], "blip2": ["--save_bridge", "true"]}
LOSSES = ("mwc", "unimodal", "consistency", "schedule")
NONE = {f"lambda_{name}": 0.0 for name in LOSSES}
STATIC = ["--stage", "backbone", "--schedule_target", "none"]
JOINT = ["--stage", "joint", "--schedule_target", "severity", "--scheduler_warmup_ratio", "0.2"]
# by name: fields of DMSConfig, and options of `dms train`
WAYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LoRA alone, weights uniform": ({"scheduler": "uniform", **NONE}, STATIC),
    "LoRA alone, the rule's weights in the loop": ({"scheduler": "rule", **NONE}, STATIC),
    "LoRA and scheduler, all losses": ({"scheduler": "learned"}, JOINT),
    **{
        f"LoRA and scheduler, without {name}": ({"scheduler": "learned", f"lambda_{name}": 0.0}, JOINT)
        for name in LOSSES
    },
}


def train(model: str, way: str, steps: int, folder: Path) -> Path:
    """Trains an adapter further, unless it has been; the folder of what it became."""
    choices, options = WAYS[way]
    run = folder / f"{model}-{list(WAYS).index(way)}"
    if not (run / "run.json").exists():
        given = ["--model", MODELS[model], "--max_steps", str(steps), "--output_dir", str(run)]
        given += ["--dms", json.dumps(choices), *options, *BRIDGE[model]]
        run_training(read_arguments(None, [*TRAINING.split(), *given]), resume=True)
    return run / "final"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scan = read(f"{options.model}-scan")
    if scan is None:
        raise ValueError(f"run `python benchmarks/study.py --only {options.model}-scan` first")
    answers = sorted({sample.answers[0] for sample in load_easy_vqa("train")})
    conditions, rows = conditions_of(scan), []
    for way in WAYS:
        folder = train(options.model, way, options.steps, options.output_dir)
        # the static arm is weighed by the rule afterwards
        own = WAYS[way][0]["scheduler"]
        model, processor = load(folder, {"scheduler": "rule"} if own == "uniform" else None, dtype="bfloat16")
        variant = Variant("as it weighs", scheduler=model.eval().dms.scheduler)
        scores = measure(model, VisualQuestionAnswering(processor, answers), [variant], conditions)
        rows += [[way, *row] for row in rows_of(scores) if row[0] != "oracle"]
    named = ", ".join(f"{c.name} {c.severity}" for c in conditions[1:])
    text = "\n".join(
        [
            f"# {Path(MODELS[options.model]).name} trained further",
            "",
            f"Written by `python benchmarks/losses.py {options.model}`: {options.steps} steps of 16 samples each from",
            f"the released adapter. Accuracy on {SAMPLES} test images of easy-VQA, one question each; {named}.",
            "*static*: equal weights; behind the comma the share of the oracle gap closed, with a 95% interval. The",
            "first row's model is weighed by the rule afterwards.",
            "",
            table(["trained further", "weighed", *GROUPS], rows),
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
