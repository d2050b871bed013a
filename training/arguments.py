"""The choices of a training run, as dataclasses that one YAML file and the command line fill."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from transformers import HfArgumentParser

from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.trainer import DMSTrainingArguments


PRESETS = Path(__file__).parent.parent / "configuration" / "presets"


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
    dtype: str = field(default="auto", metadata={"help": "Precision of the loaded weights."})

    def __post_init__(self):
        if isinstance(self.dms, str):
            try:
                self.dms = json.loads(self.dms)
            except ValueError as error:
                raise ValueError(f"dms must be a JSON object, got {self.dms!r}: {error}") from error
        self.dms = {} if self.dms is None else self.dms
        if not isinstance(self.dms, dict):
            raise ValueError(f"dms must hold fields of DMSConfig by name, got {self.dms!r}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")


@dataclass
class DataArguments:
    """What it is trained on."""

    data: str = field(
        default="easy-vqa",
        metadata={
            "help": "`easy-vqa`, `openmoji`, a folder or JSONL/Parquet file, or a Hub id of the table. Several are "
            "separated by commas; `name:task` says what is wanted of one."
        },
    )
    task: str | None = field(default=None, metadata={"help": "`vqa`, `caption` or `retrieval`, where data have more."})
    max_samples: int | None = field(default=None, metadata={"help": "Take only so many of each source."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row; the end of the context is cut."})
    calibration_samples: int = field(
        default=300, metadata={"help": "Clean samples to calibrate on, before and after training; 0 leaves it out."}
    )
    calibration_steps: int = field(
        default=0,
        metadata={
            "help": "Where the language model is trained, also calibrate every so many steps; at the end of the "
            "scheduler's warm-up it is done anyway."
        },
    )

    def __post_init__(self):
        for name in ("calibration_samples", "calibration_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


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
        takes_lists = actions[name].nargs == "+"
        if isinstance(value, list) and value and takes_lists:
            given += [f"--{name}", *map(str, value)]
        elif value is None or (isinstance(value, list) and (takes_lists or actions[name].type is str)):
            parser.set_defaults(**{name: value})
        else:
            given.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return cast(Arguments, parser.parse_args_into_dataclasses([*given, *overrides], look_for_args_file=False))


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
