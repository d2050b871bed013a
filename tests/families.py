"""A tiny model of every family, built from its configuration, and inputs as its processor makes them: two rows with
one image each, or two in the second row, of different sizes where the family knows sizes."""

import functools

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from modeling_dms.auto import CLASSES
from tests import tiny


IMAGE, START, END, VIDEO = 98, 96, 95, 97
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
_OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 37,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
    "vocab_size": 99,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
# of another width and depth than the text, as published ones are: so nothing may take one for the other
_TOWER = {
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model"}
_QFORMER = {
    "vocab_size": 50,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# of Qwen3-VL and GLM-4V the configurations of the text name no beginning and no end
_UNMARKED = {name: value for name, value in _TEXT.items() if name not in ("bos_token_id", "eos_token_id")}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
_QWEN = {"depth": 3, "hidden_size": 48, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_GRID = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
_IDEFICS = {
    "text_config": {**_TEXT, "model_type": "llama"},
    "vision_config": {**_TOWER, "image_size": 16},
    "image_token_id": IMAGE,
    "scale_factor": 2,
}
_LLAMA = {**_TEXT, "model_type": "llama"}
# by the `model_type` of the vanilla class
FIELDS = {
    "llava": {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": IMAGE, "vision_feature_layer": -2},
    "llava_next": {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": IMAGE, **_GRID},
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        **_GRID,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "patch_size": 2},
        "image_token_id": IMAGE,
    },
    "blip-2": {
        "text_config": _OPT,
        "vision_config": _TOWER,
        "qformer_config": _QFORMER,
        "num_query_tokens": 4,
        "image_token_index": IMAGE,
    },
    "instructblip": {
        "text_config": _OPT,
        "vision_config": _TOWER,
        "qformer_config": _QFORMER,
        "num_query_tokens": 4,
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, **_ROPE},
        "vision_config": {**_QWEN, "fullatt_block_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_UNMARKED, **_ROPE, "head_dim": 8},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "glm4v": {
        "text_config": {**_UNMARKED, **_ROPE},
        "vision_config": {**_QWEN, "image_size": 56},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": 94,
        "video_end_token_id": 93,
    },
    "gemma3": {
        "text_config": {
            **_TEXT,
            "model_type": "gemma3_text",
            "head_dim": 8,
            "sliding_window": tiny.WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma", "head_dim": 8},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 8, "sliding_window": tiny.WINDOW},
        "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 16, "head_dim": 12},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
}
# several images a row, or of different size: how many image tokens each image of the two rows has
_IMAGES = {
    "llava": ((4,), (4, 4)),
    "internvl": ((4,), (4, 4)),
    "gemma3": ((4,), (4, 4)),
    "paligemma": ((4,), (4, 4)),
    "blip-2": ((4,), (4,)),
    "instructblip": ((4,), (4,)),
    "qwen2_5_vl": ((4,), (2, 4)),
    "qwen3_vl": ((4,), (2, 4)),
    "glm4v": ((4,), (2, 4)),
    "smolvlm": ((4,), (4, 4)),
    "idefics3": ((4,), (4, 4)),
    "mistral3": ((4,), (2, 4)),
}
_PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16, "glm4v": 14}


def build(family: str, attention: str = "sdpa", stirred: bool = False, **dms) -> PreTrainedModel:
    """A DMS model of its own, in eval mode; `stirred` gives `dms` parameters that are not zero."""
    cls = CLASSES[family]
    config = cls.config_class(**FIELDS[family], dms_config={**tiny._DMS, **dms})
    model = cls._from_config(config, attn_implementation=attention)
    tiny.seed_parameters(model)
    if stirred:
        tiny.stir(model.dms)
    return model.eval()


@functools.cache
def shared(family: str, attention: str = "sdpa", **dms) -> PreTrainedModel:
    """As `build`, made once; do not change it."""
    return build(family, attention, **dms)


@functools.cache
def vanilla(family: str, attention: str = "sdpa") -> PreTrainedModel:
    """The class of transformers with the same base weights; do not change it."""
    cls = getattr(transformers, CLASSES[family].__name__.removeprefix("DMS"))
    model = cls._from_config(cls.config_class(**FIELDS[family]), attn_implementation=attention)
    state = shared(family, attention).state_dict()
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("dms.")})
    return model.eval()


def inputs(family: str, padding: str = "left", seed: int = 1) -> dict[str, Tensor]:
    """Two prompts with their images."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    images: dict[str, Tensor] = {}
    counts = _IMAGES.get(family)
    if family in ("llava_next", "llava_onevision"):
        images["image_sizes"] = torch.tensor([[8, 16], [16, 16]])
        images["pixel_values"] = torch.zeros(2, 5, 3, 8, 8)
        images["pixel_values"][0, :3], images["pixel_values"][1] = drawn(3, 3, 8, 8), drawn(5, 3, 8, 8)
        with torch.no_grad():
            features = vanilla(family).get_image_features(**images, return_dict=True).pooler_output
        counts = tuple((len(tokens),) for tokens in features)
    elif family in _PATCH:
        grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4]])
        images = {"image_grid_thw": grid, "pixel_values": drawn(int(grid.prod(1).sum()), 6 * _PATCH[family] ** 2)}
    elif family in ("smolvlm", "idefics3"):
        images["pixel_values"] = torch.zeros(2, 2, 3, 16, 16)  # a row's missing images are zeros
        images["pixel_values"][0, 0], images["pixel_values"][1] = drawn(3, 16, 16), drawn(2, 3, 16, 16)
    elif family == "mistral3":
        # 12: three rows of patches, one row of tokens
        images["image_sizes"] = torch.tensor([[16, 16], [12, 16], [16, 16]])
        images["pixel_values"] = drawn(3, 3, 16, 16)
    else:
        images["pixel_values"] = drawn(sum(map(len, counts)), 3, 8, 8)

    lines = []
    for row, of_row in enumerate(counts):
        line = [tiny.BOS, 5]
        for count in of_row:
            line += [START, *[IMAGE] * count, END]
        lines.append(line + torch.randint(4, 90, (5 + row,), generator=generator).tolist())
    length = max(map(len, lines))
    ids, mask = [], []
    for line in lines:
        missing = length - len(line)
        left = missing if padding == "left" else 0
        ids.append([tiny.PAD] * left + line + [tiny.PAD] * (missing - left))
        mask.append([0] * left + [1] * len(line) + [0] * (missing - left))
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **images}
    is_image = batch["input_ids"] == IMAGE
    if family in _PATCH:
        batch["mm_token_type_ids"] = is_image.int()
    if family == "gemma3":
        batch["token_type_ids"] = is_image.long()
    if family == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    if family == "instructblip":
        batch["qformer_input_ids"] = torch.randint(4, 45, (2, 5), generator=generator)
        batch["qformer_attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    return batch


def with_a_text(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same two prompts, and one without image between them."""
    longer, in_rows = {}, family in ("smolvlm", "idefics3")
    for name, value in batch.items():
        if name in ("image_sizes", "image_grid_thw") or (name == "pixel_values" and not in_rows):
            longer[name] = value
            continue
        new = torch.zeros_like(value[:1])
        if name in ("input_ids", "attention_mask"):
            new = torch.arange(value.shape[1])[None] + 5 if name == "input_ids" else torch.ones_like(new)
        longer[name] = torch.cat([value[:1], new, value[1:]])
    return longer


def repainted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts with other images; what is no image stays zero."""
    pixels = batch["pixel_values"]
    return {**batch, "pixel_values": torch.where(pixels == 0, pixels, 1 - 2 * pixels)}


def row(family: str, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Row `index` alone, without its padding."""
    keep = batch["attention_mask"][index].bool()
    images = slice(0, 1) if index == 0 else slice(1, None)
    single = {}
    for name, value in batch.items():
        if name == "pixel_values" and family in _PATCH:
            first = int(batch["image_grid_thw"][0].prod())
            single[name] = value[:first] if index == 0 else value[first:]
        elif name in ("pixel_values", "image_sizes", "image_grid_thw"):
            single[name] = value[images]
        elif name.startswith("qformer"):
            single[name] = value[index : index + 1]
        else:
            single[name] = value[index : index + 1, keep]
    return single
