"""The choices of a training run, as dataclasses that one YAML file and the command line fill."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from transformers import HfArgumentParser

from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.trainer import DMSTrainingArguments


PRESETS = Path(__file__).parent.parent / "configuration" / "presets"


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(metadata={"help": "Folder or Hub id of a BLIP-2, LLaVA or DMS checkpoint."})
    stage: Literal["backbone", "scheduler", "joint"] = field(
        default="scheduler",
        metadata={"help": "`scheduler`: `dms` alone; `backbone`: LoRA with `dms` frozen; `joint`: both."},
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains the language model's own weights."})
    train_bridge: bool = field(default=False, metadata={"help": "Also train the projector or Q-Former."})
    dms: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "Fields of DMSConfig (a JSON object on the command line)."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the loaded weights."})


@dataclass
class DataArguments:
    """What it is trained on."""

    data: str = field(
        default="easy-vqa",
        metadata={"help": "`easy-vqa`, `openmoji`, a folder or JSONL/Parquet file, or a Hub id of the table."},
    )
    task: str | None = field(default=None, metadata={"help": "`vqa`, `caption` or `retrieval`, where data have more."})
    max_samples: int | None = field(default=None, metadata={"help": "Take only so many."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row; the end of the context is cut."})
    calibration_samples: int = field(
        default=300, metadata={"help": "Clean samples to calibrate on, before and after training; 0 leaves it out."}
    )


Arguments = tuple[ModelArguments, DataArguments, CorruptionConfig, DMSTrainingArguments]
_TYPES = (ModelArguments, DataArguments, CorruptionConfig, DMSTrainingArguments)


def read_arguments(config: Path | None, overrides: Sequence[str] = ()) -> Arguments:
    """A YAML file's fields, with `--name value` pairs over them.

    Args:
        config: a file, or the name of a preset that ships with the package.

    Raises:
        ValueError: for a field that no dataclass has, or a value that is refused, naming it.
        FileNotFoundError: naming the presets there are.
    """
    import yaml

    values: dict[str, Any] = {}
    if config is not None:
        path = config if config.exists() else PRESETS / f"{config}.yaml"
        if not path.exists():
            known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
            raise FileNotFoundError(f"there is no file {config} and no preset of that name; presets: {known}")
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    names = {f.name for kind in _TYPES for f in dataclasses.fields(cast(Any, kind))}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"{config}: unknown field(s) {', '.join(unknown)}")
    parser = HfArgumentParser(cast(Any, _TYPES), allow_abbrev=False)
    for action in parser._actions:
        if action.dest in values:
            action.required = False
    parser.set_defaults(**values)
    try:
        model, data, corruptions, training = parser.parse_args_into_dataclasses(
            list(overrides), look_for_args_file=False
        )
    except SystemExit as error:
        raise ValueError("the command line could not be read, see above") from error
    if isinstance(model.dms, str):
        model.dms = json.loads(model.dms)
    return model, data, corruptions, training
