"""Batched evaluation against one sample at a time: samples per second of static and rule, measured in turns.

python benchmarks/throughput.py [--samples 100] [--out benchmarks/throughput.md]
"""

import argparse
import time
from pathlib import Path

from tqdm.auto import tqdm

from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.evaluate.grid import Condition, run_condition
from modeling_dms.training.evaluate.methods import Method, Scheduled
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


BATCHES = (1, 50)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    train = load_easy_vqa("train")
    samples = one_per_image(load_easy_vqa("test"), options.samples, 0)
    answers = sorted({sample.answers[0] for sample in train})
    lines = [
        "# Throughput of evaluation",
        "",
        f"Written by `benchmarks/throughput.py`: {len(samples)} samples, fastest of {ROUNDS} rounds in turns,",
        "preparing the batches included.",
        "",
        f"| model | method | {' | '.join(f'batch {size}, samples/s' for size in BATCHES)} | ratio |",
        "|---|---|---|---|---|",
    ]
    for name in ("demo-llava", "demo-blip2"):
        model, processor = load(name)
        calibrate(model.eval(), PromptCollator(processor), train, 300, show_progress=False)
        task = VisualQuestionAnswering(processor, answers)
        for method in (Method(), Scheduled("rule")):
            rates = dict.fromkeys(BATCHES, 0.0)
            for _ in tqdm(range(ROUNDS), desc=f"{name}, {method.name}", unit=" rounds"):
                for size in BATCHES:
                    began = time.perf_counter()
                    run_condition(model, task, [method], samples, Condition("clean", "clean"), 0, size)
                    rates[size] = max(rates[size], len(samples) / (time.perf_counter() - began))
            shown = " | ".join(f"{rates[size]:.0f}" for size in BATCHES)
            lines.append(f"| {name} | {method.name} | {shown} | {rates[BATCHES[-1]] / rates[1]:.1f} |")
    text = "\n".join([*lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
