"""The counting functions of `benchmarks/scaling.py`, on models small enough to be real."""

import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import scaling
    finally:
        sys.path.remove(str(BENCHMARKS))
    return scaling


def small(scaling, family):
    text = {"llava": {"num_key_value_heads": 4, "intermediate_size": 128}, "blip2": {"ffn_dim": 128}}
    qformer = {"llava": None, "blip2": (64, 2, 4)}
    return scaling.Size(
        "small",
        (64, 128, 3, 4),
        scaling._text(64, 3, 4, 199, **text[family]),
        scaling.CONTEXT + scaling.ANSWER,
        image=56,
        qformer=qformer[family],
        tied=False,
    )


@pytest.mark.parametrize("family", ["llava", "blip2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["dms", "lora", "full"])
def test_every_layer_saves_as_much(scaling, family, checkpointing, method):
    """So the difference of two depths is one layer, of the language model and of the vision tower."""
    size = small(scaling, family)

    def saved(text, vision):
        return scaling.activations(family, scaling.deeper(size, text, vision), method, 2, checkpointing)

    assert saved(4, 3) - saved(3, 3) == saved(3, 3) - saved(2, 3) > 0
    assert saved(3, 5) - saved(3, 4) == saved(3, 4) - saved(3, 3)
    if not checkpointing:  # a frozen vision tower saves nothing; checkpointing may keep its layers' inputs
        assert (saved(3, 4) > saved(3, 3)) == (method == "full")


@pytest.mark.parametrize("family", ["llava", "blip2"])
@pytest.mark.parametrize("method", ["dms", "lora", "full"])
def test_parameters_are_the_real_models(scaling, family, method):
    size = small(scaling, family)
    step = scaling.count_step(family, size, method, batch=2)
    real = scaling.prepare(family, size, method, device="cpu")
    assert step.total == sum(p.numel() for p in real.parameters())
    assert step.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert step.buffers == sum(b.nbytes for b in real.buffers())
    for place in scaling.PLACES:
        assert min(scaling.memory(step, place).values()) >= 0


@pytest.mark.parametrize("family", ["llava", "blip2"])
@pytest.mark.parametrize("method", ["dms", "lora", "full"])
def test_a_whole_real_step_saves_and_computes_as_much(scaling, family, method):
    """Of the parts, counted on the meta device, against `forward` and `backward` of a model with weights."""
    import overhead

    size = small(scaling, family)
    step = scaling.count_step(family, size, method, batch=2)
    torch.manual_seed(0)
    model = scaling.prepare(family, size, method, device="cpu")
    inputs = overhead.arguments("learned", overhead.prompt(family, size, 2, labels=True))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()

    def run():
        return model(**inputs).loss

    with scaling.fused():
        saved = scaling.saved_bytes(run, model)
        flops = overhead.count_flops(lambda: run().backward(), grad=True)
    # not equal: kernels keep small things of their own, and the prompt's ids and masks are not counted
    assert step.activations[False] == pytest.approx(saved, rel=0.02)
    assert step.flops[False] == pytest.approx(flops, rel=0.001)
