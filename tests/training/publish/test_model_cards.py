"""The released adapters: small, over a base that is assembled, and with cards that their files make."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_dms.training.models.assemble import RECIPES
from modeling_dms.training.models.loading import CHECKPOINTS
from modeling_dms.training.publish.card import write_card


ROOT = Path(__file__).resolve().parents[3]
# the one ships with the package, the other is too large for that
RELEASED = [CHECKPOINTS / "photographs-llava", ROOT / "model_cards" / "photographs-blip2"]


def results_of(folder):
    return ROOT / "docs" / "results" / folder.name


def test_every_released_adapter_is_known():
    found = [
        path.parent for place in (CHECKPOINTS, ROOT / "model_cards") for path in place.glob("*/adapter_config.json")
    ]
    assert sorted(found) == sorted(RELEASED)


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_a_released_adapter_is_small_calibrated_and_its_base_is_assembled(folder):
    assert (folder / "adapter_model.safetensors").stat().st_size < 40e6
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base in RECIPES
    dms = json.loads((folder / "config.json").read_text())["dms_config"]
    assert (dms["scheduler"], dms["false_alarm_rate"], dms["conflict_prior"]) == ("rule", 0.01, None)


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_a_released_card_is_what_its_files_make(folder, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    write_card(copy, [results_of(folder)])
    assert (copy / "README.md").read_text() == (folder / "README.md").read_text()
    results = json.loads((results_of(folder) / "results.json").read_text())
    clean = next(row for row in results["results"]["groups"] if (row["group"], row["method"]) == ("clean", "rule"))
    card = ModelCard.load(folder / "README.md").data
    assert round(clean["score"], 4) == next(e.metric_value for e in card.eval_results if e.dataset_config == "clean")
    assert card.datasets == ["jxie/flickr8k"]
