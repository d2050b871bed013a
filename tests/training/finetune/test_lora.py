"""LoRA with peft on a saved DMS base: what trains, what is saved, what comes back."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from tests import processes, tiny


TARGETS = {
    "llava-llama": r".*language_model.*\.(q_proj|v_proj)",
    "internvl-qwen3": r".*language_model.*\.(q_proj|v_proj)",
    "blip2-opt": r".*language_model.*\.(q_proj|v_proj)",
    "blip2-t5": r".*language_model.*\.(q|v)",
}


def loaded_afresh(root):
    jobs, results = torch.load(root / "jobs.pt", weights_only=True), {}
    for backbone, job in jobs.items():
        base = AutoModelForImageTextToText.from_pretrained(job["base"])
        model = PeftModel.from_pretrained(base, job["adapter"]).eval()
        with torch.no_grad():
            out = tiny.realigned(model)(**job["inputs"])
        results[backbone] = {"state": model.state_dict(), "logits": out.logits, "weights": out.modality_weights}
    torch.save(results, root / "results.pt")


def training_inputs(backbone):
    inputs = tiny.prompts(backbone, "pairs", "left", labels=3)
    return inputs | {"schedule_target": tiny.uneven(3)}


def inputs_for(backbone):
    return tiny.prompts(backbone, "mixed", "left")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapters after a few steps: the model, its state before, and where base and adapter are saved."""
    root, made = tmp_path_factory.mktemp("lora"), {}
    for backbone, targets in TARGETS.items():
        base_directory, adapter_directory = root / backbone / "base", root / backbone / "adapter"
        base = tiny.build(backbone, scheduler="learned")
        base.calibrate(tiny.clean_samples(), level=2, show_progress=False)
        base.save_pretrained(base_directory)
        base = tiny.realigned(AutoModelForImageTextToText.from_pretrained(base_directory))
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=targets, modules_to_save=["dms"])
        model = get_peft_model(base, config).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(**training_inputs(backbone)).loss.backward()
            optimizer.step()
        model.eval().save_pretrained(adapter_directory)
        made[backbone] = model, before, base_directory, adapter_directory
    return made


@pytest.fixture(scope="module")
def reloaded(trained, tmp_path_factory):
    """What a fresh process loads from the saved adapters."""
    root = tmp_path_factory.mktemp("reload")
    jobs = {}
    for backbone, (_, _, base, adapter) in trained.items():
        jobs[backbone] = {"base": str(base), "adapter": str(adapter), "inputs": inputs_for(backbone)}
    torch.save(jobs, root / "jobs.pt")
    assert processes.run(loaded_afresh, root) == [0]
    return torch.load(root / "results.pt", weights_only=True)


@pytest.mark.parametrize("backbone", TARGETS)
def test_lora_and_dms_move_and_nothing_else(trained, backbone):
    model, before, *_ = trained[backbone]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    lora = {name for name in trainable if ".lora_" in name}
    dms = {name for name in trainable if ".dms.modules_to_save.default." in name}
    assert trainable == lora | dms
    assert lora
    assert all("language_model" in name for name in lora)
    assert len(dms) == len(list(tiny.shared(backbone, scheduler="learned").dms.parameters()))
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == trainable
    assert all(after[name].isfinite().all() for name in trainable)


@pytest.mark.parametrize("backbone", TARGETS)
def test_adapter_reloads_exactly_in_a_fresh_process(trained, reloaded, backbone):
    model = trained[backbone][0]
    state, found = model.state_dict(), reloaded[backbone]["state"]
    assert found.keys() == state.keys()
    different = [name for name in state if not torch.equal(found[name], state[name])]
    assert not different
    assert any(".dms.modules_to_save.default.scheduler." in name for name in found)
    levels = [
        value
        for name, value in found.items()
        if name.endswith("modules_to_save.default.calibration.modalities.0.level")
    ]
    assert [float(level) for level in levels] == [2]
    with torch.no_grad():
        out = model(**inputs_for(backbone))
    assert torch.equal(reloaded[backbone]["logits"], out.logits)
    assert torch.equal(reloaded[backbone]["weights"], out.modality_weights)
    assert (out.modality_weights - 0.5).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", TARGETS)
def test_merged_model_answers_the_same(trained, backbone, tmp_path):
    model, _, base, adapter = trained[backbone]
    inputs = inputs_for(backbone)
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    merged = again.merge_and_unload().eval()
    assert type(merged) is tiny.model_class(backbone)
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    with torch.no_grad():
        expected, out = model(**inputs), merged(**inputs)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5 * float(expected.logits.abs().max()))
        torch.testing.assert_close(out.modality_weights, expected.modality_weights, rtol=0, atol=1e-5)
        assert torch.equal(merged.generate(**prompt, max_new_tokens=3), model.generate(**prompt, max_new_tokens=3))
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_calibration_of_an_adapted_model_is_saved_with_the_adapter(tmp_path):
    """Calibrating after the adapter was added writes to the copy of `dms` that the adapter carries."""
    base = tiny.build("llava-llama", scheduler="rule")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=TARGETS["llava-llama"], modules_to_save=["dms"])
    model = get_peft_model(base, config).eval()
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = tiny.realigned(PeftModel.from_pretrained(again, tmp_path / "adapter").eval())
    noisy = tiny.noisy(tiny.clean_samples(32, seed=5)[0])
    with torch.no_grad():
        expected, out = model(**noisy).modality_weights, again(**noisy).modality_weights
    assert torch.equal(out, expected)
    assert (out[:, 0] < 0.5).any()


@pytest.mark.parametrize("backbone", TARGETS)
def test_all_linear_layers_are_those_of_dms_too_unless_it_is_excepted(backbone):
    """As docs/fine-tune.md says; what `exclude_modules` excepts stays bit for bit as it was."""

    def adapted(**kwargs):
        model = get_peft_model(
            tiny.build(backbone, scheduler="learned"), LoraConfig(r=2, target_modules="all-linear", **kwargs)
        )
        return model, [name for name in model.targeted_module_names if "dms" in name.split(".")]

    linear = {"dms.scheduler.hidden", "dms.scheduler.output"}
    linear |= {f"dms.views.{view}.{layer}" for view in range(2) for layer in ("shared", "residual")}
    assert set(adapted()[1]) == linear
    whole, found = adapted(modules_to_save=["dms"])
    assert not found
    trained = {
        name.rpartition("modules_to_save.default.")[2] for name, p in whole.named_parameters() if p.requires_grad
    }
    assert {name for name, _ in tiny.shared(backbone, scheduler="learned").dms.named_parameters()} <= trained
    model, found = adapted(exclude_modules=r".*\bdms\b.*")
    assert not found
    before = {name: value.clone() for name, value in model.base_model.model.dms.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**training_inputs(backbone)).loss.backward()
    optimizer.step()
    after = model.merge_and_unload().dms.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
