"""Memory and floating-point operations of a training step at 7B and 13B, counted on the meta device.

    python benchmarks/scaling.py [--out docs/scaling.md]

Nothing is measured and no GPU is needed: a model of the published size is built without storage, and what its forward
pass saves for the backward pass is counted.
"""

import argparse
import gc
import platform
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import peft
import torch
import transformers
from overhead import (
    ANSWER,
    CONTEXT,
    PUBLISHED,
    Size,
    _text,
    build,
    count_flops,
    features_of,
    pixel_flops,
    real_dms,
    text_flops,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

import modeling_dms
from modeling_dms.dms import read_out
from modeling_dms.observe.layers import layers_of


BATCH, GPUS, RANK = 4, 8, 16
LORA = r".*language_model.*\.(q_proj|v_proj)"
METHODS = {"dms": "`dms` alone", "lora": f"LoRA, rank {RANK}, + `dms`", "full": "full"}
PLACES = {"one": "1 GPU", "ddp": f"{GPUS} GPUs, DDP", "sharded": f"{GPUS} GPUs, FSDP2 or ZeRO-3"}
# bytes a parameter: bfloat16 weights and gradients; AdamW's float32 weights and two moments
WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12


def _trained(size: Size, **own: Any) -> Size:
    return replace(size, text_tokens=CONTEXT + ANSWER, **own)


SIZES = {
    "LLaVA-1.5-7B": ("llava", _trained(PUBLISHED["llava"])),
    "LLaVA-1.5-13B": (
        "llava",
        _trained(
            PUBLISHED["llava"],
            title="LLaVA-1.5-13B",
            text=_text(5120, 40, 40, 32064, num_key_value_heads=40, intermediate_size=13824),
        ),
    ),
    "BLIP-2-OPT-2.7B": ("blip2", _trained(PUBLISHED["blip2"])),
    "BLIP-2-OPT-6.7B": (
        "blip2",
        _trained(PUBLISHED["blip2"], title="BLIP-2-OPT-6.7B", text=_text(4096, 32, 32, 50304, ffn_dim=16384)),
    ),
}


# ---- the model


def prepare(family: str, size: Size, method: str, checkpointing: bool = False, device: str = "meta") -> Any:
    """A DMS model with the learned scheduler in bfloat16, of which the parameters of a method are trainable."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = build(family, size, "learned").train()
            model.dms.calibration.float()  # as loading leaves it
            if method == "lora":
                config = LoraConfig(r=RANK, target_modules=LORA, modules_to_save=["dms"])
                get_peft_model(model, config, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(before)
    if method == "dms":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("dms."))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def layer_stacks(family: str, model: Any) -> list[nn.ModuleList]:
    """The transformer layers that `configuration/accelerate/fsdp2.yaml` shards by themselves."""
    vision = model.model.vision_tower if family == "llava" else model.vision_model
    stacks = [layers_of(model._text_stack()), layers_of(vision.encoder)]
    return stacks if family == "llava" else [*stacks, layers_of(model.qformer.encoder)]


def parameters(modules: Iterable[nn.Module], trainable: bool = False) -> int:
    """Parameters of modules, each counted once."""
    found = {id(p): p.numel() for m in modules for p in m.parameters() if p.requires_grad or not trainable}
    return sum(found.values())


# ---- what a step does


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a GPU runs where the meta device would write out the scores: the flash kernel.

    As torch does it, with the head size brought to a multiple of 8. No mask: the prompts have no padding.
    """
    size = query.shape[-1]
    padded = (F.pad(part, (0, -size % 8)) if size % 8 else part for part in (query, key, value))
    causal, scale = bool(kwargs.get("is_causal")), kwargs.get("scale") or size**-0.5
    aten = torch.ops.aten
    on_cpu = query.device.type == "cpu"  # a small model with weights, to compare with
    kernel = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else aten._scaled_dot_product_flash_attention
    out = kernel(*padded, 0.0, causal, scale=scale)[0]
    return out[..., :size]


def fused() -> Any:
    """Decorator: the flash kernel also where checkpointing computes a layer again, in the backward pass."""
    return patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention)


def backbone_loss(family: str, model: Any, size: Size, batch: int) -> Any:
    """The task's loss on the meta device, in the calls that `forward` makes.

    Not `forward` itself: it looks at the values of ids and masks, which meta tensors do not have. The key bias has a
    gradient, since the learned scheduler is trained by every method.
    """
    dtype, length = torch.bfloat16, size.image_tokens + size.text_tokens
    pixels = torch.empty(batch, 3, size.image, size.image, device="meta", dtype=dtype)
    ids = torch.zeros(batch, size.text_tokens, device="meta", dtype=torch.long)
    labels = torch.zeros(batch, length, device="meta", dtype=torch.long)
    bias = torch.empty(batch, length, device="meta", requires_grad=True)
    embed = model.get_input_embeddings()
    # what `steered` makes of the library's mask, which looks at values: a ready one is taken as it is
    mask: Any = torch.empty(batch, 1, length, length, device="meta", dtype=dtype)
    mask.of_keys = (None, bias)
    given = {"labels": labels, "attention_mask": mask, "use_cache": False}
    if family == "llava":
        features = LlavaForConditionalGeneration.get_image_features(model, pixel_values=pixels, return_dict=True)
        embeds = torch.cat([torch.stack(list(features.pooler_output)), embed(ids)], 1)
        return LlavaForConditionalGeneration.forward(model, inputs_embeds=embeds, **given).loss
    states = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(batch, -1, -1)
    queries = model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
    embeds = torch.cat([model.language_projection(queries.to(dtype)), embed(ids)], 1)
    # OPT would make them of a mask of two dimensions
    return model.language_model(inputs_embeds=embeds, position_ids=torch.zeros_like(labels), **given).loss


def dms_loss(dms: Any, model: Any, size: Size, method: str, batch: int, readouts: list[int]) -> Tensor:
    """The DMS losses. The output layer that they read runs on the meta device, without a backward pass there: the
    operations of that are added to `readouts`."""
    head = model.get_output_embeddings()

    def readout(states: Tensor, tokens: Tensor | None = None) -> Tensor:
        out = torch.empty(0)

        def run() -> None:
            nonlocal out
            out = read_out(states.to("meta"), head.weight, head.bias, None if tokens is None else tokens.to("meta"))

        flops = count_flops(run)
        # one product more, as the layer is frozen; the dropout passes have no gradient
        readouts[0] += flops if tokens is None else 0
        return states[..., :1].expand(out.shape).contiguous()

    tokens = [
        torch.randn(batch, n, size.text["hidden_size"], dtype=torch.bfloat16, requires_grad=method == "full")
        for n in (size.image_tokens, CONTEXT)
    ]
    features = features_of(dms, tokens, in_prompt=False)
    present = torch.ones(batch, 2, dtype=torch.bool)
    output = dms(features, present, readout)
    labels = torch.zeros(batch, ANSWER, dtype=torch.long)
    target = torch.tensor([0.3, 0.7]).expand(batch, -1)
    return dms.total(dms.losses(output, present, labels, target))


class _Held:
    """What autograd holds instead of a saved tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the storages that are held for the backward pass after `run`, without the model's own tensors."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    held: WeakSet[_Held] = WeakSet()  # weak: what no gradient needs is let go on the way

    def pack(tensor: Tensor) -> _Held:
        held.add(kept := _Held(tensor.detach()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        graph = run()
    gc.collect()
    storages = {kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes() for kept in held}
    del graph
    return sum(count for address, count in storages.items() if address not in own)


@fused()
def activations(family: str, size: Size, method: str, batch: int, checkpointing: bool = False) -> int:
    """Bytes that the backbone saves for the backward pass."""
    model = prepare(family, size, method, checkpointing)
    return saved_bytes(lambda: backbone_loss(family, model, size, batch), model)


def deeper(size: Size, text: int, vision: int) -> Size:
    """The same size with other numbers of layers."""
    hidden, intermediate, _, heads = size.vision
    return replace(size, text={**size.text, "num_hidden_layers": text}, vision=(hidden, intermediate, vision, heads))


def recomputed(family: str, size: Size, method: str, batch: int) -> int:
    """Bytes that the largest layer saves while gradient checkpointing computes it again."""
    # three: LLaVA takes the image's features before the last layer
    few = activations(family, deeper(size, 2, 3), method, batch)
    return max(activations(family, deeper(size, *more), method, batch) - few for more in ((3, 3), (2, 4)))


@dataclass
class Step:
    """Counts of one training step on one GPU; memory in bytes."""

    total: int
    trainable: int
    buffers: int
    gathered: int
    activations: dict[bool, int]
    flops: dict[bool, int]


@fused()
def count_step(family: str, size: Size, method: str, batch: int = BATCH) -> Step:
    """Parameters, activations and operations; by whether checkpointing is on."""
    saved, flops = {}, {}
    # without a gradient
    observed = sum(text_flops(prepare(family, size, method), size, batch)) + pixel_flops(size, batch)
    for checkpointing in (False, True):
        model = prepare(family, size, method, checkpointing)
        total, trainable = parameters([model]), parameters([model], trainable=True)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        stacks = layer_stacks(family, model)
        layers = [layer for stack in stacks for layer in stack]
        # whole at one time: the outermost group, and the layer at work and the next one, each with its gradients
        outer = WEIGHT * (total - parameters(layers)) + GRADIENT * (trainable - parameters(layers, trainable=True))
        inner = max(WEIGHT * parameters([layer]) + GRADIENT * parameters([layer], trainable=True) for layer in layers)
        saved[checkpointing] = saved_bytes(lambda m=model: backbone_loss(family, m, size, batch), model)
        flops[checkpointing] = count_flops(lambda m=model: backbone_loss(family, m, size, batch).backward(), grad=True)
        flops[checkpointing] += observed
        dms, readouts = real_dms(model).requires_grad_(), [0]
        run = partial(dms_loss, dms, model, size, method, batch)
        saved[checkpointing] += saved_bytes(lambda r=run: r([0]), dms)
        flops[checkpointing] += count_flops(lambda r=run, n=readouts: r(n).backward(), grad=True) + readouts[0]
    saved[True] += recomputed(family, size, method, batch)
    return Step(total, trainable, buffers, outer + 2 * inner, saved, flops)


# ---- report


def memory(step: Step, place: str) -> dict[str, int]:
    """Bytes on one GPU, by what they are for, without the activations."""
    shards = GPUS if place == "sharded" else 1
    parts = {
        "weights": WEIGHT * step.total // shards + step.buffers,
        "gradients": GRADIENT * step.trainable // shards,
        "optimiser": OPTIMIZER * step.trainable // shards,
    }
    # DDP holds the gradients once more, in its buckets
    communication = {"one": 0, "ddp": GRADIENT * step.trainable, "sharded": step.gathered}
    return parts | {"communication": communication[place]}


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}" if count >= 5e7 else f"{count / 1e9:.2f}"


def _row(method: str, step: Step, place: str) -> str:
    parts = memory(step, place)
    totals = [sum(parts.values()) + step.activations[checkpointing] for checkpointing in (False, True)]
    columns = [METHODS[method], PLACES[place], *map(_gb, parts.values())]
    columns += [_gb(step.activations[False]), _gb(step.activations[True]), *(f"**{_gb(total)}**" for total in totals)]
    return f"| {' | '.join(columns)} |"


def _section(name: str, size: Size, steps: dict[str, Step]) -> str:
    rows = [_row(method, step, place) for (method, step), place in product(steps.items(), PLACES)]
    flops = [
        f"| {METHODS[method]} | {step.trainable / 1e6:,.1f} M of {step.total / 1e6:,.0f} M | "
        f"{step.flops[False] / 1e12:.1f} | {step.flops[True] / 1e12:.1f} |"
        for method, step in steps.items()
    ]
    return SECTION.format(
        name=name,
        tokens=f"{size.image_tokens} image + {size.text_tokens} text tokens",
        rows="\n".join(rows),
        flops="\n".join(flops),
    )


SECTION = """## {name}

{batch} samples a GPU, {tokens} each. Memory on one GPU in GB (10^9 bytes):

| trained | on | weights | gradients | optimiser | communication | activations | the same, checkpointing \
| **total** | **total, checkpointing** |
|---|---|---|---|---|---|---|---|---|---|
{rows}

| trained | parameters | TFLOP a step and GPU | the same, checkpointing |
|---|---|---|---|
{flops}
""".replace("{batch}", str(BATCH))

REPORT = """# Training at 7B and 13B

Written by `python benchmarks/scaling.py`; do not edit by hand. **Computed, not measured on a GPU**: the models are
built at their published sizes on PyTorch's meta device, which knows shapes but holds no numbers, and what a training
step would hold and do is counted. Real use is higher: CUDA itself (about half a GB), kernels' work space,
fragmentation, and short peaks within one operation (such as the float32 copy of the logits) are not in. With
modeling_dms {modeling_dms}, torch {torch}, transformers {transformers}, peft {peft}, Python {python}.

Ready configurations for `accelerate launch` are in `configuration/accelerate/`. Two processes on a CPU, DDP and FSDP2
are run by `tests/test_scale.py` on a tiny model; ZeRO-3 and everything on a GPU was never run.

{sections}
## What is counted

- **Trained.** *`dms` alone*: the backbone is frozen. *LoRA*: rank {rank} on the language model's `q_proj` and
  `v_proj`, and `dms`. *Full*: every parameter, the vision tower's as well. The scheduler is `learned`.
- **Weights, gradients, optimiser.** bfloat16 weights and gradients; AdamW's float32 copy of the weights and its two
  moments: 2 + 2 + 12 bytes for a trained parameter, 2 for a frozen one. The calibration's float32 buffers are on every
  GPU and count as weights.
- **Communication.** DDP: its buckets, the gradients once more. FSDP2 and ZeRO-3 hold an eighth of weights, gradients
  and optimiser states, but what is at work is whole: the embeddings, output layer, projector and `dms` (one
  group, whole all along) and two transformer layers, the one at work and the next, with the gradients of what is
  trained. ZeRO-3 has its own limits for this; its numbers are of the same size.
- **Activations.** Every storage that the forward pass saves for the backward pass, once, without the model's own
  tensors. A frozen vision tower saves nothing. A frozen language model does: the gradient of the modality weights runs
  back through all of its layers. So `dms` alone needs nearly as much as LoRA. With gradient checkpointing: what is
  saved at the layers' borders, and the inside of the largest layer, which is computed again. Attention by a fused
  (flash) kernel, which never writes the scores out. Double the batch, double the activations.
- **Operations.** Matrix products, convolutions and attention of forward and backward pass, two a multiply-add; where
  nothing is trained only the gradients of activations, and no backward pass at all through a frozen vision tower. The
  DMS part has everything: output layer, text-only pass, dropout passes, losses. Attention is counted without leaving
  out what lies above the diagonal. Checkpointing computes the layers' forward pass twice. The optimiser's own
  operations, a few per parameter, are not in.
- No padding; every text token of the prompt but the labelled {answer} is the text modality.
"""


def main() -> None:
    """Counts everything and writes the report."""
    parser = argparse.ArgumentParser(description="Memory and operations of a training step, on the meta device.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/scaling.md")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    steps: dict[str, dict[str, Step]] = {name: {} for name in SIZES}
    for name, method in tqdm(list(product(SIZES, METHODS)), desc="scaling", unit=" counts"):
        steps[name][method] = count_step(*SIZES[name], method)
    report = REPORT.format(
        sections="\n".join(_section(name, SIZES[name][1], found) for name, found in steps.items()),
        rank=RANK,
        answer=ANSWER,
        modeling_dms=modeling_dms.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        python=platform.python_version(),
    )
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(report, encoding="utf-8")
    print(f"{options.out} written")


if __name__ == "__main__":
    main()
