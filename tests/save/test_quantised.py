"""Loading with quantised weights, on a CPU: `dms` stays as it was saved, and answers and weights stay near."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from tests import tiny


pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
KINDS = ("torchao", "bitsandbytes")
# the user's own list replaces the library's; bitsandbytes' kernel for CPUs with AVX512 takes rows of whole blocks of
# 64 alone, which those of `down_proj`, 352, are not
KEPT = {"torchao": ["lm_head"], "bitsandbytes": ["lm_head", "down_proj"]}


def quantisation(kind):
    if kind == "bitsandbytes":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=KEPT[kind])
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def weight_class(kind):
    if kind == "bitsandbytes":
        from bitsandbytes.nn import Params4bit

        return Params4bit
    from torchao.quantization import Int8Tensor

    return Int8Tensor


@pytest.fixture(scope="module")
def prompts():
    return PromptCollator(load("demo-llava")[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, prompts):
    """A calibrated checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, _ = load("demo-llava")
    calibrate(model, prompts, load_easy_vqa("train"), 60)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def single(saved):
    """In single precision."""
    return AutoModelForImageTextToText.from_pretrained(saved)


@pytest.fixture(scope="module")
def quantised(saved):
    return {
        kind: AutoModelForImageTextToText.from_pretrained(saved, quantization_config=quantisation(kind))
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def batch(prompts):
    """Clean samples, then the same with images that calibration finds damaged."""
    samples = one_per_image(load_easy_vqa("test"), 20)
    return prompts([*samples, *(corrupt(sample, "image:occlusion", 5) for sample in samples)])


def answer(model, batch):
    """Answers, one token each, and modality weights."""
    out = model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True)
    return out.sequences[:, -1], out.modality_weights


def check_dms(model, expected):
    """`dms` is that of another model, to the last bit."""
    found, expected = model.dms.state_dict(), expected.dms.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is torch.Tensor, name
        assert found[name].dtype == value.dtype == torch.float32, name
        assert torch.equal(found[name], value), name


def check_backbone(model, kind):
    """All linear layers are quantised but those of `KEPT`."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    backbone = [name for name in linear if not name.startswith("dms.")]
    assert len([name for name in backbone if ".language_model." in name]) == 5 * 7
    for name in backbone:
        kept = name.endswith(tuple(KEPT[kind]))
        assert isinstance(linear[name].weight, weight_class(kind)) != kept, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_is_quantised_and_dms_is_not(single, quantised, kind):
    check_backbone(quantised[kind], kind)
    check_dms(quantised[kind], single)


@pytest.mark.parametrize(("kind", "near"), [("torchao", 0.02), ("bitsandbytes", 0.15)])
def test_answers_and_weights_are_near(single, quantised, batch, kind, near):
    answers, weights = answer(single, batch)
    found, found_weights = answer(quantised[kind], batch)
    assert (found == answers).float().mean() >= 0.9
    assert (found_weights - weights).abs().mean() < near
    assert (weights[:20] - 0.5).abs().mean() < 0.05  # clean
    assert weights[20:, 0].mean() < 0.1  # occluded
    assert found_weights[20:, 0].mean() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_one_answers_the_same(quantised, batch, tmp_path, kind):
    quantised[kind].save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    check_backbone(again, kind)
    check_dms(again, quantised[kind])
    answers, weights = answer(quantised[kind], batch)
    found, found_weights = answer(again, batch)
    assert torch.equal(found, answers)
    torch.testing.assert_close(found_weights, weights, rtol=0, atol=1e-4)


def test_a_quantised_model_is_calibrated(saved, prompts, batch):
    model = AutoModelForImageTextToText.from_pretrained(saved, quantization_config=quantisation("torchao"))
    for detector in model.dms.calibration.detectors:
        detector.count.zero_()
    assert torch.equal(answer(model, batch)[1], torch.full((40, 2), 0.5))
    calibrate(model, prompts, load_easy_vqa("train"), 60)
    weights = answer(model, batch)[1]
    assert (weights[:20] - 0.5).abs().mean() < 0.05
    assert weights[20:, 0].mean() < 0.1


@torch.no_grad()
def test_a_quantised_output_layer_is_read(tmp_path):
    """torchao puts a tensor of its own into a plain layer."""
    from torchao.quantization import Int8WeightOnlyConfig

    model = tiny.calibrated("llava-llama")
    model.save_pretrained(tmp_path)
    everything = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=everything)
    assert isinstance(loaded.lm_head.weight, weight_class("torchao"))
    assert type(loaded.dms.views[0].shared.weight) is nn.Parameter
    inputs = tiny.clean_samples(8)[0]
    signals, found = model(**inputs).modality_signals, loaded(**inputs).modality_signals
    for name in ("confidence", "uncertainty", "energy"):
        torch.testing.assert_close(found[name], signals[name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_every_backbone_says_that_dms_is_not_quantised(backbone):
    """And what its vanilla class says as well."""
    vanilla = tiny.VANILLA[tiny.model_class(backbone)]._keep_in_fp32_modules or ()
    assert set(tiny.model_class(backbone)._keep_in_fp32_modules) == {*vanilla, "dms"}
    assert {*vanilla, "dms"} <= tiny.shared(backbone)._keep_in_fp32_modules
