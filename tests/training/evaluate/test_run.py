"""`dms evaluate`: what is asked and resumed, conditions, tables, the command, one process and two."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_dms.training.apps.answer import load_for_answers
from modeling_dms.training.cli import app
from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.data.samples import SPLITS
from modeling_dms.training.evaluate import grid
from modeling_dms.training.evaluate.grid import ORACLE, Condition, run_condition
from modeling_dms.training.evaluate.methods import Method
from modeling_dms.training.evaluate.run import BOTH_RATE, EvaluationConfig, conditions_of, evaluate, one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.publish.record import families_of, write_record
from tests import processes, tiny


ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """What an evaluation leaves of a model and data of its own, as options, and its folder."""
    root = tmp_path_factory.mktemp("evaluated")
    model, processor = load("demo-llava")
    for name in ("a", "b", "c"):
        model.save_pretrained(root / name), processor.save_pretrained(root / name)
        model.get_output_embeddings().weight.data.normal_()
    config = json.loads((root / "c" / "config.json").read_text())
    config["dms_config"]["kappa"] = 2.0
    shutil.copy(root / "a" / "model.safetensors", root / "c")  # the same weights
    (root / "c" / "config.json").write_text(json.dumps(config))
    rows = [json.loads(row) for row in (tiny.table(root / "data") / "table.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = ("train", "validation", "test")[number % 3]
        row["answers"] = [("red", "blue")[number % 2]]
    (root / "data" / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"model": str(root / "a"), "data": str(root / "data"), "corruptions": ["image:black"], "severities": [5]}
    options |= {"seeds": 1, "samples": 4, "calibration_samples": 0, "methods": ("static",)}
    evaluate(EvaluationConfig(out=root / "out", **options))
    return options, root / "out"


def reworded(folder):
    """The same ids, another answer."""
    table = folder / "table.jsonl"
    table.write_text(table.read_text().replace('"red"', '"green"', 1))


def redrawn(folder):
    Image.new("RGB", (32, 32)).save(folder / "2.png")  # of the test split


def another_model(model):
    return str(Path(model).parent / "b")


def another_configuration(model):
    return str(Path(model).parent / "c")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model", another_model, r"model '.*/a', this run asks for model '.*/b'"),
        ("model", another_configuration, r"model '.*/a', this run asks for model '.*/c'"),
        ("task", lambda task: "vqa-generate", "task 'vqa', this run asks for task 'vqa-generate'"),
        ("split", lambda split: "validation", "split 'test', this run asks for .*split 'validation'"),
        ("samples", lambda samples: 3, "samples 4, this run asks for samples 3"),
        ("dtype", lambda dtype: "bfloat16", "dtype 'auto', this run asks for dtype 'bfloat16'"),
        ("calibration_samples", lambda count: 60, "calibration_samples 0, this run asks for calibration_samples 60"),
        ("training_data", lambda data: "easy-vqa", "training_data '.*data', this run asks for .*'easy-vqa'"),
        ("families", lambda families: CorruptionConfig(image_families=("blur",)), "families .*'blur'"),
        ("reworded", reworded, "which has changed since"),
        ("redrawn", redrawn, "which has changed since"),
    ],
)
def test_results_of_another_request_are_not_resumed(evaluated, tmp_path, name, change, told):
    options, made = evaluated
    out = shutil.copytree(made, tmp_path / "out")
    if name in ("reworded", "redrawn"):
        data = shutil.copytree(options["data"], tmp_path / "data")
        change(data)
        options = {**options, "data": str(data)}
        request = json.loads((out / "request.json").read_text())
        for of in ("data", "training_data"):
            request[of]["name"] = str(data)
        (out / "request.json").write_text(json.dumps(request))
    else:
        options = {**options, name: change(options.get(name))}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"cannot be resumed: .*{told}.*use another folder") as raised:
        evaluate(EvaluationConfig(out=out, resume=True, **options))
    assert str(out) in str(raised.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_was_found_for_a_request_is_resumed_with_more_of_it(evaluated, tmp_path, monkeypatch):
    options, made = evaluated
    out, model = shutil.copytree(made, tmp_path / "out"), shutil.copytree(options["model"], tmp_path / "a-copy")
    real, ran = run_condition, []
    monkeypatch.setattr(grid, "run_condition", lambda *args: ran.append((args[4], args[5])) or real(*args))
    # the same model by another name, and what may be added
    more = {"model": str(model), "seeds": 2, "severities": [4, 5], "batch_size": 2}
    evaluate(EvaluationConfig(out=out, resume=True, **options | more))
    mild = Condition("image:black", "image:black", 4)
    assert {(c.name, c.severity, seed) for c, seed in ran} == {
        ("clean", 0, 1),
        ("image:black", 5, 1),
        *((mild.name, mild.severity, seed) for seed in (0, 1)),
    }
    ran.clear()
    # trained methods ask for samples that the others did not
    trained = {"methods": ("static", "mean prior"), "training_samples": 4, "validation_samples": 4}
    evaluate(EvaluationConfig(out=out, resume=True, **options | trained))
    assert ran
    ran.clear()
    evaluate(EvaluationConfig(out=out, resume=True, **options | trained))
    with pytest.raises(ValueError, match="training_samples 4, this run asks for training_samples 3"):
        evaluate(EvaluationConfig(out=out, resume=True, **options | trained | {"training_samples": 3}))
    assert not ran


def test_a_run_that_begins_anew_leaves_no_results_of_another_request_to_resume(evaluated, tmp_path, monkeypatch):
    options, made = evaluated
    out = shutil.copytree(made, tmp_path / "out")
    (out / "searched.json").write_text('{"mean prior": 1}')
    other = {**options, "model": another_model(options["model"]), "corruptions": ["image:blur"]}

    def stops(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(grid, "run_condition", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvaluationConfig(out=out, **other))
    assert not list((out / "cells").glob("*.json"))
    assert not (out / "searched.json").exists()
    with_both = {**other, "corruptions": ["image:black", "image:blur"]}
    resumed = evaluate(EvaluationConfig(out=out, resume=True, **with_both))["results"]
    assert (
        resumed["conditions"]
        == evaluate(EvaluationConfig(out=tmp_path / "alone", **with_both))["results"]["conditions"]
    )


@pytest.mark.parametrize("request_file", [None, "", "[1]", '{"model": '])
def test_results_that_say_nothing_of_their_request_are_not_resumed(evaluated, tmp_path, request_file):
    options, made = evaluated
    out = shutil.copytree(made, tmp_path / "out")
    (out / "request.json").unlink()
    if request_file is not None:
        (out / "request.json").write_text(request_file)
    with pytest.raises(ValueError, match=r"no request\.json .* version 0\.1"):
        evaluate(EvaluationConfig(out=out, resume=True, **options))
    shutil.rmtree(out / "cells")  # nothing is left to be taken
    evaluate(EvaluationConfig(out=out, resume=True, **options))


# ---- conditions and samples


def test_conditions_of_the_groups():
    config = EvaluationConfig(
        "m", Path("o"), kinds=["image:fog", "image:noise", "text:typos", "image:missing", "text:mismatch"]
    )
    found = {(c.name, c.group, c.severity) for c in conditions_of(config)}
    assert found == {
        ("clean", "clean", 0),
        ("image:noise", "seen", 3),
        ("image:noise", "seen", 5),
        ("image:missing", "seen", 5),
        ("image:fog", "unseen image", 3),
        ("image:fog", "unseen image", 5),
        ("text:typos", "unseen text", 3),
        ("text:typos", "unseen text", 5),
        ("text:mismatch", "mismatch text", 5),
    }
    config = EvaluationConfig("m", Path("o"), corruptions=["image:swirl"], severities=[2])
    assert conditions_of(config)[1:] == [Condition("image:swirl", "image:swirl", 2)]


def test_conditions_that_damage_both_modalities():
    kinds = ["image:fog", "image:jpeg", "image:swirl", "image:noise", "text:typos", "text:scramble", "text:mismatch"]
    config = EvaluationConfig("m", Path("o"), corruptions=["both"], kinds=kinds, severities=[4])
    pairs = {"image:fog+text:typos", "image:jpeg+text:scramble", "image:swirl+text:typos"}
    found = conditions_of(config)[1:]
    assert {c.name for c in found} == pairs
    assert {c.group for c in found} == {"both"}
    named = EvaluationConfig("m", Path("o"), corruptions=["image:black+text:missing"], severities=[5])
    assert conditions_of(named)[1:] == [Condition("image:black+text:missing", "image:black+text:missing", 5)]


def test_damage_to_both_modalities_is_the_damage_to_each(vqa):
    model, task, samples = vqa
    condition = Condition("image:noise+text:typos", "both", 3)
    assert condition.damaged is None
    changed, failed = condition.apply(samples, 1)
    assert not failed
    image = Condition("image:noise", "seen", 3).apply(samples, 1)[0]
    text = Condition("text:typos", "unseen text", 3).apply(samples, 1)[0]
    for both, one, other in zip(changed, image, text, strict=True):
        assert both.damage == (one.damage[0], other.damage[1]) == (0.6, 0.6)
        assert np.array_equal(both.load_image(), one.load_image())
        assert both.context == other.context
    # nobody can be told which modality to trust
    cells = run_condition(model, task, [Method(), Method(ORACLE)], samples, condition, 0, 14)
    assert [cell.method for cell in cells] == ["static"]
    swapped, _ = Condition("image:mismatch+text:mismatch", "both", 5).apply(samples, 0)
    for before, after in zip(samples, swapped, strict=True):
        other = next(s for s in samples if s.image == after.image)
        assert before.image != after.image
        assert after.context == other.context != before.context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruptions": ["image:rain"]}, "image:rain"),
        ({"corruptions": ["image:fog+text:rain"]}, "text:rain"),
        ({"severities": [0, 3]}, "severities"),
        ({"severities": []}, "severities"),
        ({"seeds": 0}, "seeds"),
        ({"samples": 0}, "samples"),
        ({"validation_samples": 0}, "validation_samples"),
        ({"task": "ocr"}, "unknown task 'ocr', expected one of vqa, "),
        ({"methods": ["rule", "vcd"]}, "unknown method 'vcd'"),
        ({"split": "testing"}, "unknown split 'testing', did you mean test"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"kinds": ["image:pixelated"]}, "unknown kind 'image:pixelated', did you mean image:pixelate"),
        ({"kinds": ["image:fog", "typos"]}, "unknown kind 'typos', did you mean text:typos"),
        # known, but in none of the groups: nothing would be evaluated
        (
            {"kinds": ["image:fog", "text:typos"], "corruptions": ["seen"]},
            "text:typos leave nothing of seen",
        ),
        ({"kinds": ["image:fog"], "corruptions": ["both"]}, "image:fog leave nothing of both"),
    ],
)
def test_wrong_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        conditions_of(EvaluationConfig("m", Path("o"), **changes))


def test_one_question_an_image_another_with_another_seed():
    data = load_easy_vqa("test")
    runs = [one_per_image(data, 40, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert [s.image for s in runs[0]] == [s.image for s in runs[2]]
    assert sum(a.id != b.id for a, b in zip(runs[0], runs[2], strict=True)) > 20
    assert len({s.image for s in runs[0]}) == 40
    assert 0.2 < np.mean([s.answers[0] in ("yes", "no") for s in runs[0]]) < 0.5


# ---- tables of one modality


def evaluate_table(folder, rows, *options):
    folder.mkdir()
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "evaluate",
        "--model=demo-llava",
        f"--data={folder}",
        f"--out={folder / 'run'}",
        "--samples=6",
        "--seeds=2",
    ]
    command += ["--severities=5", "--methods=static,rule", "--calibration-samples=0", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    results = json.loads((folder / "run" / "results.json").read_text())
    measured = {row["condition"]: row["samples"] for row in results["results"]["conditions"]}
    return measured, results["run"]["conditions_left_out"], (folder / "run" / "report.md").read_text()


def rows_of(samples, **changes):
    rows = [
        {
            "id": s.id,
            "image": str(s.image),
            "context": s.context,
            "question": s.question,
            "answers": s.answers,
            **changes,
        }
        for s in samples
    ]
    return rows + [{**row, "id": f"train {row['id']}", "split": "train"} for row in rows[:2]]


NAMES = "image:black,image:missing,text:typos,text:missing,text:mismatch,image:fog+text:typos"


def test_a_table_without_contexts_is_evaluated_where_it_can_be(vqa, tmp_path, caplog):
    rows = rows_of(vqa[2], context=None, split="test")
    measured, left_out, report = evaluate_table(tmp_path / "data", rows, f"--corruptions={NAMES}")
    assert measured == {"clean": 6, "image:black": 6}
    assert left_out.pop("image:missing") == "no sample has anything left to answer from"
    assert left_out == dict.fromkeys(NAMES.split(",")[2:], "no sample has a context")
    for name, reason in left_out.items():
        assert f"left out: {name}: {reason}" in caplog.messages
        assert f"{name}: {reason}" in report
    assert "| text: typos |" not in report


def test_a_table_of_texts_is_evaluated_where_it_can_be(vqa, tmp_path, caplog):
    rows = [{**row, "file_name": row["image"], "image": None} for row in rows_of(vqa[2], split="test")]
    measured, left_out, report = evaluate_table(tmp_path / "data", rows, f"--corruptions={NAMES}")
    # without a context too nothing would be left
    assert measured == {"clean": 6, "text:typos": 6, "text:mismatch": 6}
    assert left_out.pop("text:missing") == "no sample has anything left to answer from"
    assert set(left_out.values()) == {"no sample has an image"}
    assert "no image in any row" in caplog.text
    assert "image: black" not in report


def test_conditions_that_no_sample_of_a_group_can_take_cost_no_other(vqa, tmp_path):
    """Images too small for ImageNet-C, and one scene that cannot be mismatched with itself."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"")
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        {"id": n, "image": f"../{n}.png", "context": "a box.", "question": "what?", "answer": "box"} for n in range(6)
    ]
    rows = [{**row, "split": split, "id": f"{split} {row['id']}"} for row in rows for split in ("train", "test")]
    names = "--corruptions=image:imagenet_c/fog,image:black,image:mismatch"
    measured, left_out, _ = evaluate_table(tmp_path / "data", rows, names)
    assert measured == {"clean": 6, "image:black": 6}
    assert "16" in left_out["image:imagenet_c/fog"]
    assert "no other sample" in left_out["image:mismatch"]


def test_where_some_samples_lack_a_modality_their_number_is_shown(vqa, tmp_path):
    rows = rows_of(vqa[2], split="test")
    for row in rows[:3:2]:  # of every other image one question is asked
        row["context"] = None
    measured, left_out, report = evaluate_table(tmp_path / "data", rows, "--corruptions=text:typos,image:black")
    assert measured == {"clean": 6, "text:typos": 4, "image:black": 6}
    assert not left_out
    assert "| text: typos (4 of 6) |" in report
    assert "| image: black |" in report


# ---- the command

# three batches, which two processes cannot share evenly, the last of them shorter
_COMMAND = """
evaluate --samples 11 --seeds 2 --severities 5 --batch-size 4
--kinds image:fog,text:typos --methods static,rule,entropy,oracle
--training-samples 12 --validation-samples 4
"""


def evaluate_as(rank, command, store):
    processes.joined(rank, 2, store)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output[-3000:]


def results_of(command, out, count=1):
    command = [*command, "--out", str(out)]
    if count == 1:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output[-3000:]
    else:
        assert processes.run(evaluate_as, command, out / "store", count=count) == [0] * count
    results = json.loads((out / "results.json").read_text())
    costs = results["results"].pop("cost")
    assert all(row["milliseconds"] > 0 for row in costs)
    return results


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """What is run, on a checkpoint that is calibrated, and its results."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, processor = load("demo-llava")
    calibrate(model.eval(), PromptCollator(processor), load_easy_vqa("train"), 60, show_progress=False)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    command = [*_COMMAND.split(), "--model", str(folder / "model")]
    return command, results_of(command, folder), folder


def flat(results, name=""):
    """What is found, by where: {place: number or text}."""
    if not isinstance(results, dict | list):
        return {name: results}
    parts = results.items() if isinstance(results, dict) else enumerate(results)
    return {place: value for key, part in parts for place, value in flat(part, f"{name}/{key}").items()}


def test_two_processes_find_what_one_does(command, tmp_path):
    one, two = command[1], results_of(command[0], tmp_path, count=2)
    assert one["run"].pop("processes") == 1
    assert two["run"].pop("processes") == 2
    for run in (one, two):
        run["run"].pop("command")
    assert flat(one) == pytest.approx(flat(two), abs=1e-5, nan_ok=True)


def test_the_command_writes_results_report_and_pictures(command):
    _, results, out = command
    assert results["run"]["samples"] == 11
    assert results["run"]["versions"]["torch"] == torch.__version__
    assert {row["condition"] for row in results["results"]["conditions"]} == {"clean", "image:fog", "text:typos"}
    report = (out / "report.md").read_text()
    for name in ("severity", "weights", "reliability", "risk", "samples"):
        assert f"({name}.png)" in report
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 200


@pytest.mark.parametrize("model", ["demo-blip2", "internvl"])
def test_a_vanilla_checkpoint_is_evaluated_by_generation(tmp_path, monkeypatch, model):
    """Its answers are those of its own class, one sample at a time."""
    scores, answered = VisualQuestionAnswering.scores, []

    def watched(task, answers, samples):
        answered.append((samples, [answer["prediction"] for answer in answers]))
        return scores(task, answers, samples)

    monkeypatch.setattr(VisualQuestionAnswering, "scores", watched)
    config = EvaluationConfig(model, tmp_path, task="vqa-generate", corruptions=["image:black"], severities=[5])
    config.seeds, config.samples = 1, 4
    if model == "internvl":
        config.model = str(tiny.save_internvl(tmp_path / "internvl"))
    config.calibration_samples, config.methods = 0, ("static",)
    results = evaluate(config)
    assert [row["method"] for row in results["results"]["groups"]] == ["static", "static"]
    dms, processor = load(config.model)
    vanilla = tiny.VANILLA[type(dms)].from_pretrained(CHECKPOINTS / config.model).eval()
    samples, found = answered[0]
    expected = []
    for sample in samples:
        prompt = PromptCollator(processor)([sample])
        prompt.pop("modality_ids")
        new = vanilla.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert found == expected
    assert len(set(expected)) > 1
    right = sum(text == sample.answers[0] for text, sample in zip(expected, samples, strict=True))
    assert results["results"]["groups"][0]["score"] == right / 4


def test_weights_of_another_precision(tmp_path):
    config = EvaluationConfig("demo-llava", tmp_path, corruptions=["image:black"], severities=[5], seeds=1, samples=4)
    config.calibration_samples, config.dtype = 0, "bfloat16"
    results = evaluate(config)
    assert results["run"]["dtype"] == "bfloat16"
    assert {row["method"] for row in results["results"]["groups"]} == {"static", "rule", "oracle"}


@pytest.mark.parametrize(("task", "metric"), [("caption", "CIDEr-D"), ("retrieval", "R@1")])
def test_captioning_and_retrieval(tmp_path, task, metric):
    folder = tmp_path / "table"
    folder.mkdir()
    rows = []
    for number in range(40):
        Image.new("RGB", (64, 64), (6 * number, number % 7 * 30, 90)).save(folder / f"{number}.png")
        words = {"context": f"a box of kind {number}.", "answers": [f"box number {number}"]}
        rows.append(
            {
                "image": f"{number}.png",
                "question": "describe the picture.",
                "task": task,
                "split": SPLITS[number % 3],
                **words,
            }
        )
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = EvaluationConfig("demo-llava", tmp_path, task=task, data=str(folder), corruptions=["image:blur"])
    config.severities, config.seeds, config.samples, config.calibration_samples = [4], 2, 5, 0
    assert len(evaluate(EvaluationConfig(**vars(config) | {"out": tmp_path / "plain"}))["results"]["conditions"]) == 10
    # fitted to other samples, whose texts are others
    config.methods, config.training_samples, config.validation_samples = ("rule", "entropy", "oracle"), 4, 4
    results = evaluate(EvaluationConfig(**vars(config)))
    assert results["run"]["metric"] == metric
    assert {row["method"] for row in results["results"]["groups"]} == {"static", "rule", "entropy", "oracle"}
    assert {row["samples"] for row in results["results"]["conditions"]} == {5}
    assert metric in (tmp_path / "report.md").read_text()


# ---- what is fitted, and what is weighed


def test_nothing_is_fitted_to_what_is_evaluated(evaluated, tmp_path):
    options, _ = evaluated
    trained = {**options, "methods": ("static", "mean prior"), "training_samples": 4, "validation_samples": 4}
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="must not know the images that are evaluated; give other"):
            evaluate(EvaluationConfig(out=tmp_path / split, **trained | {"split": split}))
    # a test image in the training split is left out there
    data = shutil.copytree(options["data"], tmp_path / "data")
    rows = [json.loads(row) for row in (data / "table.jsonl").read_text().splitlines()]
    shared = next(row for row in rows if row["split"] == "test")
    rows.append({**shared, "split": "train", "id": "shared"})
    (data / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(EvaluationConfig(out=tmp_path / "out", **trained | {"data": str(data)}))
    assert "'shared' has an image that is evaluated" in found["run"]["left_out"]["shared"]


@pytest.mark.usefixtures("first_level_alone")
def test_samples_without_contexts_are_weighed_as_they_are_calibrated(tmp_path, capsys, caplog):
    """The image against the whole prompt: else the question would be neutral, and the image had all weight."""
    rows = [json.loads(row) for row in (tiny.table(tmp_path / "data", 90) / "table.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"], row["answers"] = ("test", "train", "train")[number % 3], [("red", "blue")[number % 2]]
        del row["context"]
    (tmp_path / "data" / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"data": str(tmp_path / "data"), "corruptions": ["image:black"], "severities": [5], "seeds": 1}
    out = tmp_path / "out"
    found = evaluate(EvaluationConfig(model="demo-llava", out=out, samples=8, methods=("static", "rule"), **options))
    assert capsys.readouterr().out.count("weighed against the whole text of the prompts") == 1
    rule = [row for row in found["results"]["conditions"] if row["method"] == "rule"]
    assert {row["condition"]: 0 < row["weights"][1] < 1 for row in rule} == {"clean": True, "image:black": True}

    # a checkpoint remembers it, and one that was calibrated with contexts does not make them of questions
    for contexts in (False, True):
        model, processor = load("demo-llava")
        samples = [s if contexts else s.replace(context=None) for s in load_easy_vqa("train")[:700]]
        calibrate(model, PromptCollator(processor), samples, 60, show_progress=False)
        for saved in (model, processor):
            saved.save_pretrained(tmp_path / str(contexts))
        caplog.clear()
        config = EvaluationConfig(model=str(tmp_path / str(contexts)), out=out, samples=4, **options)
        rows = evaluate(config)["results"]["conditions"]
        weights = [row["weights"] for row in rows if row["method"] == "rule"]
        assert all((row == [1, 0]) == contexts for row in weights)
        assert ("the calibration's had" in caplog.text) == contexts
        collator = load_for_answers(str(tmp_path / str(contexts)), 4)[1]
        assert collator.whole_text != contexts


def test_samples_are_spread_over_the_data(tmp_path):
    """A table that is sorted by class is not measured on its first class alone."""
    samples = [Sample(str(n), Image.new("RGB", (2, 2), (n, 0, 0)), None, "what?", (str(n),)) for n in range(10)]
    assert [sample.id for sample in one_per_image(samples, 5)] == ["0", "2", "4", "6", "8"]
    assert [sample.id for sample in one_per_image(samples, 20)] == [str(number) for number in range(10)]


def test_a_checkpoint_is_asked_with_its_own_scheduler_and_what_it_has_learned(vqa, tmp_path, caplog):
    model, processor = load("demo-llava", {"scheduler": "learned"})
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "model")
    config = EvaluationConfig(
        str(tmp_path / "model"), tmp_path / "out", corruptions=["image:black"], samples=2, seeds=1
    )
    config.calibration_samples, config.methods = 0, ("static", "rule", "second look")
    found = evaluate(config)
    assert found["run"]["methods"] == ["static", "rule", "own"]
    assert found["run"]["scheduler"] == "learned"
    assert "left out: second look" in caplog.text


def test_what_a_run_held_out_is_unseen(tmp_path):
    assert families_of("demo-llava") == {}
    choices = {"image_families": ["color"], "held_out_image_families": ["blur"], "text_families": [], "text_rate": 0}
    choices |= {"model": "demo-llava", "output_dir": str(tmp_path), "use_cpu": True}
    (tmp_path / "run.yaml").write_text(json.dumps(choices))
    write_record(tmp_path, read_arguments(tmp_path / "run.yaml", []), 1, (0, 1), 1.0, [])
    families = CorruptionConfig(**{"both_rate": BOTH_RATE, **families_of(str(tmp_path / "final"))})
    assert (families.image_families, families.held_out_image_families) == (["color"], ["blur"])
    assert (families.text_families, families.text_rate, families.both_rate) == ([], 0, 0)
    config = EvaluationConfig("m", Path("o"), corruptions=["unseen"], severities=[5], families=families)
    assert {c.name.split(":")[0] for c in conditions_of(config)} == {"clean", "image", "text"}
    assert "image:color_cast" not in {c.name for c in conditions_of(config)}
