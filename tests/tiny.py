"""Tiny models and prompts, built from configs, offline: vocabulary 99, hidden size 32, 2 layers, 8-pixel images, 4
image tokens.

Every weight is drawn from a generator seeded by its name, large enough that attention matters and equal in the DMS and
the vanilla class. Sequences are longer than the sliding windows of the Mistral and Qwen2 models.
"""

import functools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling_dms import (
    DMSBlip2Config,
    DMSBlip2ForConditionalGeneration,
    DMSBlip2ForImageTextRetrieval,
    DMSInternVLConfig,
    DMSInternVLForConditionalGeneration,
    DMSLlavaConfig,
    DMSLlavaForConditionalGeneration,
)
from modeling_dms.training.models.loading import CHECKPOINTS


PAD, BOS, EOS, IMAGE = 1, 2, 3, 98
IMAGE_TOKENS, WINDOW = 4, 6
LLAVA = ("llava-llama", "llava-mistral", "llava-qwen2")
INTERNVL = ("internvl-qwen3",)
BLIP2 = ("blip2-opt", "blip2-llama", "blip2-t5")
# of one shape: they share `LlavaMixin`
LLAVA_SHAPED = LLAVA + INTERNVL
BACKBONES = LLAVA_SHAPED + BLIP2
# one of each kind, for what needs no more
FAMILIES = ("llava-llama", "internvl-qwen3", "blip2-opt", "blip2-t5")
DECODER_ONLY = tuple(name for name in BACKBONES if name != "blip2-t5")

VANILLA = {
    DMSLlavaForConditionalGeneration: LlavaForConditionalGeneration,
    DMSInternVLForConditionalGeneration: InternVLForConditionalGeneration,
    DMSBlip2ForConditionalGeneration: Blip2ForConditionalGeneration,
    DMSBlip2ForImageTextRetrieval: Blip2ForImageTextRetrieval,
}

_DMS = {"shared_size": 8, "mc_samples": 4, "subspace_size": 8, "scheduler_hidden_size": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_TOKENS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TEXT = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 37},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 37, "head_dim": 8, "sliding_window": WINDOW},
    "qwen2": {
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 37, "head_dim": 8},
    "opt": {"ffn_dim": 37, "word_embed_proj_dim": 32, "dropout": 0.0, "activation_function": "gelu"},
}
_T5 = {
    "d_model": 32,
    "d_ff": 37,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
}


def _text_config(kind: str) -> dict:
    shared = {"model_type": kind, "vocab_size": 99, **_TOKENS}
    if kind == "t5":
        return {**shared, **_T5}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    return {**shared, **sizes, **_TEXT[kind]}


def config(backbone: str, **dms) -> DMSLlavaConfig | DMSInternVLConfig | DMSBlip2Config:
    """Configuration of `retrieval` or one of `BACKBONES`, `<family>-<text model>`; `dms` are fields of `DMSConfig`."""
    family, _, kind = backbone.partition("-")
    dms_config = {**_DMS, **dms}
    if family == "llava":
        return DMSLlavaConfig(
            text_config=_text_config(kind),
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
            image_token_index=IMAGE,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-2,
            dms_config=dms_config,
        )
    if family == "internvl":
        return DMSInternVLConfig(
            text_config=_text_config(kind),
            vision_config={**_VISION, "patch_size": 2},
            image_token_id=IMAGE,
            image_seq_length=IMAGE_TOKENS,
            dms_config=dms_config,
        )
    qformer = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_qformer_text_input": family == "retrieval",
    }
    return DMSBlip2Config(
        vision_config=_VISION,
        qformer_config=qformer,
        text_config=_text_config(kind or "opt"),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=IMAGE,
        image_text_hidden_size=16,
        dms_config=dms_config,
    )


def model_class(backbone: str) -> type[PreTrainedModel]:
    """The DMS class of a backbone."""
    return {
        "llava": DMSLlavaForConditionalGeneration,
        "internvl": DMSInternVLForConditionalGeneration,
        "blip2": DMSBlip2ForConditionalGeneration,
        "retrieval": DMSBlip2ForImageTextRetrieval,
    }[backbone.partition("-")[0]]


@torch.no_grad()
def seed_parameters(model: nn.Module, std: float = 0.3) -> None:
    """Draws every parameter anew, from its name; what DMS initialises to zero stays zero."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.startswith("dms.") and not parameter.any():
            continue
        if parameter.ndim >= 2 or "embedding" in name:
            parameter.copy_(drawn * std)
        else:
            parameter.copy_(drawn * 0.1 + (1 if "norm" in name.lower() and name.endswith("weight") else 0))


@torch.no_grad()
def stir(module: nn.Module, seed: int = 5, std: float = 0.5) -> None:
    """Draws every parameter at random, those that start at zero too: a "trained" scheduler."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def build(backbone: str, attention: str = "sdpa", *, stirred: bool = False, **dms) -> PreTrainedModel:
    """A model of its own, in eval mode. `stirred`: the parameters of `dms` are random instead of at their start."""
    model = model_class(backbone)._from_config(config(backbone, **dms), attn_implementation=attention)
    seed_parameters(model)
    if stirred:
        stir(model.dms)
        if hasattr(model.dms.scheduler, "output"):
            # weights near 0 and 1 would neither differ nor have a gradient
            model.dms.scheduler.output.weight.data *= 0.1
    return model.eval()


@functools.cache
def shared(backbone: str, attention: str = "sdpa", **dms) -> PreTrainedModel:
    """As `build`, made once; do not change it."""
    return build(backbone, attention, **dms)


def vanilla_of(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """The class of transformers with the same base weights."""
    fields = model.config.to_dict()
    for name in ("dms_config", "model_type", "architectures", "auto_map"):
        fields.pop(name, None)
    vanilla_class = VANILLA[type(model)]
    attention = attention or model.config.get_text_config(decoder=True)._attn_implementation
    vanilla = vanilla_class._from_config(vanilla_class.config_class(**fields), attn_implementation=attention)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("dms.")}
    vanilla.load_state_dict(state, strict=True)
    return vanilla.eval()


@functools.cache
def vanilla(backbone: str, attention: str = "sdpa") -> PreTrainedModel:
    """The vanilla class with the base weights that `build` draws; do not change it."""
    return vanilla_of(shared(backbone, attention))


@torch.no_grad()
def realigned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its tensors copied to fresh memory, so that its answers can be compared bit for bit.

    Loaded tensors are views into the file, wherever its header makes them begin, and matrix products round by
    alignment: without this a model and its exact copy may differ in the last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.clone()
    return model


PAIR, SHORT, TEXT_ONLY, IMAGE_ONLY, TWO_IMAGES = (2, "i", 6), ("i", 4), (7,), ("i",), (1, "i", 2, "i", 2)


def rows_of(backbone: str, kind: str = "pairs") -> list[tuple]:
    """Samples as numbers of text tokens and `i` for an image: `pairs` of image and text, or `mixed` with samples that
    lack one or (not BLIP-2) have several images."""
    if backbone == "retrieval":
        return [("i", 7), ("i", 4), ("i", 5)]
    if kind == "pairs":
        return [PAIR, SHORT, PAIR]
    return [PAIR, TEXT_ONLY, SHORT, IMAGE_ONLY] + ([TWO_IMAGES] if backbone in LLAVA_SHAPED else [])


def batch(
    rows: Sequence[tuple], padding: str = "none", seed: int = 1, decoder: int = 0, labels: int = 0
) -> dict[str, Tensor]:
    """A batch of prompts, each beginning with the BOS token.

    Args:
        rows: see `rows_of`.
        padding: `"left"`, `"right"`, or `"none"`, which needs rows of one length (shorter rows get more text).
        decoder: length of `decoder_input_ids`.
        labels: the last so many positions of each row are labelled.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, images = [], 0
    for row in rows:
        line = [BOS]
        for part in row:
            if part == "i":
                line += [IMAGE] * IMAGE_TOKENS
                images += 1
            else:
                line += torch.randint(4, IMAGE, (part,), generator=generator).tolist()
        ids.append(line)
    length = max(map(len, ids))
    mask = []
    for index, line in enumerate(ids):
        missing = length - len(line)
        if padding == "none":
            ids[index] = line + torch.randint(4, IMAGE, (missing,), generator=generator).tolist()
            mask.append([1] * length)
        elif padding == "left":
            ids[index], kept = [PAD] * missing + line, [0] * missing + [1] * len(line)
            mask.append(kept)
        else:
            ids[index], kept = line + [PAD] * missing, [1] * len(line) + [0] * missing
            mask.append(kept)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
    if decoder:
        inputs["decoder_input_ids"] = torch.randint(4, IMAGE, (len(rows), decoder), generator=generator)
    if labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["labels"][:, :-labels] = -100
    return inputs


def prompts(backbone: str, kind: str = "pairs", padding: str = "none", **kwargs) -> dict[str, Tensor]:
    """`batch` of `rows_of`, with decoder inputs where the backbone has a decoder of its own.

    Retrieval reads the image tokens first and then the text with its first token ([CLS]), so it pads on the right.
    """
    if backbone == "blip2-t5" and not kwargs.get("labels"):
        kwargs.setdefault("decoder", 3)
    if backbone == "retrieval":
        return image_first(batch(rows_of(backbone), "none" if padding == "none" else "right", **kwargs))
    return batch(rows_of(backbone, kind), padding, **kwargs)


def image_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moves the BOS token of each row behind its image."""
    order = [*range(1, 1 + IMAGE_TOKENS), 0, *range(1 + IMAGE_TOKENS, inputs["input_ids"].shape[1])]
    return {**inputs, **{name: inputs[name][:, order] for name in ("input_ids", "attention_mask")}}


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Sample `index` alone, without its padding."""
    placeholders = (inputs["input_ids"] == IMAGE).sum(1) // IMAGE_TOKENS
    first = int(placeholders[:index].sum())
    keep = inputs["attention_mask"][index].bool()
    single = {}
    for name, value in inputs.items():
        if name == "pixel_values":
            if placeholders[index]:
                single[name] = value[first : first + int(placeholders[index])]
        elif name in ("decoder_input_ids", "modality_weights", "modality_mask", "schedule_target"):
            single[name] = value[index : index + 1]
        else:
            single[name] = value[index : index + 1, keep]
    return single


def same_positions(inputs: dict[str, Tensor]) -> Tensor:
    """`position_ids` as the models count them where the mask is ignored."""
    return torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])


def uneven(count: int, seed: int = 3) -> Tensor:
    """Weights (count, 2) far from uniform."""
    weights = torch.rand(count, 1, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.05
    weights[::2] = 1 - weights[::2]
    return torch.cat([weights, 1 - weights], 1)


def clean_samples(count: int = 96, size: int = 32, seed: int = 0, missing: bool = False) -> list[dict[str, Tensor]]:
    """Batches with structure to calibrate on: images mix three patterns, texts follow a small grammar and name the
    strongest pattern. `missing`: every third sample lacks its image, every third its text, mixed within a batch."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    batches = []
    for start in range(0, count, size):
        images, ids = [], []
        for index in range(start, min(start + size, count)):
            mix = torch.rand(3, generator=generator)
            words = [10 + int(mix.argmax())]
            words += [20 + 3 * k + int(torch.randint(3, (1,), generator=generator)) for k in range(5)]
            image = (mix[:, None, None, None] * patterns).sum(0) + 0.05 * torch.randn(3, 8, 8, generator=generator)
            has_image, has_text = not missing or index % 3 != 1, not missing or index % 3 != 2
            ids.append([BOS] + [IMAGE] * IMAGE_TOKENS * has_image + words * has_text)
            if has_image:
                images.append(image)
        length = max(map(len, ids))
        mask = torch.tensor([[0] * (length - len(line)) + [1] * len(line) for line in ids])
        rows = torch.tensor([[PAD] * (length - len(line)) + line for line in ids])
        batches.append({"input_ids": rows, "attention_mask": mask, "pixel_values": torch.stack(images)})
    return batches


def noisy(inputs: dict[str, Tensor], strength: float = 4.0, seed: int = 7) -> dict[str, Tensor]:
    """The same batch with strong noise in its images."""
    drawn = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed))
    return {**inputs, "pixel_values": inputs["pixel_values"] + strength * drawn}


@functools.cache
def calibrated(backbone: str, **dms) -> PreTrainedModel:
    """As `build`, calibrated on `clean_samples`; do not change it."""
    model = build(backbone, **dms)
    model.calibrate(clean_samples(), level=2, show_progress=False)
    return model


def calibration_of(backbone: str) -> dict[str, Tensor]:
    """Tensors of a calibration, where it only counts that there is one: all decoder-only backbones share the first
    one's, which has their sizes."""
    return calibrated("blip2-t5" if backbone == "blip2-t5" else "llava-llama").dms.calibration.state_dict()


class InternVLImages(InternVLProcessor):
    """`InternVLProcessor` without videos, for which it wants torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template, **kwargs)


AutoProcessor.register(DMSInternVLConfig, InternVLImages, exist_ok=True)


def internvl_processor(tile: int) -> InternVLImages:
    """With the tokenizer of the demo; square tiles of so many pixels have 4 image tokens each."""
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = dict(zip(names, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), strict=True))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINTS / "demo-llava", extra_special_tokens=tokens)
    images = GotOcr2ImageProcessorPil(size={"height": tile, "width": tile})
    return InternVLImages(images, tokenizer, image_seq_length=IMAGE_TOKENS)


def save_internvl(directory: Path) -> Path:
    """A vanilla InternVL checkpoint with a processor, which makes five tiles of an image of 64 x 64 pixels."""
    processor = internvl_processor(32)
    ids = {name: getattr(processor.tokenizer, name) for name in _TOKENS}
    text = {**_text_config("qwen3"), **ids, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 512}
    vision = {**_VISION, "image_size": 32, "patch_size": 8}
    fields = {"image_token_id": processor.image_token_id, "image_seq_length": IMAGE_TOKENS}
    model = InternVLForConditionalGeneration(InternVLConfig(text_config=text, vision_config=vision, **fields))
    seed_parameters(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def table(folder: Path, rows: int = 12) -> Path:
    """A data set of one training sample a picture, for `load_folder`."""
    folder.mkdir()
    described = []
    for number in range(rows):
        Image.new("RGB", (64, 64), (20 * number % 256, number // 13, 0)).save(folder / f"{number}.png")
        row = {"context": "a red box.", "question": "what?", "answers": ["box"], "split": "train"}
        described.append({"image": f"{number}.png", **row})
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, described)))
    return folder


# begins a script: there `modeling_dms` cannot be imported
BLOCKED = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_dms" or name.startswith("modeling_dms."):
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
"""
