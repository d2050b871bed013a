"""What Dynamic Modality Scheduling costs: vanilla classes against DMS in one interleaved run, and exact counts at the
published sizes.

    python benchmarks/overhead.py [--quick] [--out benchmarks/README.md]

Weights are random, built from configurations: cost does not depend on their values. `overhead.json`, written beside
the report, holds every raw number; the report is made from it alone.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm.auto import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
)

import modeling_dms
from modeling_dms import (
    DMSBlip2Config,
    DMSBlip2ForConditionalGeneration,
    DMSConfig,
    DMSLlavaConfig,
    DMSLlavaForConditionalGeneration,
)
from modeling_dms._compat import CACHE
from modeling_dms.calibrate.statistics import Statistics
from modeling_dms.dms import read_out
from modeling_dms.evidence.pixels import PIXEL_STATISTICS, pixel_statistics
from modeling_dms.evidence.surprisal import SURPRISAL_STATISTICS
from modeling_dms.observe.prompt import ModalityFeatures
from modeling_dms.steer.bias import key_bias
from modeling_dms.steer.masks import Steering, steered


CLASSES = {
    "llava": (LlavaForConditionalGeneration, LlavaConfig, DMSLlavaForConditionalGeneration, DMSLlavaConfig),
    "blip2": (Blip2ForConditionalGeneration, Blip2Config, DMSBlip2ForConditionalGeneration, DMSBlip2Config),
}
# what is timed, and its scheduler: for `rule` nothing is suspicious, for `re-weighted` an image is damaged and a text
# was to be read once more
SETTINGS = {"static": "uniform", "rule": "rule", "re-weighted": "rule", "learned": "learned"}
CONTROL = "vanilla again"
TARGETS = {"prefill": 1.02, "decode": 1.02, "training": 1.05, "memory": 1.03, "flops": 1.002, "parameters": 1.005}
TWICE = 2.0  # of a prefill that is run once more with its weights
CONTEXT, ANSWER = 40, 20  # tokens of the text modality, labelled tokens of a training step
PER_PHASE = {"prefill": "prefill", "decode": "decode, per token", "training": "training step"}


@dataclass(frozen=True)
class Size:
    """Sizes of one backbone and of its prompt."""

    title: str
    vision: tuple[int, int, int, int]  # hidden, intermediate, layers, heads
    text: dict[str, Any]
    text_tokens: int
    image: int = 224
    qformer: tuple[int, int, int] | None = None  # hidden, layers, heads
    tied: bool = True

    @property
    def image_tokens(self) -> int:
        return (self.image // 14) ** 2 if self.qformer is None else 32


def _text(hidden: int, layers: int, heads: int, vocab: int, **own: int) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return dict(zip(names, (hidden, layers, heads, vocab), strict=True)) | own


TIMED = {
    "llava": Size(
        "LLaVA: ViT-L/14, TinyLlama-1.1B shape",
        (1024, 4096, 24, 16),
        _text(2048, 22, 32, 32000, num_key_value_heads=4, intermediate_size=5632),
        80,
        tied=False,
    ),
    "blip2": Size(
        "BLIP-2: ViT-L/14, Q-Former 12 x 768, OPT-1.3B shape",
        (1024, 4096, 24, 16),
        _text(2048, 24, 32, 50272, ffn_dim=8192),
        300,
        qformer=(768, 12, 12),
    ),
}
QUICK = {
    "llava": Size(
        "LLaVA, 4 + 4 layers",
        (384, 1536, 4, 6),
        _text(576, 4, 9, 8192, num_key_value_heads=3, intermediate_size=1536),
        80,
    ),
    "blip2": Size(
        "BLIP-2, 4 + 2 + 4 layers", (384, 1536, 4, 6), _text(768, 4, 12, 8192, ffn_dim=3072), 300, qformer=(384, 2, 6)
    ),
}
PUBLISHED = {
    "llava": Size(
        "LLaVA-1.5-7B",
        (1024, 4096, 24, 16),
        _text(4096, 32, 32, 32064, num_key_value_heads=32, intermediate_size=11008),
        CONTEXT,
        image=336,
        tied=False,
    ),
    "blip2": Size(
        "BLIP-2-OPT-2.7B",
        (1408, 6144, 39, 16),
        _text(2560, 32, 32, 50304, ffn_dim=10240),
        CONTEXT,
        qformer=(768, 12, 12),
    ),
}


def build(family: str, size: Size, setting: str) -> Any:
    """A model with random weights; `setting` is `"vanilla"` or one of `SETTINGS`, made to give non-uniform weights."""
    vanilla_class, vanilla_config, dms_class, dms_config = CLASSES[family]
    hidden, intermediate, layers, heads = size.vision
    vision: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size.image,
        "patch_size": 14,
        "initializer_range": 0.02,
    }
    parts: dict[str, Any] = {"image_token_index": size.text["vocab_size"] - 1}
    if size.qformer is None:
        parts["vision_config"] = CLIPVisionConfig(**vision)
        parts["text_config"] = LlamaConfig(**size.text, tie_word_embeddings=size.tied)
        parts |= {"image_seq_length": size.image_tokens, "tie_word_embeddings": size.tied}
    else:
        width, depth, q_heads = size.qformer
        parts["vision_config"] = Blip2VisionConfig(**vision)
        parts["qformer_config"] = Blip2QFormerConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=q_heads, intermediate_size=4 * width
        )
        parts["text_config"] = OPTConfig(**size.text, word_embed_proj_dim=size.text["hidden_size"])
        parts["num_query_tokens"] = size.image_tokens
    if setting == "vanilla":
        return vanilla_class(vanilla_config(**parts)).eval()
    model = dms_class(dms_config(**parts, dms_config=DMSConfig(scheduler=cast(Any, SETTINGS[setting])))).eval()
    # as if calibration had remembered one clean sample, whose score this one's image, and its text within the prompt,
    # just exceed, or do not: all score 0
    exceeded = setting != "rule"
    for detector, higher in zip(model.dms.calibration.detectors, (exceeded, False, exceeded), strict=True):
        detector.count.fill_(len(detector.clean))
        detector.clean.fill_(-0.5 if higher else 1.0)
    if setting == "learned":
        nn.init.normal_(model.dms.scheduler.output.weight, generator=torch.Generator().manual_seed(0))
        model.dms.scheduler.output.bias.data.copy_(torch.tensor([-1.0, 1.0]))
    return model


def prompt(family: str, size: Size, batch: int, labels: bool = False) -> dict[str, Tensor]:
    """A random prompt: the image tokens, then the text, of which `CONTEXT` tokens are the text modality."""
    generator = torch.Generator().manual_seed(batch)
    length, vocab = size.image_tokens + size.text_tokens, size.text["vocab_size"]
    input_ids = torch.randint(10, vocab - 1, (batch, length), generator=generator)
    input_ids[:, : size.image_tokens] = vocab - 1
    modality_ids = torch.zeros_like(input_ids)
    modality_ids[:, : size.image_tokens] = 1
    modality_ids[:, size.image_tokens : size.image_tokens + CONTEXT] = 2
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch, 3, size.image, size.image, generator=generator),
        "modality_ids": modality_ids,
    }
    if labels:
        inputs["labels"] = torch.full_like(input_ids, -100)
        inputs["labels"][:, -ANSWER:] = input_ids[:, -ANSWER:]
    return inputs


def arguments(setting: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model of a setting takes of `inputs`: the vanilla classes know no modalities."""
    if setting not in SETTINGS:
        return {name: value for name, value in inputs.items() if name != "modality_ids"}
    if setting == "learned" and "labels" in inputs:
        target = torch.tensor([0.3, 0.7]).expand(len(inputs["input_ids"]), -1)
        return {**inputs, "schedule_target": target}
    return inputs


# ---- time


def _clock(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


@torch.no_grad()
def prefill(model: Any, setting: str, inputs: dict[str, Tensor]) -> Any:
    """One prefill, as `generate` does it."""
    return model(**arguments(setting, inputs), use_cache=True, logits_to_keep=1)


def train_step(model: Any, setting: str, inputs: dict[str, Tensor]) -> None:
    """Forward and backward with labels, every parameter trainable; no optimiser, which would only dilute the ratio."""
    model(**arguments(setting, inputs), use_cache=False).loss.backward()


def decoder(family: str, model: Any, setting: str, inputs: dict[str, Tensor], output: Any) -> Callable[[], Any]:
    """One decoding step per call, as `generate` does it: the cache grows, weights and bias stay the prefill's."""
    cache = output[CACHE] if family == "llava" else output.language_model_outputs[CACHE]
    token = inputs["input_ids"][:, -1:]
    state = {"mask": inputs["attention_mask"]}
    # LLaVA's weights go along with the cache; BLIP-2's `generate` steers the whole of its language model's
    steering = None
    if setting in SETTINGS and family == "blip2":
        bias = key_bias(output.modality_weights, output.modality_ids)
        steering = Steering(model._text_configs, bias) if bool(bias.any()) else None
    stepped = model if family == "llava" else model.language_model

    @torch.no_grad()
    def step() -> Any:
        state["mask"] = torch.cat([state["mask"], torch.ones_like(token)], 1)
        with steered(steering):
            return stepped(
                input_ids=token, **{CACHE: cache}, attention_mask=state["mask"], use_cache=True, logits_to_keep=1
            )

    return step


def check(setting: str, output: Any, vanilla: Any) -> None:
    """Raises `RuntimeError` unless those that are to equal vanilla do, and the others really are steered."""
    same = torch.equal(output.logits, vanilla.logits)
    if setting in ("static", "rule", CONTROL) and not same:
        raise RuntimeError(f"{setting}: logits differ from the vanilla class")
    if setting in ("re-weighted", "learned") and (same or float((output.modality_weights - 0.5).abs().min()) < 0.1):
        raise RuntimeError(f"{setting}: weights {output.modality_weights.tolist()} are too close to uniform")


def interleave(
    names: list[str], measure: Callable[[str], float], seconds: float, least: int, most: int, label: str
) -> list[dict[str, float]]:
    """Rounds that measure every name once, in rotating order.

    Stops after `most` rounds, or after `least` once `seconds` have passed.
    """
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    with tqdm(total=most, desc=label, unit=" rounds", leave=False) as progress:
        while len(rounds) < most and (len(rounds) < least or time.perf_counter() - start < seconds):
            shift = len(rounds) % len(names)
            gc.collect()
            rounds.append({name: measure(name) for name in names[shift:] + names[:shift]})
            progress.update()
    return rounds


def time_family(family: str, size: Size, options: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Seconds of every phase, batch size, setting and round. All models hold the same parameters."""
    vanilla = build(family, size, "vanilla")
    models = {"vanilla": vanilla, CONTROL: vanilla}
    for setting in SETTINGS:
        models[setting] = build(family, size, setting)
        # the same tensors, so that no model profits from where its weights happen to lie
        models[setting].load_state_dict(vanilla.state_dict(keep_vars=True), strict=False, assign=True)
    names, cells = list(models), []
    for batch in options.batches:
        inputs, labelled = prompt(family, size, batch), prompt(family, size, batch, labels=True)
        # the round that does not count
        outputs = {name: prefill(model, name, inputs) for name, model in models.items()}
        for name in names:
            check(name, outputs[name], outputs["vanilla"])

        def timed_prefill(name: str, inputs: dict = inputs, outputs: dict = outputs) -> float:
            seconds, outputs[name] = _clock(lambda: prefill(models[name], name, inputs))
            return seconds

        def timed_step(name: str, inputs: dict = labelled) -> float:
            seconds, _ = _clock(lambda: train_step(models[name].train(), name, inputs))
            models[name].eval().zero_grad(set_to_none=True)
            return seconds

        def record(phase: str, rounds: list[dict[str, float]], batch: int = batch) -> None:
            cells.append({"backbone": family, "batch": batch, "phase": phase, "rounds": rounds})
            progress.update()

        label, tokens = f"{family}, batch {batch}", options.tokens
        record("prefill", interleave(names, timed_prefill, *options.prefill, f"{label}, prefill"))
        steps = {name: decoder(family, model, name, inputs, outputs[name]) for name, model in models.items()}

        def timed_token(name: str, steps: dict = steps) -> float:
            return _clock(steps[name])[0]

        # one token more, which does not count
        record("decode", interleave(names, timed_token, 0, tokens + 1, tokens + 1, f"{label}, decode")[1:])
        outputs.clear()
        steps.clear()
        timed_step("learned")  # the first step does not count; this one runs every operation that the others run
        trained = [name for name in names if name != CONTROL]
        record("training", interleave(trained, timed_step, *options.training, f"{label}, training"))
    return cells


# ---- memory


def _peak() -> float:
    """Highest resident memory of this process since the last reset, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def probe_memory(family: str, size: Size, setting: str, cells: list[tuple[str, int]]) -> None:
    """Prints the peak memory of one model, in MiB: after the imports, and of two runs of each phase and batch size."""
    imports = _peak()
    model = build(family, size, setting)
    peaks = []
    for phase, batch in cells:
        inputs = prompt(family, size, batch, labels=phase == "training")
        peaks.append([])
        for _ in range(2):
            # `ru_maxrss` would show the construction, which holds more than a prefill, and cannot be reset
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            if phase == "training":
                train_step(model.train(), setting, inputs)
                model.eval().zero_grad(set_to_none=True)
            else:
                prefill(model, setting, inputs)
            peaks[-1].append(_peak())
    print(json.dumps({"imports": imports, "peaks": peaks}))


def measure_memory(options: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Peak memory of every setting, each in a process of its own."""
    jobs = [(family, setting) for family in TIMED for setting in ("vanilla", *options.settings)]
    # a fixed threshold: with the adaptive one, how much freed memory the allocator keeps differs from run to run
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}

    def probe(job: tuple[str, str]) -> list[dict[str, Any]]:
        command = [sys.executable, __file__, "--probe", *job, *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"memory probe {' '.join(job)} failed:\n{done.stderr}")
        progress.update()
        read = json.loads(done.stdout.splitlines()[-1])
        return [
            {"backbone": job[0], "setting": job[1], "phase": phase, "batch": batch}
            | {"imports": read["imports"], "peaks": peaks}
            for (phase, batch), peaks in zip(options.memory, read["peaks"], strict=True)
        ]

    with ThreadPoolExecutor(2) as pool:
        return [cell for cells in pool.map(probe, jobs) for cell in cells]


# ---- exact counts


def _mv_flops(matrix: tuple[int, ...], vector: tuple[int, ...], *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _sdpa_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def count_flops(run: Callable[[], Any], grad: bool = False) -> int:
    """Floating-point operations of matrix products, convolutions and attention (two a multiply-add)."""
    # operations that torch's table of formulas lacks
    formulas = {
        torch.ops.aten.mv: _mv_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
    }
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def vanilla_flops(family: str, model: Any, size: Size) -> tuple[int, int]:
    """A prefill of batch 1 on the meta device, in the calls that `forward` makes of it: what makes image tokens, and
    the language model.

    Not `forward` itself: it looks at the values of ids and masks, which meta tensors do not have.
    """
    pixels = torch.empty(1, 3, size.image, size.image, device="meta")
    embeds = torch.empty(1, size.image_tokens + size.text_tokens, size.text["hidden_size"], device="meta")

    def images() -> None:
        if family == "llava":
            model.get_image_features(pixel_values=pixels, return_dict=True)
            return
        states = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=states).last_hidden_state
        model.language_projection(queries)

    language = model if family == "llava" else model.language_model
    return count_flops(images), count_flops(lambda: language(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))


def real_dms(model: Any) -> Any:
    """The `dms` submodule on the CPU, with random weights, because it looks at values."""
    dms = getattr(model.dms, "original_module", model.dms).to_empty(device="cpu")
    for parameter in dms.parameters():
        nn.init.normal_(parameter)
    for part in dms.calibration.modules():
        if isinstance(part, Statistics):
            part.reset()
    return dms


def features_of(dms: Any, tokens: Sequence[Tensor], in_prompt: bool = True) -> list[ModalityFeatures]:
    """Random features of the tokens of each modality, (B, N, D), the text as read within the prompt or alone."""
    found = []
    numbers = PIXEL_STATISTICS, SURPRISAL_STATISTICS
    for index, (own, count) in enumerate(zip(tokens, numbers, strict=True)):
        mask, batch = torch.ones(own.shape[:2], dtype=torch.bool), len(own)
        statistics = torch.randn(batch, *dms.calibration.modalities[index].mean.shape)
        content = torch.randn(batch, len(dms.calibration.agreement.get_buffer(f"{index}_location")))
        found.append(
            ModalityFeatures(
                own, mask, statistics, content, torch.randn(batch, count), in_prompt=in_prompt and index == 1
            )
        )
    return found


def text_flops(model: Any, size: Size, batch: int = 1) -> tuple[int, int]:
    """The language model over the text modality alone, and the output layer at as many places, on the meta device."""
    length = CONTEXT + (model._begin_of_text is not None)
    tokens = torch.empty(batch, length, size.text["hidden_size"], device="meta", dtype=model.dtype)
    stack, head = model._text_stack(), model.get_output_embeddings()
    # all tokens are text, so leaving out the mask, whose values the library reads, changes no count, nor does a cache
    text = count_flops(lambda: stack(inputs_embeds=tokens, use_cache=True))
    return text, count_flops(lambda: read_out(tokens[:, :CONTEXT].flatten(0, 1), head.weight, head.bias))


def pixel_flops(size: Size, batch: int = 1) -> int:
    """The statistics of the pixels."""
    return count_flops(lambda: pixel_statistics(torch.rand(batch, 3, size.image, size.image)))


def dms_flops(model: Any, size: Size) -> dict[str, int]:
    """What DMS adds to a prefill of batch 1, by part; `alone` where the text is suspicious and read once more.

    The `dms` submodule runs whole, on the CPU, because it looks at values; the output layer that it calls and the
    text-only pass through the language model run on the meta device.
    """
    dms, readouts = real_dms(model), [0]
    head = model.get_output_embeddings()

    def readout(states: Tensor, tokens: Tensor | None = None) -> Tensor:
        out = torch.empty(0, device="meta")

        def run() -> None:
            nonlocal out
            out = read_out(states.to("meta"), head.weight, head.bias, None if tokens is None else tokens.to("meta"))

        readouts[0] += count_flops(run)
        return torch.zeros(out.shape)

    features = features_of(dms, [torch.randn(1, n, size.text["hidden_size"]) for n in (size.image_tokens, CONTEXT)])
    inside = count_flops(lambda: dms(features, torch.ones(1, 2, dtype=torch.bool), readout))
    inside += count_flops(lambda: dms.calibration.suspicious(features[1]))
    text, surprisal = text_flops(model, size)
    return {
        "readout": readouts[0] + surprisal,
        "other": inside - readouts[0] + pixel_flops(size),
        "alone": text + surprisal,
    }


def _sizes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())


def count(family: str, size: Size) -> dict[str, Any]:
    """Operations of a prefill of batch 1, parameters and buffers, with and without DMS, on the meta device."""
    with torch.device("meta"):
        vanilla, dms = (build(family, size, setting).requires_grad_(False) for setting in ("vanilla", "rule"))
    images, language = vanilla_flops(family, vanilla, size)
    counts: dict[str, Any] = {"backbone": family, "title": size.title, "flops": images + language}
    counts["language"] = language
    for name, model in (("vanilla", vanilla), ("dms", dms)):
        counts[name] = {"parameters": _sizes(model.parameters()), "buffers": _sizes(model.buffers())}
    return counts | {"dms_flops": dms_flops(dms, size)}


def check_counts(family: str) -> None:
    """Raises `RuntimeError` unless the parts add up to what a whole prefill of a real, small model takes."""
    size, parts = QUICK[family], count(family, QUICK[family])
    inputs, expected = prompt(family, size, 1), {"vanilla": parts["flops"]}
    expected["rule"] = parts["flops"] + parts["dms_flops"]["readout"] + parts["dms_flops"]["other"]
    for setting, flops in expected.items():
        model = build(family, size, setting).requires_grad_(False)
        whole = count_flops(lambda model=model, setting=setting: prefill(model, setting, inputs))
        if whole != flops:
            raise RuntimeError(f"{family}, {setting}: the parts make {flops} operations, the whole prefill {whole}")


# ---- report


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Distribution-free interval of the median: two order statistics, and the coverage they have.

    At least 95% where the number of rounds allows it, else the whole range.
    """
    n, ordered = len(ratios), sorted(ratios)
    outside = [2 * sum(comb(n, j) for j in range(k + 1)) / 2**n for k in range(n // 2)]
    k = max((k for k, share in enumerate(outside) if share <= 0.05), default=0)
    return ordered[k], ordered[n - 1 - k], 1 - (outside[k] if outside else 1)


def _judged(low: float, high: float, target: float) -> str:
    return "✓" if high <= target else "✗" if low > target else "~"


def _time_row(cell: dict[str, Any]) -> str:
    rounds = cell["rounds"]

    def ratio(name: str) -> str:
        target = TWICE if name == "re-weighted" and cell["phase"] == "prefill" else TARGETS[cell["phase"]]
        if name not in rounds[0]:
            return ""
        ratios = [r[name] / r["vanilla"] for r in rounds]
        low, high, _ = interval(ratios)
        judged = name != CONTROL and (name != "learned" or cell["phase"] != "prefill")
        mark = _judged(low, high, target) + " " if judged else ""
        taken = "" if name == CONTROL else f"<br>{median(r[name] for r in rounds) * 1e3:.0f} ms"
        return f"{mark}{median(ratios):.3f} [{low:.3f}, {high:.3f}]{taken}"

    columns = [
        cell["backbone"],
        str(cell["batch"]),
        PER_PHASE[cell["phase"]],
        f"≤ {TARGETS[cell['phase']]:.2f}",
        f"{median(r['vanilla'] for r in rounds) * 1e3:.0f} ms",
        *(ratio(name) for name in (*SETTINGS, CONTROL)),
        f"{len(rounds)}, {interval([r['vanilla'] for r in rounds])[2]:.0%}",
    ]
    return f"| {' | '.join(columns)} |"


def _memory_rows(cells: list[dict[str, Any]]) -> list[str]:
    rows, target = [], TARGETS["memory"]
    peaks = {(c["backbone"], c["phase"], c["batch"], c["setting"]): (median(c["peaks"]), c["imports"]) for c in cells}
    for family, phase, batch in dict.fromkeys(key[:3] for key in peaks):
        vanilla, imports = peaks[family, phase, batch, "vanilla"]
        row = [family, str(batch), PER_PHASE[phase], f"≤ {target:.2f}", f"{vanilla:.0f} MiB"]
        for setting in SETTINGS:
            if (family, phase, batch, setting) not in peaks:
                row.append("")
                continue
            peak, own = peaks[family, phase, batch, setting]
            whole, net = peak / vanilla, (peak - own) / (vanilla - imports)
            row.append(f"{_judged(whole, whole, target)} {whole:.3f}, net {net:.3f}<br>{peak:.0f} MiB")
        rows.append(f"| {' | '.join(row)} |")
    return rows


def _count_rows(counts: list[dict[str, Any]]) -> list[str]:
    rows = []
    for c in counts:
        extra, flops = c["dms_flops"], c["flops"]
        ratio = 1 + (extra["readout"] + extra["other"]) / flops
        parameters = c["dms"]["parameters"] / c["vanilla"]["parameters"]
        added = {kind: (c["dms"][kind] - c["vanilla"][kind]) / 1e6 for kind in ("parameters", "buffers")}
        columns = [
            c["title"],
            f"{flops / 1e9:.1f}",
            *(f"{extra[part] / 1e9:.2f}" for part in ("readout", "other")),
            f"{_judged(ratio, ratio, TARGETS['flops'])} {ratio:.4f}",
            f"{ratio + extra['alone'] / flops:.4f}",
            f"{ratio + (extra['alone'] + c['language']) / flops:.3f}",
            f"{c['vanilla']['parameters'] / 1e6:.1f} M",
            f"+{added['parameters']:.2f} M",
            f"{_judged(parameters, parameters, TARGETS['parameters'])} {parameters:.4f}",
            f"+{added['buffers']:.2f} M",
        ]
        rows.append(f"| {' | '.join(columns)} |")
    return rows


REPORT = """# What DMS costs

Written by `benchmarks/overhead.py` from `overhead.json`; edit neither by hand. To run it again:

```
python benchmarks/overhead.py           # all of it; leave the machine idle meanwhile
python benchmarks/overhead.py --quick   # does it still run? under a minute, small models, report printed
```

{warning}Measured on {cores} CPU cores ({architecture}), {threads} threads, float32; modeling_dms {modeling_dms},
torch {torch}, transformers {transformers}, Python {python}; in {minutes:.0f} minutes, with a load average of
{load:.2f} before{busy}.

Settings: `static` is `scheduler="uniform"`; `rule`, the default, on prompts of which nothing is suspicious;
`re-weighted`, the same where an image is damaged and the text was suspicious, so that it is read alone and the
prompt once more with its weights (target of that prefill: ≤ {twice:.2f}); `learned` the trained scheduler, whose
weights are never uniform and made in advance. All but the first with {mc_samples} passes of Monte Carlo dropout.
Every ratio is DMS / vanilla. ✓ within the target, ✗ not, ~ the interval holds the target.

## Time

| backbone | batch | what | target | vanilla | {settings} | {control} | rounds, coverage |
|---|---|---|---|---|---|---|---|---|---|---|
{time}

Median of the ratios of single rounds and a distribution-free interval of that median (two order statistics; the last
column has the number of rounds and their coverage). In a round every model runs once, in rotating order; the first
run of everything does not count. All models hold the same parameter tensors. `{control}` is the same vanilla model
timed twice: how far from 1 it is, is noise.

{prompts}
- Of the text, {context} tokens are the text modality (a context passage, by `modality_ids`); the rest, the question,
  is neutral. No padding.
- Prefill: `forward` with `use_cache=True, logits_to_keep=1`. Decode: single tokens on the prefill's cache, with the
  weights it returned; a round is one token.
- Training step: forward and backward, {answer} labelled tokens, every parameter trainable, all DMS losses at their
  defaults (`learned` also has a `schedule_target`), no optimiser.

## Memory

| backbone | batch | what | target | vanilla | {settings} |
|---|---|---|---|---|---|---|---|---|
{memory}

Peak resident memory of a process that holds one model (`VmHWM`, reset before each of two runs, so without the
construction of the model; their median). `net` leaves out what the imports take. One thread and a fixed
`MALLOC_MMAP_THRESHOLD_`: what is in use counts, not what the allocator keeps in reserve.

## Exact counts

| size | GFLOPs, vanilla | + output layer | + rest | ratio, target ≤ {flops_target} | suspicious text | re-weighted \
| parameters | added | ratio, target ≤ {parameters_target} | buffers added |
|---|---|---|---|---|---|---|---|---|---|---|
{counts}

A prefill of batch 1; published sizes with their image tokens and {context} text tokens, the others with the prompts
above. Matrix products, convolutions and attention (`FlopCounterMode` and two formulas that it lacks), two operations a
multiply-add. The output layer is read for the unimodal views, their dropout passes, and every text token's surprisal;
the statistics of the pixels are part of the rest. A suspicious text, one of ten clean ones, is read once more, alone;
a prompt whose weights are not uniform once more in whole but for its images. The backbone runs on the meta device;
the `dms` submodule, which looks at values, runs whole on the CPU at its real width and calls the output layer on the
meta device. For a small real model the sum is checked to equal, to the digit, the count of a whole prefill. `static`
adds no operation to a prefill.
"""


def render(results: dict[str, Any]) -> str:
    """The report, in Markdown, from what `overhead.json` holds."""
    machine, sizes = results["machine"], (QUICK if results["quick"] else TIMED)
    prompts = [f"- `{f}`: {s.title}; {s.image_tokens} image + {s.text_tokens} text tokens." for f, s in sizes.items()]
    return REPORT.format(
        **machine,
        minutes=results["seconds"] / 60,
        warning="**Quick run of models of a few layers: these ratios mean nothing.**\n\n" if results["quick"] else "",
        busy=" (**the machine was busy: times are noisy**)" if machine["load"] > 0.5 else "",
        mc_samples=DMSConfig().mc_samples,
        settings=" | ".join(SETTINGS),
        control=CONTROL,
        time="\n".join(map(_time_row, results["time"])),
        prompts="\n".join(prompts),
        context=CONTEXT,
        answer=ANSWER,
        memory="\n".join(_memory_rows(results["memory"])),
        flops_target=TARGETS["flops"],
        twice=TWICE,
        parameters_target=TARGETS["parameters"],
        counts="\n".join(_count_rows(results["counts"])),
    )


def main() -> None:
    """Runs everything, or with `--probe` one memory measurement."""
    parser = argparse.ArgumentParser(description="What Dynamic Modality Scheduling costs.")
    parser.add_argument("--quick", action="store_true", help="smaller models and few rounds, under a minute")
    parser.add_argument("--out", type=Path, help="default: benchmarks/README.md; with --quick the report is printed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    sizes = QUICK if options.quick else TIMED
    # of rounds: seconds after which they may end, least, most
    if options.quick:
        options.batches, options.memory, options.settings = [1], [("prefill", 1)], ["rule"]
        options.prefill, options.training, options.tokens = (0, 2, 2), (0, 2, 2), 4
    else:
        options.batches, options.settings, options.memory = [1], ["rule", "re-weighted"], [("prefill", 1)]
        options.prefill, options.training, options.tokens = (60, 6, 15), (60, 3, 9), 24
    if options.probe:
        family, setting = options.probe
        probe_memory(family, sizes[family], setting, options.memory)
        return
    torch.set_num_threads(options.threads)
    if options.out is None and not options.quick:
        options.out = Path(__file__).parent / "README.md"
    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "threads": options.threads,
        "python": platform.python_version(),
        "modeling_dms": modeling_dms.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0],
    }
    start = time.perf_counter()
    total = len(TIMED) * (2 + 1 + len(options.settings) + 3 * len(options.batches))
    with tqdm(total=total, desc="overhead", unit=" measurements") as progress:
        counts = []
        for family in TIMED:
            check_counts(family)
            for size in (PUBLISHED[family], sizes[family]):
                counts.append(count(family, size))
                progress.update()
        memory = measure_memory(options, progress)
        timed = [cell for family, size in sizes.items() for cell in time_family(family, size, options, progress)]
    results = {"quick": options.quick, "machine": machine, "seconds": time.perf_counter() - start}
    results |= {"time": timed, "memory": memory, "counts": counts}
    report = render(results)
    if options.out is None:
        print(report)
        return
    options.out.with_name("overhead.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.write_text(report, encoding="utf-8")
    print(f"{options.out} written in {results['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    main()
