"""Where a model that was loaded answers."""

import pytest
import torch

from modeling_dms.training.apps import answer
from modeling_dms.training.finetune import calibrate
from modeling_dms.training.models import assemble
from modeling_dms.training.models.loading import on_accelerator
from tests import tiny


@pytest.fixture
def accelerator(monkeypatch):
    """PyTorch's device without numbers stands for one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))


@pytest.mark.usefixtures("accelerator")
def test_commands_calibrate_and_answer_on_an_accelerator(tmp_path, monkeypatch):
    asked, data = [], tiny.table(tmp_path / "data", 60)

    def stop(model, *args, **kwargs):
        asked.append(model.device.type)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate", stop)
    monkeypatch.setattr(answer, "room_for_prompts", stop)  # the first that is asked of the model
    with pytest.raises(KeyboardInterrupt):
        calibrate.run_calibration("demo-llava", str(data), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        answer.load_for_answers("demo-llava", 1)
    assert asked == ["meta", "meta"]


@pytest.mark.usefixtures("accelerator")
def test_what_is_spread_over_devices_stays_there():
    model = torch.nn.Linear(2, 2)
    model.hf_device_map = {"": "cpu"}
    assert on_accelerator(model).weight.device.type == "cpu"
    del model.hf_device_map
    assert on_accelerator(model).weight.device.type == "meta"


def test_without_an_accelerator_a_model_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert on_accelerator(torch.nn.Linear(2, 2)).weight.device.type == "cpu"


def test_two_processes_may_assemble_at_once(tmp_path, monkeypatch):
    """The slower one takes what the faster one has built, and leaves it alone."""
    cache = tmp_path / "modeling-dms"

    def built(name, out):
        for folder, by in ((out, "slower"), (cache, "faster")):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(by)
        return out / name

    monkeypatch.setattr(assemble, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(assemble, "assemble", built)
    assert assemble.assembled("one") == cache / "one"
    assert (cache / "one" / "config.json").read_text() == "faster"
    assert [path.name for path in cache.iterdir()] == ["one"]
