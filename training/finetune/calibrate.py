"""`dms calibrate`: a checkpoint calibrated and saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_dms.save.staging import check_writable
from modeling_dms.training.data.collator import PromptCollator
from modeling_dms.training.data.samples import UNASKABLE, UNREADABLE, kept, split_readable
from modeling_dms.training.data.sources import load_sources
from modeling_dms.training.finetune.curves import draw_detection
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import folders_of, load, on_accelerator, room_for_prompts
from modeling_dms.training.publish.card import replacing


def check_base(name: str, out: Path) -> None:
    """Refuses to save an adapter that is built on a checkpoint over its base, without which it is nothing.

    Raises:
        ValueError: if it would be.
    """
    if folders_of(name)[-1].resolve() == out.resolve():
        raise ValueError(f"{out} is the base that the adapter is built on: save it in another folder")


def run_calibration(
    name: str,
    data: str,
    out: Path,
    count: int = 1000,
    dms: dict | None = None,
    leave_out: Sequence[str] = (),
    max_asked: int = 100,
) -> Any:
    """Calibrates a checkpoint on `count` clean training images of `data` and saves it, an adapter as an adapter, with
    what it sees of damage in `calibration.txt` and `calibration.png`.

    Args:
        dms: fields of DMSConfig, instead of the checkpoint's.
        leave_out: families of self-made damage that it must not know.
        max_asked: see `model.calibrate`.

    Returns:
        The report, which can be printed.

    Raises:
        ValueError: if no sample can be used, for a field that `DMSConfig` does not have or refuses, or if an adapter
            would be saved over its base.
        OSError: if it cannot be saved; what was in `out` is still there then.
    """
    check_writable(out)
    samples = load_sources(data, "train")  # first: a mistake in a table costs no loading of billions
    samples = kept(samples, split_readable, UNREADABLE)
    model, processor = load(name, dms, merge=False)
    if hasattr(model, "peft_config"):
        check_base(name, out)
    collator = PromptCollator(processor, max_length=room_for_prompts(model, processor, 0))
    samples = kept(samples, collator.split_askable, UNASKABLE)
    report = calibrate(on_accelerator(model), collator, samples, count, leave_out=leave_out, max_asked=max_asked)
    with replacing(out) as folder:
        model.save_pretrained(folder)
        if (folder / "adapter_config.json").exists():
            model.base_model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "calibration.txt").write_text(f"{report}\n", encoding="utf-8")
        draw_detection(report, folder / "calibration.png")
    return report
