"""Loading: vanilla checkpoints lose nothing, DMS checkpoints come back bit for bit, broken ones are refused."""

import contextlib
import io
import json
import logging
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Blip2ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
)

from modeling_dms import (
    DMSBlip2Config,
    DMSConfig,
    DMSInternVLConfig,
    DMSLlavaConfig,
    DMSLlavaForConditionalGeneration,
    DMSModelForImageTextToText,
)
from modeling_dms.training.models.loading import load
from tests import tiny


EVERY = (*tiny.BACKBONES, "retrieval")
SMALL = {"shared_size": 8, "mc_samples": 4, "subspace_size": 8, "scheduler_hidden_size": 8}


def inputs_for(backbone):
    return tiny.prompts(backbone, "mixed", "left")


@torch.no_grad()
def answer(model, backbone, **kwargs):
    """Whatever the model says of fixed inputs: logits and, from a DMS class, weights."""
    out = model(**inputs_for(backbone), **kwargs)
    return (out.logits_per_image if backbone == "retrieval" else out.logits), out.get("modality_weights")


def assert_same_tensors(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def base(state):
    return {name: value for name, value in state.items() if not name.startswith("dms.")}


def legacy_name(name):
    """The names that LLaVA checkpoints on the Hub have."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.removeprefix("model.")


# ---- vanilla checkpoints


def write_vanilla(directory, backbone, rename=lambda name: name):
    """A vanilla checkpoint with the names of today's classes, or others."""
    vanilla = tiny.vanilla_of(tiny.build(backbone))
    vanilla.config.save_pretrained(directory)
    state = {rename(name): value.clone().contiguous() for name, value in vanilla.state_dict().items()}
    if backbone == "blip2-t5":  # tied to language_model.shared
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            state.pop(f"language_model.{name}.weight", None)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return vanilla


@pytest.mark.parametrize(
    ("backbone", "names"),
    # BLIP-2 never had other names
    [(b, n) for b in EVERY for n in ("current", "legacy", "saved") if n != "legacy" or b in tiny.LLAVA_SHAPED],
)
def test_vanilla_checkpoint_leaves_only_dms_new(tmp_path, backbone, names):
    if names == "saved":
        vanilla = tiny.vanilla_of(tiny.build(backbone))
        vanilla.save_pretrained(tmp_path)
    else:
        vanilla = write_vanilla(tmp_path, backbone, legacy_name if names == "legacy" else lambda name: name)
    if names == "legacy":
        on_disk = set(load_file(tmp_path / "model.safetensors"))
        assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= on_disk
        assert any(name.startswith("vision_tower.") for name in on_disk)
        assert any(name.startswith("language_model.model.layers.") for name in on_disk)
    model_class = tiny.model_class(backbone)
    for dms in (DMSConfig(scheduler="uniform", **SMALL), DMSConfig(scheduler="rule", **SMALL)):
        model, info = model_class.from_pretrained(tmp_path, dms_config=dms, output_loading_info=True)
        assert type(model) is model_class
        assert model.config.dms_config.scheduler == dms.scheduler
        assert model.dms.views[0].shared.out_features == 8
        assert info["missing_keys"], "dms must be new"
        assert all(name.startswith("dms.") for name in info["missing_keys"]), info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert not info["error_msgs"]
        assert_same_tensors(base(model.state_dict()), vanilla.state_dict())
        assert torch.equal(answer(tiny.realigned(model), backbone)[0], answer(vanilla, backbone)[0])
        assert not model.training


def test_vanilla_checkpoint_with_default_choices(tmp_path):
    write_vanilla(tmp_path, "llava-llama")
    model = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert {**model.config.dms_config.to_dict(), "dtype": None} == DMSConfig().to_dict()
    assert model.config.model_type == "dms_llava"
    for name, parameter in model.dms.named_parameters():
        assert parameter.isfinite().all(), name
    assert not model.dms.calibration.is_calibrated
    assert torch.equal(model.dms.views[0].query, torch.zeros(32))
    assert not torch.equal(model.dms.views[0].shared.weight, torch.zeros_like(model.dms.views[0].shared.weight))


def test_new_dms_starts_as_the_class_does(tmp_path):
    """What loading initialises is what `__init__` does: zeros and ones of calibration, a scheduler that is uniform."""
    write_vanilla(tmp_path, "llava-llama")
    loaded = DMSLlavaForConditionalGeneration.from_pretrained(
        tmp_path, dms_config=DMSConfig(scheduler="learned", **SMALL)
    )
    fresh = tiny.build("llava-llama", scheduler="learned")
    assert_same_tensors(dict(loaded.dms.named_buffers()), dict(fresh.dms.named_buffers()))
    assert any(buffer.any() for buffer in loaded.dms.buffers())
    for name, parameter in loaded.dms.named_parameters():
        assert bool(parameter.any()) == bool(fresh.dms.get_parameter(name).any()), name


# ---- DMS checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Calibrated checkpoints with a stirred `dms`, and the models they were saved from."""
    made = {}

    def get(backbone):
        if backbone not in made:
            model = tiny.build(backbone, scheduler="learned", stirred=True)
            if backbone != "retrieval":
                model.dms.calibration.load_state_dict(tiny.calibration_of(backbone))
            directory = tmp_path_factory.mktemp(backbone)
            model.save_pretrained(directory)
            made[backbone] = model, directory
        return made[backbone]

    return get


@pytest.mark.parametrize("backbone", EVERY)
def test_round_trip_is_exact(saved, backbone):
    model, directory = saved(backbone)
    auto = AutoModel if backbone == "retrieval" else AutoModelForImageTextToText
    logits, weights = answer(model, backbone)
    assert (weights - 0.5).abs().max() > 1e-3
    for loader in (type(model), auto):
        loaded, info = loader.from_pretrained(directory, output_loading_info=True)
        assert type(loaded) is type(model)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        again, again_weights = answer(tiny.realigned(loaded), backbone)
        assert torch.equal(again, logits)
        assert torch.equal(again_weights, weights)
        if backbone != "retrieval":
            assert loaded.dms.calibration.is_calibrated


@pytest.mark.parametrize("backbone", EVERY)
def test_a_pickled_model_is_the_same(backbone):
    # before it has run: from then on hooks of transformers, which cannot be pickled, hang on the vanilla classes too
    model, file = tiny.build(backbone, scheduler="learned", stirred=True), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    logits, weights = answer(model, backbone)
    assert (weights - 0.5).abs().max() > 1e-3
    for copied in copies:
        assert_same_tensors(copied.state_dict(), model.state_dict())
        again, again_weights = answer(tiny.realigned(copied), backbone)
        assert torch.equal(again, logits)
        assert torch.equal(again_weights, weights)


@pytest.mark.parametrize("backbone", EVERY)
def test_checkpoint_files(saved, backbone):
    _, directory = saved(backbone)
    names = {path.name for path in directory.iterdir()}
    assert {path for path in names if not path.endswith((".py", ".json"))} == {"model.safetensors"}
    tensors = load_file(directory / "model.safetensors")
    assert any(name.startswith("dms.calibration.") for name in tensors)
    written = json.loads((directory / "config.json").read_text())
    assert written["model_type"] in ("dms_llava", "dms_internvl", "dms_blip_2")
    assert written["dms_config"]["scheduler"] == "learned"
    assert written["architectures"] == [tiny.model_class(backbone).__name__]


@pytest.mark.parametrize(
    ("backbone", "config_class"),
    [("llava-llama", DMSLlavaConfig), ("internvl-qwen3", DMSInternVLConfig), ("blip2-t5", DMSBlip2Config)],
)
def test_auto_config(saved, backbone, config_class):
    model, directory = saved(backbone)
    config = AutoConfig.from_pretrained(directory)
    assert type(config) is config_class
    assert type(config.dms_config) is DMSConfig
    assert config.dms_config.to_dict() == model.config.dms_config.to_dict()
    assert config.get_text_config().model_type == model.config.get_text_config().model_type


@pytest.mark.parametrize(
    ("backbone", "vanilla_class"),
    [
        ("llava-llama", LlavaForConditionalGeneration),
        ("internvl-qwen3", InternVLForConditionalGeneration),
        ("blip2-opt", Blip2ForConditionalGeneration),
    ],
)
def test_dms_checkpoint_loads_in_the_vanilla_class(saved, backbone, vanilla_class):
    model, directory = saved(backbone)
    vanilla, info = vanilla_class.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("dms.") for name in info["unexpected_keys"])
    assert_same_tensors(vanilla.state_dict(), base(model.state_dict()))
    assert torch.equal(answer(tiny.realigned(vanilla), backbone)[0], answer(tiny.vanilla_of(model), backbone)[0])


def test_dms_config_overrides_the_saved_one(saved):
    model, directory = saved("llava-llama")
    uniform = type(model).from_pretrained(directory, dms_config=DMSConfig(scheduler="uniform", **SMALL))
    uniform = tiny.realigned(uniform)
    assert torch.equal(answer(uniform, "llava-llama")[0], answer(tiny.vanilla_of(model), "llava-llama")[0])
    rule = type(model).from_pretrained(directory, dms_config=DMSConfig(scheduler="rule", **SMALL))
    assert rule.config.dms_config.scheduler == "rule"
    assert rule.dms.calibration.is_calibrated
    assert_same_tensors(dict(rule.dms.calibration.named_buffers()), dict(model.dms.calibration.named_buffers()))


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_a_vanilla_checkpoint_in_half_precision_is_calibrated_in_single(tmp_path, backbone):
    model = tiny.build(backbone)
    tiny.vanilla_of(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in loaded.dms.calibration.buffers())


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_half_precision_keeps_calibration_exact(saved, backbone):
    model, directory = saved(backbone)
    weights = answer(model, backbone)[1]
    loaded = type(model).from_pretrained(directory, dtype=torch.bfloat16)
    cast = type(model).from_pretrained(directory).to(torch.bfloat16)
    halved = type(model).from_pretrained(directory).half()
    for other, dtype in ((loaded, torch.bfloat16), (cast, torch.bfloat16), (halved, torch.float16)):
        assert other.get_input_embeddings().weight.dtype == dtype
        assert other.dms.scheduler.hidden.weight.dtype == dtype
        buffers = dict(other.dms.calibration.named_buffers())
        assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
        assert_same_tensors(buffers, dict(model.dms.calibration.named_buffers()))
    inputs = inputs_for(backbone)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        out = loaded(**inputs)
        generated = loaded.generate(
            **{name: value for name, value in inputs.items() if name != "decoder_input_ids"},
            max_new_tokens=2,
            return_dict_in_generate=True,
        )
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.isfinite().all()
    assert out.modality_weights.dtype == torch.float32
    torch.testing.assert_close(out.modality_weights, weights, rtol=0, atol=0.15)
    assert torch.equal(generated.modality_weights, out.modality_weights)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_half_precision_is_the_vanilla_class(backbone):
    inputs = inputs_for(backbone)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = tiny.build(backbone)
    vanilla = tiny.vanilla_of(model).bfloat16()
    model = model.bfloat16()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vanilla(**inputs).logits)
        weights = tiny.uneven(len(inputs["input_ids"]))
        assert model(**inputs, modality_weights=weights).logits.isfinite().all()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt"])
def test_device_map(saved, backbone, device_map):
    model, directory = saved(backbone)
    loaded = type(model).from_pretrained(directory, device_map=device_map)
    logits, weights = answer(model, backbone)
    again, again_weights = answer(tiny.realigned(loaded), backbone)
    assert torch.equal(again, logits)
    assert torch.equal(again_weights, weights)
    inputs = inputs_for(backbone)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3))


# ---- checkpoints that must be refused


def damage(directory, change):
    """Rewrites the tensors of a checkpoint."""
    path = directory / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["vanilla", "dms"])
@pytest.mark.parametrize(
    ("backbone", "lost"),
    [
        ("llava-llama", "multi_modal_projector.linear_1.weight"),
        ("llava-llama", "lm_head.weight"),
        ("internvl-qwen3", "multi_modal_projector.layer_norm.weight"),
        ("blip2-opt", "query_tokens"),
        ("retrieval", "itm_head.weight"),
    ],
)
def test_missing_base_weights_are_refused(tmp_path, backbone, lost, kind):
    model = tiny.build(backbone)
    if kind == "vanilla":
        model = tiny.vanilla_of(model)
    model.save_pretrained(tmp_path)

    def drop(state):
        for name in [name for name in state if name.endswith(lost)]:
            del state[name]

    damage(tmp_path, drop)
    with pytest.raises((ValueError, RuntimeError, OSError), match=lost.replace(".", r"\.")):
        tiny.model_class(backbone).from_pretrained(tmp_path, dms_config=DMSConfig(**SMALL))
    auto = AutoModel if backbone == "retrieval" else AutoModelForImageTextToText
    if kind == "dms":
        with pytest.raises((ValueError, RuntimeError, OSError), match=lost.replace(".", r"\.")):
            auto.from_pretrained(tmp_path)


def test_missing_weights_are_told_to_whoever_asks(tmp_path):
    """A base model's checkpoint has no output layer."""
    model = tiny.vanilla("llava-llama")
    model.model.save_pretrained(tmp_path)
    own = {"config": tiny.build("llava-llama").config}
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        DMSLlavaForConditionalGeneration.from_pretrained(tmp_path, **own)
    loaded, info = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path, **own, output_loading_info=True)
    assert {name for name in info["missing_keys"] if not name.startswith("dms.")} == {"lm_head.weight"}
    assert_same_tensors(loaded.model.state_dict(), model.model.state_dict())


def test_only_what_a_vanilla_checkpoint_has_not_is_no_news(tmp_path, monkeypatch, caplog):
    """transformers reports missing weights; that all of `dms` is new need worry nobody."""
    reports = []
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level(logging.WARNING, logger.name)
    handler = logging.Handler()
    handler.emit = lambda record: reports.append(record.getMessage())
    logger.addHandler(handler)
    model = tiny.vanilla("llava-llama")
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    loaded = DMSLlavaForConditionalGeneration.from_pretrained
    own = {"config": tiny.build("llava-llama").config}
    loaded(tmp_path / "whole", dms_config=DMSConfig(**SMALL))
    assert not [report for report in reports if "LOAD REPORT" in report]
    with pytest.raises(ValueError, match="lm_head"):
        loaded(tmp_path / "base", **own)
    (report,) = (report for report in reports if "LOAD REPORT" in report)
    assert "lm_head.weight" in report
    assert not logger.filters


def test_partly_missing_dms_is_refused(tmp_path):
    """A checkpoint that has lost a part of its trained head must not go on with a random one."""
    tiny.build("llava-llama", scheduler="learned", stirred=True).save_pretrained(tmp_path)
    damage(tmp_path, lambda state: state.pop("dms.views.0.shared.weight"))
    with pytest.raises((ValueError, RuntimeError, OSError), match=r"views\.0\.shared"):
        DMSLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("other", [{"subspace_size": 4}, {"text_layers": [1, 2]}])
def test_a_calibration_of_other_sizes_or_layers_is_none(tmp_path, caplog, other):
    tiny.calibrated("llava-llama").save_pretrained(tmp_path)
    asked = {**tiny._DMS, **other}
    with told_by_transformers(caplog):
        model = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path, dms_config=DMSConfig(**asked)).eval()
    assert "is of other layers or sizes" in caplog.text
    new = tiny.build("llava-llama", **other).dms.calibration.state_dict()
    for name, value in model.dms.calibration.state_dict().items():
        assert torch.equal(value, new[name]), name
    # what it does not hang on may be chosen
    caplog.clear()
    with told_by_transformers(caplog):
        asked = {**tiny._DMS, "false_alarm_rate": 0.2}
        model = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path, dms_config=DMSConfig(**asked))
        same = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path, dms_config={"text_layers": [1, 0]})
    assert "other layers" not in caplog.text
    assert model.dms.calibration.is_calibrated
    assert same.dms.calibration.is_calibrated
    # however the configuration is given
    config = AutoConfig.from_pretrained(tmp_path)
    config.dms_config = DMSConfig(**{**tiny._DMS, **other})
    for given in ({"config": config}, {"dms_config": {**tiny._DMS, **other}}):
        assert not AutoModelForImageTextToText.from_pretrained(tmp_path, **given).dms.calibration.is_calibrated


@contextlib.contextmanager
def told_by_transformers(caplog):
    """Its loggers pass nothing on to others."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger.name):
            yield
    finally:
        logger.removeHandler(caplog.handler)


def test_the_configuration_of_a_vanilla_checkpoint_may_be_given(tmp_path):
    tiny.vanilla("llava-llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = DMSModelForImageTextToText.from_pretrained(tmp_path, config=config).eval()
    assert type(model) is DMSLlavaForConditionalGeneration
    assert torch.equal(answer(model, "llava-llama")[0], answer(tiny.vanilla("llava-llama"), "llava-llama")[0])


@pytest.mark.parametrize("name", ["lm_head.weight", "dms.views.0.shared.weight"])
def test_mis_shaped_weights_are_refused(tmp_path, name):
    tiny.build("llava-llama").save_pretrained(tmp_path)

    def cut(state):
        (found,) = (key for key in state if key.endswith(name))
        state[found] = state[found][:-1].contiguous()

    damage(tmp_path, cut)
    with pytest.raises(ValueError, match=rf"other shapes.*{re.escape(name)}"):
        DMSLlavaForConditionalGeneration.from_pretrained(tmp_path)
    loaded = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt", "retrieval"])
def test_pickle_only_checkpoints_are_refused(tmp_path, backbone):
    model = tiny.build(backbone)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match="safetensors"):
        type(model).from_pretrained(tmp_path)


def test_truncated_weights_are_refused(tmp_path):
    tiny.build("llava-llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
        DMSLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_a_checkpoints_own_code_is_neither_run_nor_asked_about(tmp_path, monkeypatch, file):
    tiny.save_internvl(tmp_path)
    written = json.loads((tmp_path / file).read_text())
    auto_class = "AutoConfig" if file == "config.json" else "AutoProcessor"
    changed = {"model_type": "other"} if file == "config.json" else {"processor_class": "Other"}
    (tmp_path / file).write_text(json.dumps({**written, **changed, "auto_map": {auto_class: "own.Own"}}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- attention kernels, compilation


@pytest.mark.parametrize("backbone", tiny.DECODER_ONLY)
def test_flash_attention_is_refused(backbone):
    model = tiny.build(backbone)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if config is not model.config.dms_config:
            config._attn_implementation = "flash_attention_2"
    language = model.config.get_text_config(decoder=True)
    assert language._attn_implementation == "flash_attention_2"
    # the vision tower is not what is refused
    model.config.vision_config._attn_implementation = "eager"
    if backbone.startswith("blip2"):
        model.config.qformer_config._attn_implementation = "eager"
    inputs = tiny.prompts(backbone, "pairs")
    with pytest.raises(ValueError, match=r"flash_attention_2.*takes no bias"):
        model(**inputs, modality_weights=tiny.uneven(3))
    with pytest.raises(ValueError, match=r"flash_attention_2.*takes no bias"):
        model.generate(**inputs, modality_weights=tiny.uneven(3), max_new_tokens=2)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_forward_of_a_text_model_with_a_decoder_equals_eager():
    """`test_families.py` compiles the others."""
    model = tiny.build("blip2-t5", scheduler="learned", stirred=True)
    inputs = tiny.prompts("blip2-t5", "pairs", "left") | {"modality_weights": tiny.uneven(3)}
    with torch.no_grad():
        expected, out = model(**inputs), torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.modality_weights, expected.modality_weights, rtol=0, atol=1e-5)
    assert (expected.modality_weights - 0.5).abs().max() > 1e-3


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_training_step_is_one_compiled_graph():
    model = tiny.build("llava-llama", scheduler="learned", stirred=True)
    inputs = tiny.prompts("llava-llama", "pairs", "left", labels=3)
    inputs["schedule_target"] = tiny.uneven(3)
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.dms.named_parameters() if p.grad is not None}
    model.zero_grad()
    # transformers' own check of the placeholders takes a number out of the graph
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs).loss.backward()
    assert any(name.startswith("scheduler.") for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.dms.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)
