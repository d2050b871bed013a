"""What a training run was, for its model card."""

import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from modeling_dms.training.data import Sample
from modeling_dms.training.models.request import data_request, model_request, versions


RECORD = "run.json"
# of `TrainingArguments`, which has a hundred more
CHOICES = (
    "seed",
    "learning_rate",
    "scheduler_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "schedule_target",
    "scheduler_warmup_ratio",
)
# of `TrainingArguments`, whatever the weights do not depend on: where and how often something is written or told,
# processes that load data, and how memory is saved by computing the same again
_FREE = re.compile(
    r"output_dir|(log|logging|save|eval|hub|trackio|ddp|do|per_device_eval|gradient_checkpointing)(_.*)?"
    r"|activation_checkpointing.*|push_to_hub|report_to|run_name|project|disable_tqdm|debug|skip_memory_metrics"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context|in_order)"
    r"|include_.*|prediction_loss_only|batch_eval_metrics|torch_empty_cache_steps|enable_jit_checkpoint"
    r"|restore_callback_states_from_checkpoint|resume_from_checkpoint|local_rank"
)


def training_request(arguments: Sequence[Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the weights of a run depend on: its choices, and what its model and data are.

    Args:
        arguments: as `read_arguments` gives them; the model has been loaded.
        samples: of the data.
    """
    model, data, corruptions, training = arguments
    return {
        **asdict(model),
        **asdict(data),
        **asdict(corruptions),
        **{name: value for name, value in training.to_dict().items() if not _FREE.fullmatch(name)},
        "processes": training.world_size,
        "model": model_request(model.model),
        "data": data_request(data.data, samples),
    }


def write_record(
    run: Path,
    arguments: Sequence[Any],
    samples: int,
    steps: Sequence[int],
    seconds: float,
    command: Sequence[str] | None = None,
) -> Path:
    """Writes `run.json`: command, choices, samples, steps, seconds, hardware and versions.

    Args:
        arguments: model, data, corruptions and training, as `read_arguments` gives them.
        steps: the first, after which a resumed run went on, and the last.
        seconds: that these steps took, with loading and calibration.
        command: by default that of this process.
    """
    training = arguments[-1]
    described = {
        "command": shlex.join(["dms", *(sys.argv[1:] if command is None else command)]),
        "arguments": _choices(arguments),
        "samples": samples,
        "steps": list(steps),
        "seconds": round(seconds, 1),
        "hardware": hardware(training.device, training.world_size),
        "versions": versions(),
    }
    path = run / RECORD
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return path


def is_recorded(run: Path, arguments: Sequence[Any]) -> bool:
    """Whether `run.json` tells of a run with these choices."""
    recorded = read_record(run).get("arguments") if (run / RECORD).exists() else None
    return recorded == json.loads(json.dumps(_choices(arguments)))


def families_of(model: str) -> dict[str, Any]:
    """What a run of `dms train` draws corruptions from and holds out, by the fields of `CorruptionConfig`; a rate of 0
    where it draws from nothing; nothing of a checkpoint that lies in no such folder."""
    run = Path(model).resolve().parent
    recorded = read_record(run).get("arguments", {}) if (run / RECORD).exists() else {}
    found = {name: value for name, value in recorded.items() if name.endswith(("image_families", "text_families"))}
    for modality in ("image", "text"):
        if not found.get(f"{modality}_families", True):
            found |= {f"{modality}_rate": 0.0, "both_rate": 0.0}
    return found


def _choices(arguments: Sequence[Any]) -> dict[str, Any]:
    """Those that a card shows."""
    model, data, corruptions, training = arguments
    plain = training.to_dict()
    shown = {name: plain[name] for name in CHOICES}
    return {**asdict(model), **asdict(data), **asdict(corruptions), **shown}


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """The processor or accelerator that a run has, and how much of it."""
    if device.type == "cpu":
        return {"device": _processor(), "threads": torch.get_num_threads(), "processes": processes}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": processes}


def _processor() -> str:
    """As the kernel of Linux names it; elsewhere as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def read_record(run: Path) -> dict[str, Any]:
    """What `write_record` wrote, and the log. Of a run without it (of an older version) steps and seconds of the log.

    Raises:
        ValueError: if the folder holds neither.
    """
    if (run / RECORD).exists():
        return json.loads((run / RECORD).read_text(encoding="utf-8"))
    log = run / "log.json"
    if not log.exists():
        raise ValueError(f"{run} is no folder of `dms train`: it holds neither {RECORD} nor log.json")
    history = cast(list[dict[str, Any]], json.loads(log.read_text(encoding="utf-8")))
    last = next((row for row in reversed(history) if "train_runtime" in row), None)
    if last is None:
        raise ValueError(f"{log} tells of no finished run")
    return {"steps": [0, last["step"]], "seconds": last["train_runtime"]}
