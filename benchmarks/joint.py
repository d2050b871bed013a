"""Does joint training from scratch collapse onto one modality?

    python benchmarks/joint.py --output_dir runs/joint [--steps 1500] [--out benchmarks/joint.md]

The demo's LLaVA with its language model and projector set back to random weights, trained with the scheduler by
`dms train`: once with the schedule target and a warm-up at uniform weights (as the preset `lora` does it), once by the
task loss alone. Both see the same samples and corruptions.
"""

import argparse
from pathlib import Path

from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed

from modeling_dms.training.apps.demo import BATCH
from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.data.easy_vqa import ANSWERS
from modeling_dms.training.evaluate.grid import Condition, run_condition
from modeling_dms.training.evaluate.methods import Method, Scheduled
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.train import run_training
from modeling_dms.training.models.loading import CHECKPOINTS, load


TRAINING = """
--stage joint --lora_rank 0 --train_bridge true --data easy-vqa --calibration_samples 300 --calibration_steps 250
--image_rate 0.3 --text_rate 0.3 --both_rate 0.1 --image_families noise blank missing
--text_families random_words missing --held_out_image_families weather digital geometric color mismatch
--held_out_text_families characters mismatch --per_device_train_batch_size 64 --learning_rate 1e-3
--lr_scheduler_type cosine --warmup_steps 100 --weight_decay 0.05 --logging_steps 25 --save_steps 500
--save_total_limit 1 --report_to none --use_cpu true --feature_cache_gb 1 --seed 0
"""
WAYS = {
    "schedule target, warm-up": ["--dms", '{"scheduler": "learned", "lambda_schedule": 1.0}']
    + ["--schedule_target", "severity", "--scheduler_warmup_ratio", "0.2"],
    "task loss alone": ["--dms", '{"scheduler": "learned", "kappa": 0, "lambda_schedule": 0.0}']
    + ["--schedule_target", "none"],
}
CONDITIONS = ("clean", "image:noise", "image:black", "text:random_words", "text:missing")


def start(folder: Path, seed: int = 0) -> Path:
    """The demo's LLaVA, of which only the vision tower is trained."""
    set_seed(seed)
    static = LlavaForConditionalGeneration.from_pretrained(CHECKPOINTS / "demo-llava")
    fresh = LlavaForConditionalGeneration(static.config)
    fresh.model.vision_tower.load_state_dict(static.model.vision_tower.state_dict())
    fresh.save_pretrained(folder)
    AutoProcessor.from_pretrained(CHECKPOINTS / "demo-llava").save_pretrained(folder)
    return folder


def measure(checkpoint: Path, count: int = 200) -> list[str]:
    """Table rows: accuracy as scheduled and at uniform weights, and the mean weights, on validation images."""
    model, processor = load(str(checkpoint))
    task = VisualQuestionAnswering(processor, ANSWERS)
    samples = one_per_image(load_easy_vqa("validation"), count)
    rows = []
    for name in CONDITIONS:
        methods, condition = (Scheduled("own"), Method()), Condition(name, "", 5)
        own, uniform = run_condition(model.eval(), task, methods, samples, condition, 0, BATCH)
        mean = " / ".join(f"{value:.2f}" for value in own.weights.mean(0))
        rows.append(f"{name} | {own.mean():.3f} | {uniform.mean():.3f} | {mean}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--way", choices=WAYS, help="one of them alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "# Joint training from scratch",
        "",
        f"Written by `benchmarks/joint.py`: {options.steps} steps, validation images, corruptions at severity 5.",
        "",
        "| trained by | corrupted | accuracy | at uniform weights | weight image / context |",
        "|---|---|---|---|---|",
    ]
    first = start(options.output_dir / "start")
    for way, choices in WAYS.items():
        if options.way not in (None, way):
            continue
        run = options.output_dir / way.replace(" ", "-").replace(",", "")
        given = ["--model", str(first), "--max_steps", str(options.steps), "--output_dir", str(run)]
        run_training(read_arguments(None, [*TRAINING.split(), *given, *choices]), resume=True)
        lines += [f"| {way} | {row} |" for row in measure(run / "final")]
    text = "\n".join([*lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
