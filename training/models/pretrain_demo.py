"""Trains the demo's two small checkpoints from scratch on easy-VQA: static models, no DMS in them.

    python -m modeling_dms.training.models.pretrain_demo --backbone llava --output_dir runs/demo-llava

Modality dropout: in part of the samples the image is noise, black or missing, or the context is random words or
missing (never both). No other corruption is seen in training.
"""

import json
import random
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPImageProcessorPil,
    HfArgumentParser,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_dms.observe.prompt import VISION
from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa


IMAGE_SIZE, PATCH_SIZE, NUM_QUERY_TOKENS = 64, 8, 16
TRAINING_CORRUPTIONS = {
    "image": ("image:noise", "image:black", "image:missing"),
    "text": ("text:random_words", "text:missing"),
}


@dataclass
class DemoArguments:
    """What to train."""

    backbone: Literal["llava", "blip2"] = field(default="llava", metadata={"help": "Which checkpoint to train."})
    image_corrupted: float = field(default=0.3, metadata={"help": "Share of samples whose image is corrupted."})
    text_corrupted: float = field(default=0.45, metadata={"help": "Share of samples whose context is corrupted."})
    open_questions: float = field(default=0.6, metadata={"help": "Share of questions that are not yes/no."})
    export_dir: str | None = field(default=None, metadata={"help": "Where the finished checkpoint goes."})


def build_tokenizer(samples: list[Sample], extra: dict[str, str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training texts: whole words for what it knows, letters for others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [f"context: {s.context} question: {s.question} answer: {s.answers[0]}" for s in samples]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=extra,
        model_max_length=512,
        padding_side="left",
    )


def build(backbone: str, samples: list[Sample]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A new model of the vanilla class and its processor."""
    # Blip2Processor adds the image token itself and fails on a tokenizer that already names one
    tokenizer = build_tokenizer(samples, {"image_token": "<image>"} if backbone == "llava" else {})
    image_token_id = tokenizer.vocab["<image>"]
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    width = {"hidden_size": 128, "num_attention_heads": 4}
    vision = {**width, "num_hidden_layers": 4, "intermediate_size": 384}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    if backbone == "llava":
        config = LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "projection_dim": 128, **vision},
            text_config={"model_type": "llama", "num_hidden_layers": 5, "intermediate_size": 352, **width, **ids}
            | {"num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True},
            image_token_index=image_token_id,
            image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        processor = LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        return LlavaForConditionalGeneration(config), processor
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**width, "num_hidden_layers": 3, "intermediate_size": 384, "cross_attention_frequency": 1}
        | {"encoder_hidden_size": 128, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        text_config={"model_type": "opt", "num_hidden_layers": 4, "ffn_dim": 384, "word_embed_proj_dim": 128}
        | {"max_position_embeddings": 256, "dropout": 0.0, **width, **ids},
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=image_token_id,
    )
    return Blip2ForConditionalGeneration(config), Blip2Processor(image_processor, tokenizer, NUM_QUERY_TOKENS)


class ModalityDropout(Dataset):
    """Training samples, augmented (mirrored, shifted) and with one modality corrupted now and then."""

    def __init__(self, samples: list[Sample], length: int, arguments: DemoArguments, seed: int):
        is_open = [sample.answers[0] not in ("yes", "no") for sample in samples]
        self.open = [sample for sample, yes in zip(samples, is_open, strict=True) if yes]
        self.closed = [sample for sample, yes in zip(samples, is_open, strict=True) if not yes]
        self.length, self.arguments, self.seed = length, arguments, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = random.Random(self.seed * 1_000_003 + index)
        sample = rng.choice(self.open if rng.random() < self.arguments.open_questions else self.closed)
        sample = sample.replace(id=f"{sample.id}@{index}", image=augment(cast(Image.Image, sample.load_image()), rng))
        draw = rng.random()
        if draw < self.arguments.image_corrupted:
            return corrupt(sample, rng.choice(TRAINING_CORRUPTIONS["image"]), rng.randint(1, 5))
        if draw < self.arguments.image_corrupted + self.arguments.text_corrupted:
            return corrupt(sample, rng.choice(TRAINING_CORRUPTIONS["text"]), rng.randint(1, 5))
        return sample


def augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored and shifted by up to 6 pixels; the border takes the background's color."""
    pixels = np.asarray(image)
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    shift = (rng.randint(-6, 6), rng.randint(-6, 6))
    padded = np.pad(pixels, ((6, 6), (6, 6), (0, 0)), mode="edge")
    return Image.fromarray(
        padded[6 + shift[0] : 6 + shift[0] + image.height, 6 + shift[1] : 6 + shift[1] + image.width]
    )


@torch.no_grad()
def accuracy(model: PreTrainedModel, collator: PromptCollator, samples: list[Sample], batch_size: int = 100) -> float:
    """Share of samples whose most likely next token is the answer's."""
    tokenizer, right = collator.processor.tokenizer, 0
    model.eval()
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        inputs = {name: value.to(model.device) for name, value in collator(batch).items()}
        predicted = model(**inputs).logits[:, -1].argmax(-1).cpu()
        wanted = [tokenizer(f" {s.answers[0]}", add_special_tokens=False)["input_ids"][0] for s in batch]
        right += int((predicted == torch.tensor(wanted)).sum())
    return right / len(samples)


class StaticCollator(PromptCollator):
    """Batches for the vanilla classes. Half of the missing images leave no placeholder behind; the others leave their
    positions, masked out of the attention, as they are when a missing image has a blank stand-in."""

    def __call__(self, samples):
        stand_in = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        masked = [s.image is None and zlib.crc32(s.id.encode()) % 2 == 0 for s in samples]
        batch = super().__call__([s.replace(image=stand_in) if m else s for s, m in zip(samples, masked, strict=True)])
        image = batch.pop("modality_ids") == VISION
        # positions count the masked image, which OPT would otherwise leave out
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        batch["attention_mask"] = batch["attention_mask"].masked_fill(image & torch.tensor(masked)[:, None], 0)
        return batch


def main() -> None:
    demo, arguments = HfArgumentParser(cast(Any, (DemoArguments, TrainingArguments))).parse_args_into_dataclasses()
    arguments.remove_unused_columns = False
    set_seed(arguments.seed)
    train, held_out = load_easy_vqa("train"), load_easy_vqa("validation")
    model, processor = build(demo.backbone, train)
    print(f"{demo.backbone}: {model.num_parameters():,} parameters, {len(train):,} questions")
    length = arguments.max_steps * arguments.train_batch_size
    trainer = Trainer(
        model,
        arguments,
        data_collator=StaticCollator(processor, with_labels=True),
        train_dataset=ModalityDropout(train, length, demo, arguments.seed),
        processing_class=processor,
    )
    resume = any(Path(arguments.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume)
    checks = {"clean / clean": None, "clean / missing": "text:missing"}
    checks |= {"black / clean": "image:black", "missing / clean": "image:missing"}
    held_out = held_out[::4]
    collator = StaticCollator(processor)
    results = {
        name: accuracy(model, collator, [corrupt(s, kind) if kind else s for s in held_out])
        for name, kind in checks.items()
    }
    print(json.dumps(results))
    export = Path(demo.export_dir or Path(arguments.output_dir) / "export")
    model.save_pretrained(export)
    processor.save_pretrained(export)
    record = {
        "command": " ".join(["python -m modeling_dms.training.models.pretrain_demo", *sys.argv[1:]]),
        "seed": arguments.seed,
        "steps": trainer.state.global_step,
        "validation_accuracy": results,
        "validation_samples": len(held_out),
        "log": trainer.state.log_history,
    }
    (export / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
