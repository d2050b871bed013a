"""The choices of a training run: presets, files, the command line over them, and how wrong ones are refused."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.finetune.arguments import PRESETS, ModelArguments, read_arguments
from modeling_dms.training.models.loading import load


NEEDED = ["--model", "demo-llava", "--output_dir", "runs/x"]
NAMES = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def one_line_error(*arguments):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def wrong_usage(*arguments):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def test_the_presets_ship():
    assert set(NAMES) >= {"demo-scheduler", "lora", "paper", "scheduler"}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_parses(name):
    needed = [] if name == "demo-scheduler" else NEEDED
    model, data, corruptions, training = read_arguments(PRESETS / f"{name}.yaml", needed)
    assert (model, data, corruptions) == read_arguments(PRESETS.joinpath(name).relative_to(PRESETS), needed)[:3]
    # the presets of pretrained parts train static models
    static = "smollm2" in name
    assert model.dms["scheduler"] == ("uniform" if static else "learned")
    assert training.schedule_target == ("none" if static or name == "paper" else "severity")
    assert training.save_total_limit == (1 if static else 2)
    assert 0 < training.learning_rate < 0.1
    # what says an image's text must see all of it
    assert 0 < corruptions.image_rate + corruptions.text_rate < 1 or model.stage == "align"
    # what `load` makes of these fields is a configuration that DMSConfig accepts
    loaded, _ = load("demo-llava", model.dms)
    assert {key: getattr(loaded.config.dms_config, key) for key in model.dms} == model.dms


def test_a_presets_values_arrive():
    written = yaml.safe_load((PRESETS / "demo-scheduler.yaml").read_text(encoding="utf-8"))
    read = {
        name: value for part in read_arguments(PRESETS / "demo-scheduler.yaml") for name, value in vars(part).items()
    }
    assert written.pop("report_to") == "none"
    assert read["report_to"] == []
    assert len(written) > 20
    assert {name: read[name] for name in written} == written
    assert not read["remove_unused_columns"]


def test_the_command_line_overrides_the_file(tmp_path):
    path = written(
        tmp_path,
        "model: demo-blip2\noutput_dir: runs/y\nlearning_rate: 1e-3\nstage: joint\nseed: 3\nimage_families: [noise]\n"
        "dms: {scheduler: rule}\ntrain_bridge: true\nuse_cpu: true\nmax_samples: null\ntext_families: [shuffle]\n",
    )
    file_only = read_arguments(path)
    assert file_only[0] == ModelArguments("demo-blip2", "joint", train_bridge=True, dms={"scheduler": "rule"})
    assert file_only[1].max_samples is None
    assert file_only[2].image_families == ["noise"]
    assert (file_only[3].learning_rate, file_only[3].seed) == (1e-3, 3)  # YAML takes 1e-3 for a string
    overrides = ["--stage", "backbone", "--seed", "4", "--image_families", "blur", "blank", "--max_samples", "7"]
    overrides += ["--dms", '{"scheduler": "learned", "kappa": 2}', "--train_bridge", "false", "--use_cpu", "true"]
    model, data, corruptions, training = read_arguments(path, [*overrides, "--output_dir=runs/z"])
    assert model == ModelArguments("demo-blip2", "backbone", dms={"scheduler": "learned", "kappa": 2})
    assert data.max_samples == 7
    assert corruptions.image_families == ["blur", "blank"]
    assert corruptions.text_families == ["shuffle"]
    assert (training.seed, training.learning_rate, training.output_dir) == (4, 1e-3, "runs/z")


def test_lists_that_are_empty_or_of_a_field_of_text(tmp_path):
    path = written(tmp_path, "report_to: [none]\nheld_out_text_families: []\nlabel_names: null\n")
    _, _, corruptions, training = read_arguments(path, NEEDED)
    assert corruptions.held_out_text_families == []
    assert training.report_to == []
    assert training.label_names is None


def test_without_a_file_the_command_line_is_enough():
    model, data, _, training = read_arguments(None, NEEDED)
    assert model == ModelArguments("demo-llava")
    assert data.data == "easy-vqa"
    assert training.output_dir == "runs/x"


WRONG = {
    "stage: banana": "stage",
    "schedule_target: banana": "schedule_target",
    "max_steps: many": "max_steps",
    "max_steps: 2.5": "max_steps",
    "max_steps: [1, 2]": "max_steps",
    "lora_rank: -1": "lora_rank",
    "train_bridge: perhaps": "train_bridge",
    "learning_rate: fast": "learning_rate",
    "dms: 3": "dms",
    "dms: [scheduler]": "dms",
    "calibration_samples: -1": "calibration_samples",
    "data: [easy-vqa, openmoji]": "data must be one value",
    "model: [demo-llava]": "model must be one value",
    "output_dir: {run: 1}": "output_dir must be one value",
    "stage: null": "stage must be one value",
    "image_rate: null": "image_rate must be one value",
    "image_families:": "image_families must be one value",
    "save_steps: null": "save_steps must be one value",
    "accelerator_config: {splitbatches: true}": "splitbatches",
    "dms: {kapa: 2}": "did you mean kappa",
    "dtype: half": "dtype",
    "max_length: 0": "max_length",
    "image_rate: 1.5": "image_rate",
    "image_families: [noise, fire]": "image_families",
    "schedule_temperature: 0": "schedule_temperature",
    "scheduler_warmup_ratio: 2": "scheduler_warmup_ratio",
    "feature_cache_gb: -1": "feature_cache_gb",
    "lr_scheduler_type: zigzag": "lr_scheduler_type",
}


@pytest.mark.parametrize(("line", "field"), WRONG.items(), ids=list(WRONG))
def test_a_wrong_value_in_the_file_names_its_field(tmp_path, line, field):
    with pytest.raises(ValueError, match=field):
        read_arguments(written(tmp_path, f"model: demo-llava\noutput_dir: x\n{line}\n"))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (["--stage", "banana"], "stage"),
        (["--max_steps", "many"], "max_steps"),
        (["--dms", "rule"], "dms"),
        (["--dms", "[1]"], "dms"),
        (["--text_rate", "2"], "text_rate"),
    ],
)
def test_a_wrong_value_on_the_command_line_names_its_field(given, field):
    with pytest.raises(ValueError, match=field):
        read_arguments(None, [*NEEDED, *given])


def test_unknown_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml: unknown field\(s\) learning_rat, stge"):
        read_arguments(written(tmp_path, "stge: joint\nlearning_rat: 1\nmodel: x\n"), NEEDED)
    with pytest.raises(ValueError, match="--learning_rat"):
        read_arguments(None, [*NEEDED, "--learning_rat", "1"])


def test_files_that_hold_no_fields(tmp_path):
    with pytest.raises(ValueError, match="not YAML"):
        read_arguments(written(tmp_path, "a: ["), NEEDED)
    with pytest.raises(ValueError, match="name: value"):
        read_arguments(written(tmp_path, "- a\n- b\n"), NEEDED)
    assert read_arguments(written(tmp_path, ""), NEEDED)[0] == ModelArguments("demo-llava")
    with pytest.raises(FileNotFoundError, match=r"demo-scheduler, .*lora, paper, scheduler"):
        read_arguments(tmp_path / "absent.yaml", NEEDED)


def test_a_folder_of_a_presets_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    assert read_arguments(PRESETS.joinpath("lora").relative_to(PRESETS), NEEDED)[0].stage == "joint"


@pytest.mark.parametrize("missing", ["model", "output_dir"])
def test_what_a_run_cannot_do_without(missing):
    given = NEEDED[2:] if missing == "model" else NEEDED[:2]
    with pytest.raises(ValueError, match=f"required: --{missing}"):
        read_arguments(None, given)


def test_dms_train_prints_one_line_and_fails(tmp_path):
    tiny = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--max_samples", "4"]
    needed = ["--model", "demo-llava", "--output_dir", tmp_path / "run", *tiny]
    assert "presets" in one_line_error("--config", "nothing", *needed)
    assert "train_bridge" in one_line_error(*needed, "--train_bridge", "--calibration_samples", "0")
    assert "'bert'" in one_line_error(*needed, "--model", bert(tmp_path))
    assert "unknown source" in one_line_error(*needed, "--data", "no-such-data")
    assert "50" in one_line_error(*needed)  # too few samples to calibrate on
    assert not (tmp_path / "run" / "final").exists()


def test_what_a_run_does_not_take_is_wrong_usage(tmp_path):
    needed = ["--model", "demo-llava", "--output_dir", tmp_path / "run"]
    assert "--model" in wrong_usage("--config", "lora", "--output_dir", tmp_path)
    assert "--nope" in wrong_usage(*needed, "--nope", "1")
    assert "stage" in wrong_usage(*needed, "--stage", "banana")
    assert "'vq', did you mean vqa" in wrong_usage(*needed, "--task", "vq")
    assert "unknown dtype 'cuda'" in wrong_usage(*needed, "--dtype", "cuda")
    assert "max_samples must be at least 1, got 0" in wrong_usage(*needed, "--max_samples", "0")
    # of DMSConfig, before anything is loaded
    assert "did you mean scheduler" in wrong_usage(*needed, "--dms", json.dumps({"shcheduler": "rule"}))
    assert "scheduler" in wrong_usage(*needed, "--dms", json.dumps({"scheduler": "banana"}))
    assert "kappa" in wrong_usage(*needed, "--dms", json.dumps({"kappa": -1}))
    assert "weight_floor" in wrong_usage(*needed, "--dms", json.dumps({"weight_floor": "low"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "clearml"])
def test_a_tracker_that_is_not_installed_is_named_before_any_work(tmp_path, tracker, monkeypatch):
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{tracker.split('_')[0]}_available", bool)
    said = one_line_error(*NEEDED, "--report_to", tracker, "--output_dir", tmp_path / "run")
    assert said.startswith("error: report_to: ")
    assert "pip install" in said
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_none_is_wrong_usage():
    assert "trackioo is not supported, only " in wrong_usage(*NEEDED, "--report_to", "trackioo")


def bert(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder
