"""`dms train`: loads, calibrates, trains, calibrates again, saves, and draws the curves."""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, set_seed

from modeling_dms.calibration_fit import MIN_SAMPLES
from modeling_dms.save.staging import check_writable
from modeling_dms.training.align import AlignmentTrainer
from modeling_dms.training.arguments import Arguments
from modeling_dms.training.card import replacing, write_card
from modeling_dms.training.corruptions import EpochCallback, ModalityDropout
from modeling_dms.training.curves import draw_curves
from modeling_dms.training.data import PromptCollator, Sample, load_sources
from modeling_dms.training.data.samples import image_key, kept, split_answered, split_readable
from modeling_dms.training.loading import folders_of, load, room_for_prompts
from modeling_dms.training.push import push
from modeling_dms.training.record import is_recorded, training_request, write_record
from modeling_dms.training.resume import last_complete_checkpoint
from modeling_dms.training.stages import prepare
from modeling_dms.training.trainer import DMSTrainer


BATCH = 32  # of calibration
# why samples are left out
UNREADABLE, UNANSWERED, UNASKABLE = "their images cannot be read", "they have no answer", "they cannot be asked"


def calibrate(
    model: Any,
    collator: PromptCollator,
    samples: Sequence[Sample],
    count: int,
    show_progress: bool = True,
    level: int = 2,
) -> Any:
    """Calibrates a DMS model (or a peft wrapper of one) on samples of distinct images, evenly spread over the data:
    the first ones of a sorted set would be of one kind.

    In batches of a fixed size: the self-made corruptions are drawn batch by batch, and the same data must give the
    same statistics whatever the batch and the number of processes of a training step.

    Raises:
        ValueError: for too few images or contexts, or as `model.calibrate`.
    """
    distinct = list({image_key(sample.image): sample for sample in reversed(samples)}.values())[::-1]
    images = sum(sample.image is not None for sample in distinct)
    count = min(count, len(distinct))
    distinct = [distinct[place * len(distinct) // count] for place in range(count)]
    with_image = sum(sample.image is not None for sample in distinct)
    with_context = sum(bool((sample.context or "").strip()) for sample in distinct)
    if min(with_image, with_context) < MIN_SAMPLES:
        hint = "" if images else "; without images there is nothing to weigh"
        if 0 < images < MIN_SAMPLES:
            hint += (
                "; these are of the training split, which holds four of five images of a table without a column "
                "'split': with 'train' there in every row all are taken"
            )
        if with_context < with_image:
            hint += "; without contexts, docs/calibrate.md weighs images against questions"
        raise ValueError(
            f"calibration needs {MIN_SAMPLES} different images and {MIN_SAMPLES} contexts to weigh them against, got "
            f"{with_image} and {with_context}{hint}"
        )
    clean = PromptCollator(collator.processor, max_length=collator.max_length)
    batches = (clean(distinct[start : start + BATCH]) for start in range(0, len(distinct), BATCH))
    return model.calibrate(batches, level, count, show_progress)


class CalibrationCallback(TrainerCallback):
    """Calls `calibrate` every so many steps, and where the scheduler's warm-up ends: training a language model moves
    what the statistics describe, and from then on the scheduler learns from them.

    Args:
        calibrate: without arguments.
        steps: 0 for the end of the warm-up alone.
    """

    def __init__(self, calibrate: Callable[[], Any], steps: int):
        self.calibrate, self.steps = calibrate, steps

    def on_step_end(self, args, state, control, **kwargs):
        """After the step, before a checkpoint of it is saved."""
        warm = math.ceil(args.scheduler_warmup_ratio * state.max_steps)
        if state.global_step == warm or (self.steps and state.global_step % self.steps == 0):
            self.calibrate()


def check_base(name: str, out: Path) -> None:
    """Refuses to save an adapter that is built on a checkpoint over its base, without which it is nothing.

    Raises:
        ValueError: if it would be.
    """
    if folders_of(name)[-1].resolve() == out.resolve():
        raise ValueError(f"{out} is the base that the adapter is built on: save it in another folder")


def run_training(arguments: Arguments, resume: bool = False) -> DMSTrainer:
    """A whole run; everything it writes goes to `output_dir`: `checkpoint-*`, `final/`, `log.json`, `run.json`,
    `curves.png`. With `push_to_hub` it ends on the Hub, after all is written.

    Raises:
        ValueError: for choices that exclude each other, data none of which can be used, an adapter that would be saved
            over its base, or `resume` where only other runs have left checkpoints.
        OSError: if `output_dir` cannot be written to.
        ConnectionError: if pushing fails.
    """
    began = time.time()
    choices, data, corruptions, training = arguments
    if choices.stage == "scheduler" and training.scheduler_warmup_ratio:
        raise ValueError("scheduler_warmup_ratio must be 0 with stage='scheduler', which trains nothing else")
    run = Path(cast(str, training.output_dir))
    final = run / "final"
    if training.should_save:
        check_writable(run)
    set_seed(training.seed)
    # an adapter is trained further where LoRA is trained, else merged
    adapts = choices.stage in ("backbone", "joint") and choices.lora_rank > 0
    model, processor = load(choices.model, cast(dict, choices.dms), merge=not adapts, dtype=choices.dtype)
    if adapts:
        for folder in (final, *run.glob("checkpoint-*")):
            check_base(choices.model, folder)
    chosen, learns = model.config.dms_config, choices.stage in ("scheduler", "joint")
    if learns and chosen.scheduler == "learned" and not chosen.lambda_schedule and training.schedule_target != "none":
        raise ValueError(
            f"schedule_target={training.schedule_target!r} does nothing where lambda_schedule is 0, as it is in "
            f"{choices.model}: give another lambda_schedule in `dms`, or schedule_target='none'"
        )
    room = room_for_prompts(model, processor, 0)
    if room is not None and data.max_length is not None and data.max_length > room:
        raise ValueError(f"max_length={data.max_length}: {choices.model} has room for {room} tokens")
    samples = load_sources(data.data, "train", data.task, data.max_samples, training.should_log)
    show_progress = training.should_log and not training.disable_tqdm
    samples = kept(samples, split_answered, UNANSWERED)
    samples = kept(samples, partial(split_readable, show_progress=show_progress), UNREADABLE)
    request = training_request(arguments, samples)
    start = last_complete_checkpoint(run, request) if resume else None
    collator = PromptCollator(
        processor,
        with_labels=True,
        max_length=data.max_length or room,
        schedule_temperature=training.schedule_temperature,
        with_ids=True,
    )
    samples = kept(samples, collator.split_askable, UNASKABLE)
    if data.calibration_samples and not model.dms.calibration.is_calibrated:
        calibrate(model, collator, samples, data.calibration_samples, show_progress)
    trained = prepare(
        model, choices.stage, choices.lora_rank, choices.train_bridge, choices.lora_targets, choices.save_bridge
    )
    trainer = (AlignmentTrainer if choices.stage == "align" else DMSTrainer)(
        model=trained,
        args=training,
        data_collator=collator,
        train_dataset=ModalityDropout.of(samples, corruptions, seed=training.seed),
        processing_class=processor,
        callbacks=[EpochCallback()],
    )
    trainer.request = request
    moves = bool(data.calibration_samples) and choices.stage != "scheduler"  # what the statistics describe

    def calibrate_again() -> None:
        calibrate(trainer.model, collator, samples, data.calibration_samples, show_progress=False)

    if moves:
        trainer.add_callback(CalibrationCallback(calibrate_again, data.calibration_steps))
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if moves:
        calibrate_again()
    trainer.save_model(str(final), _internal_call=True)  # nothing is pushed before all is written
    if training.should_save:
        log = run / "log.json"
        log.write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
        draw_curves(trainer.state.log_history, run / "curves.png")
        first, last = 0 if start is None else int(start.name.split("-")[1]), trainer.state.global_step
        if first < last or not is_recorded(run, arguments):  # else a finished run was finished again
            write_record(run, arguments, len(samples), (first, last), time.time() - began)
        write_card(final, runs=[run], name=run.resolve().name)
        if training.push_to_hub:
            push(final, training.hub_model_id or run.resolve().name, training.hub_private_repo, training.hub_token)
    return trainer


def run_calibration(name: str, data: str, out: Path, count: int = 1000, dms: dict | None = None) -> Any:
    """Calibrates a checkpoint on `count` clean training images of `data` and saves it; an adapter as an adapter.

    Args:
        dms: fields of DMSConfig, instead of the checkpoint's.

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
    report = calibrate(model, collator, samples, count)
    with replacing(out) as folder:
        model.save_pretrained(folder)
        if (folder / "adapter_config.json").exists():
            model.base_model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    return report
