"""The released adapters: small, over a base that is assembled, and with cards that their files make."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_dms.training.models.assemble import RECIPES
from modeling_dms.training.publish.card import write_card


ROOT = Path(__file__).resolve().parents[3]
# the stages of its training; its evaluations, of which the first one comes first in the card
RELEASED = {
    "llava-dinov2s-smollm2-135m": ("llava-smollm2-bridge", "llava-smollm2", "llava-smollm2-trust"),
    "blip2-dinov2s-smollm2-135m": ("blip2-smollm2-align", "blip2-smollm2"),
}
EVALUATIONS = ("vqa", "caption", "retrieval")


def test_every_released_adapter_is_known():
    found = {path.parent.name for path in ROOT.glob("model_cards/*/adapter_config.json")}
    assert found == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_adapter_is_small_and_its_base_is_assembled(name):
    folder = ROOT / "model_cards" / name
    assert (folder / "adapter_model.safetensors").stat().st_size < 40e6
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    assert name in RECIPES
    dms = json.loads((folder / "config.json").read_text())["dms_config"]
    assert (dms["scheduler"], dms["weight_floor"]) == ("rule", 0.01)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_card_is_what_its_files_make(name, tmp_path):
    source, copy = ROOT / "model_cards" / name, tmp_path / name
    shutil.copytree(source, copy)
    card = source / "README.md"
    (copy / "README.md").unlink()
    folders = [source / "evaluation" / task for task in EVALUATIONS]
    write_card(copy, folders, [copy / "training" / stage for stage in RELEASED[name]])
    assert (copy / "README.md").read_text() == card.read_text()
    results = json.loads((folders[0] / "results.json").read_text())["results"]["groups"]
    clean = next(row for row in results if (row["group"], row["method"]) == ("clean", "rule"))
    entries = ModelCard.load(card).data.eval_results
    assert round(clean["score"], 4) == next(e.metric_value for e in entries if e.dataset_config == "clean")
