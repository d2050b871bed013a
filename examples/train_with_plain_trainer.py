"""Trains the scheduler of a DMS model with transformers' own `Trainer`, on the frozen backbone.

    python examples/train_with_plain_trainer.py

Swap `load("demo-llava")` for `DMSLlavaForConditionalGeneration.from_pretrained(...)` and `load_samples` for your data.
"""

from transformers import Trainer, TrainingArguments

from modeling_dms.training.corruptions import CorruptionConfig, EpochCallback, ModalityDropout
from modeling_dms.training.data import PromptCollator, load_samples
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


model, processor = load("demo-llava", {"scheduler": "learned"})
samples = load_samples("easy-vqa", "train")

# clean statistics first: without them the scheduler has nothing to go by
print(calibrate(model, PromptCollator(processor), samples, 300))

# the scheduler alone
model.requires_grad_(False)
model.dms.requires_grad_(True)

families = CorruptionConfig(both_rate=0.15)
data = ModalityDropout.of(samples, families)
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/plain-trainer",
        max_steps=100,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
    ),
    data_collator=PromptCollator(processor, with_labels=True, schedule_temperature=0.2),
    train_dataset=data,
    callbacks=[EpochCallback()],
)
trainer.train()
model.save_pretrained("runs/plain-trainer/final")
processor.save_pretrained("runs/plain-trainer/final")
