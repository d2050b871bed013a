"""The choices of a training run, as dataclasses that one YAML file and the command line fill."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, cast, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from modeling_dms.configuration import configuration_dms
from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.data.samples import TASKS
from modeling_dms.training.finetune.trainer import DMSTrainingArguments
from modeling_dms.training.models.loading import DTYPES, check_dms
from modeling_dms.training.names import check_names


PRESETS = Path(configuration_dms.__file__).parent / "presets"


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(metadata={"help": "Folder or Hub id of a vanilla or DMS checkpoint."})
    stage: Literal["align", "bridge", "backbone", "scheduler", "joint"] = field(
        default="scheduler",
        metadata={
            "help": "`scheduler`: the scheduler alone; `backbone`: LoRA with `dms` frozen; `joint`: both; `bridge`: "
            "the projector or Q-Former alone; `align`: the same without the language model, by its words' embeddings."
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains the language model's own weights."})
    lora_targets: Literal["attention", "all"] = field(
        default="attention", metadata={"help": "Queries and values, or every linear layer of the language model."}
    )
    train_bridge: bool = field(default=False, metadata={"help": "Also train the projector or Q-Former."})
    save_bridge: bool = field(
        default=False,
        metadata={"help": "The adapter also holds the projector or Q-Former that an earlier stage has trained."},
    )
    # with `None` among the types `HfArgumentParser` reads a string; it calls `dict` on it otherwise
    dms: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Fields of DMSConfig (a JSON object on the command line)."}
    )
    dtype: str = field(default="auto", metadata={"help": f"Precision of the loaded weights: {', '.join(DTYPES)}."})

    def __post_init__(self):
        if isinstance(self.dms, str):
            try:
                self.dms = json.loads(self.dms)
            except ValueError as error:
                raise ValueError(f"dms must be a JSON object, got {self.dms!r}: {error}") from error
        self.dms = {} if self.dms is None else self.dms
        if not isinstance(self.dms, dict):
            raise ValueError(f"dms must hold fields of DMSConfig by name, got {self.dms!r}")
        check_dms(self.dms)
        check_names("dtype", [self.dtype], DTYPES)
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")


@dataclass
class DataArguments:
    """What it is trained on."""

    data: str = field(
        default="easy-vqa",
        metadata={
            "help": "`easy-vqa`, `openmoji`, `flickr8k`, a folder or JSONL/Parquet file, or a Hub id of the table. "
            "Several are separated by commas; `name:task` says what is wanted of one."
        },
    )
    task: str | None = field(default=None, metadata={"help": "`vqa`, `caption` or `retrieval`, where data have more."})
    max_samples: int | None = field(default=None, metadata={"help": "Take only so many of each source."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row; the end of the context is cut."})
    calibration_samples: int = field(
        default=300,
        metadata={
            "help": "Clean samples to calibrate on, before training and, of the validation split, after it; 0: none."
        },
    )
    calibration_steps: int = field(
        default=0,
        metadata={
            "help": "Where the language model is trained, also calibrate every so many steps; at the end of the "
            "scheduler's warm-up it is done anyway."
        },
    )

    def __post_init__(self):
        check_names("task", [self.task] if self.task is not None else [], TASKS)
        for name, least in (
            ("max_samples", 1),
            ("max_length", 1),
            ("calibration_samples", 0),
            ("calibration_steps", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


# what most runs give of the fields of `TrainingArguments`
COMMON = {
    "output_dir": "Folder that gets the checkpoints, `final/`, log and curves. [required, here or in the file]",
    "max_steps": "Steps; -1 takes `num_train_epochs` instead.",
    "num_train_epochs": "Passes over the data.",
    "learning_rate": "Highest learning rate.",
    "warmup_steps": "Steps in which it rises to that; below 1 a share of all.",
    "per_device_train_batch_size": "Samples of a step, on each device.",
    "gradient_accumulation_steps": "Such batches of one step.",
    "bf16": "Compute in bfloat16 where that is safe.",
    "use_cpu": "Leave an accelerator alone.",
    "seed": "Of corruptions, order and initial weights.",
    "save_steps": "A checkpoint every so many steps, to `--resume` from.",
    "logging_steps": "A row of the log every so many steps.",
    "report_to": "Trackers such as tensorboard or trackio.",
    "push_to_hub": "Upload `final/` when all is written.",
}
TRAINING_ARGUMENTS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"

Arguments = tuple[ModelArguments, DataArguments, CorruptionConfig, DMSTrainingArguments]
_TYPES = (ModelArguments, DataArguments, CorruptionConfig, DMSTrainingArguments)


class _Parser(HfArgumentParser):
    """Raises instead of printing its usage, which has hundreds of lines, and leaving Python."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_arguments(config: Path | None, overrides: Sequence[str] = ()) -> Arguments:
    """A YAML file's fields, with `--name value` pairs over them.

    Args:
        config: a file, or the name of a preset that ships with the package.

    Raises:
        ValueError: for a field that no dataclass has, or a value that is refused, naming it.
        FileNotFoundError: naming the presets there are.
    """
    values = {} if config is None else _read_file(config)
    names = {f.name for kind in _TYPES for f in dataclasses.fields(cast(Any, kind))}
    if "activation_checkpointing" not in names:  # its name since transformers 5.23
        values = {str(name).replace("activation_c", "gradient_c"): value for name, value in values.items()}
    unknown = sorted(set(map(str, values)) - names)
    if unknown:
        raise ValueError(f"{config}: unknown field(s) {', '.join(unknown)}")
    parser = _Parser(cast(Any, _TYPES), allow_abbrev=False)
    actions = {action.dest: action for action in reversed(parser._actions)}
    # `TrainingArguments` would write to a folder of its own choice
    actions["output_dir"].required = True
    # as if typed in front of the others: argparse checks types and choices there, of defaults it does not
    given: list[str] = []
    for name, value in values.items():
        takes_several = actions[name].nargs == "+"
        if isinstance(value, NoneType | list | dict) and type(value) not in _types_of(name):
            raise ValueError(f"{config}: {name} must be one value, got {json.dumps(value, default=str)}")
        if isinstance(value, list) and value and takes_several:
            given += [f"--{name}", *map(str, value)]
        elif value is None or isinstance(value, list):
            parser.set_defaults(**{name: value})
        else:
            given.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    try:
        *read, rest = parser.parse_args_into_dataclasses([*given, *overrides], True, look_for_args_file=False)
    except TypeError as error:  # `TrainingArguments` hands the keys of dictionaries on as arguments
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unknown: {' '.join(rest)}; `dms train --help` lists the fields")
    return cast(Arguments, tuple(read))


def _types_of(name: str) -> set[Any]:
    """What a field may be, of which the parser knows one alone."""
    hints = next(hints for kind in reversed(_TYPES) if name in (hints := get_type_hints(kind)))
    return {get_origin(part) or part for part in (hints[name], *get_args(hints[name]))}


def described_fields() -> dict[str, list[tuple[str, str]]]:
    """By group, how each field is given as an option, and what it is for: all of this package's, and `COMMON`."""
    library = {f.name for f in dataclasses.fields(TrainingArguments)}
    groups = {"Model": ModelArguments, "Data": DataArguments, "Corruptions": CorruptionConfig}
    found = {title: _described(kind) for title, kind in groups.items()}
    found["Training"] = {name: row for name, row in _described(DMSTrainingArguments).items() if name not in library}
    rows = _described(TrainingArguments, COMMON)
    title = f"Training, {len(COMMON)} of the {len(library)} fields of transformers' TrainingArguments"
    found[title] = {name: rows[name] for name in COMMON}
    return {title: list(rows.values()) for title, rows in found.items()}


def _described(kind: Any, texts: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
    rows = {}
    for action in HfArgumentParser(kind, add_help=False)._actions:
        if action.option_strings[0].startswith("--no_"):  # the other side of a switch
            continue
        value = "true|false" if action.nargs == "?" else getattr(action.type, "__name__", "str")
        value = "|".join(map(str, action.choices)) if action.choices else value
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        text = (texts or {}).get(action.dest, action.help)
        if action.required:
            text = f"{text} [required, here or in the file]"
        elif default not in (None, {}):
            text = f"{text} [default: {default}]"
        rows[action.dest] = (f"--{action.dest} {value}{' ...' if action.nargs == '+' else ''}", text)
    return rows


def described_presets() -> list[tuple[str, str]]:
    """The name of each preset and the first sentence of its file."""
    found = []
    for path in sorted(PRESETS.glob("*.yaml")):
        lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        found.append((path.stem, " ".join(line.lstrip("# ") for line in lines).split(". ")[0].rstrip(".") + "."))
    return found


def _read_file(config: Path) -> dict[str, Any]:
    import yaml

    path = config if config.is_file() else PRESETS / f"{config}.yaml"
    if not path.exists():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no file {config} and no preset of that name; presets: {known}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{config} must hold `name: value` pairs, got {values!r}")
    return values or {}
