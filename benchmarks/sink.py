"""The attention sink of an assembled checkpoint: how much attention it holds, and what weighing it down with the image
costs.

    python benchmarks/sink.py llava [--out docs/study/llava-sink.md]

On validation images, under the corruptions that benchmarks/study.py chose.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablations import BATCH, SAMPLES, SEED, Variant, loaded, named, parser_of, scan_of, write
from study import MODELS, chosen
from tqdm.auto import tqdm

from modeling_dms.observe.prompt import TEXT, VISION
from modeling_dms.training.data import Sample, load_easy_vqa
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.evaluate.grid import Condition, with_images_encoded
from modeling_dms.training.evaluate.methods import Fixed, Method
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering


WEIGHTS = (0.5, 0.1, 0.05, 0.01, 0.001, 0.0001)
ARMS = {"spared": Variant("spared"), "weighed": Variant("weighed", spares_sink=False)}


@torch.no_grad()
def attention_of(model: Any, task: VisualQuestionAnswering, samples: list[Sample]) -> np.ndarray:
    """A prompt's last token's attention to the image's first token, its other tokens, the text, and neutral tokens:
    (4,), the mean over layers, heads and samples, at equal weights. They sum to 1."""
    before, rows = model.config.get_text_config(decoder=True)._attn_implementation, []
    model.set_attn_implementation("eager")
    for sample in tqdm(samples, desc="attention", unit=""):
        batch = task.collate([sample])
        names = ("input_ids", "attention_mask", "pixel_values", "modality_ids")
        out = model(
            **{name: batch[name] for name in names},
            modality_weights=Method().decide(model, batch),
            output_attentions=True,
        )
        attentions = out.attentions if "attentions" in out else out.language_model_outputs.attentions
        last = torch.stack([layer[0, :, -1].float() for layer in attentions]).mean((0, 1))  # (L,)
        ids = batch["modality_ids"][0]
        first, image = last[int((ids == VISION).int().argmax())], last[ids == VISION].sum()
        rows.append([float(part) for part in (first, image - first, last[ids == TEXT].sum(), last[ids == 0].sum())])
    model.set_attn_implementation(before)
    return np.mean(rows, axis=0)


@torch.no_grad()
def accuracy_of(
    model: Any, task: VisualQuestionAnswering, samples: list[Sample], conditions: list[Condition]
) -> dict[str, list[float]]:
    """By arm, the mean accuracy under the conditions for each of `WEIGHTS` of the image."""
    found: dict[str, list[list[np.ndarray]]] = {arm: [[] for _ in WEIGHTS] for arm in ARMS}
    for condition in tqdm(conditions, desc="conditions", unit=""):
        damaged, _ = condition.apply(samples, SEED)
        for start in range(0, len(damaged), BATCH):
            asked = damaged[start : start + BATCH]
            batch = with_images_encoded(model, task.collate(asked))
            for arm, variant in ARMS.items():
                for place, weight in enumerate(WEIGHTS):
                    method = Fixed(vision=weight)
                    with variant.applied(model):
                        answers = task.answer(method, model, batch, method.decide(model, batch))
                    found[arm][place].append(task.scores(answers, asked)["score"])
    return {arm: [float(np.concatenate(scores).mean()) for scores in own] for arm, own in found.items()}


def main() -> None:
    options = parser_of(__doc__).parse_args()
    conditions = [Condition(name, "", 5) for name in chosen(scan_of(options.model))["image"]]
    model, task = loaded(MODELS[options.model])
    samples = one_per_image(load_easy_vqa("validation"), SAMPLES, SEED)
    attention = attention_of(model, task, samples[:BATCH])
    accuracy = accuracy_of(model, task, samples, conditions)
    alone = accuracy_of(model, task, samples, [Condition("image:missing", "", 5)])["spared"][0]
    lines = [
        f"# The attention sink of {Path(MODELS[options.model]).name}",
        "",
        f"Written by `python benchmarks/sink.py {options.model}`. Where the last token of a prompt looks, mean",
        f"over layers, heads and {BATCH} clean validation images of easy-VQA:",
        "",
        table(
            ["the image's first token", "its others", "context", "question and template"],
            [[f"{part:.2f}" for part in attention]],
        ),
        "",
        "Accuracy where the image has a given weight, its first token spared as fusion does, or weighed with the",
        f"rest; {SAMPLES} validation images, one question each; {named(conditions)}.",
        f"Without the images: {alone:.3f}.",
        "",
        table(
            ["image weight", *(f"{weight:g}" for weight in WEIGHTS)],
            [[arm, *(f"{value:.3f}" for value in values)] for arm, values in accuracy.items()],
        ),
        "",
    ]
    write("\n".join(lines), options.out)


if __name__ == "__main__":
    main()
