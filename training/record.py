"""What a training run was, for its model card."""

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from modeling_dms import __version__


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
    model, data, corruptions, training = arguments
    plain = training.to_dict()
    described = {
        "command": shlex.join(["dms", *(sys.argv[1:] if command is None else command)]),
        "arguments": {
            **asdict(model),
            **asdict(data),
            **asdict(corruptions),
            **{name: plain[name] for name in CHOICES},
        },
        "samples": samples,
        "steps": list(steps),
        "seconds": round(seconds, 1),
        "hardware": hardware(training.device, training.world_size),
        "versions": {
            "modeling_dms": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    path = run / RECORD
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return path


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
