"""`dms train`: loads, calibrates, trains, calibrates again, saves, and draws the curves."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate.utils import gather_object
from transformers import TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from modeling_dms.save.staging import check_writable
from modeling_dms.training.corruptions import EpochCallback, ModalityDropout
from modeling_dms.training.data.collator import PromptCollator
from modeling_dms.training.data.samples import (
    UNANSWERED,
    UNASKABLE,
    UNREADABLE,
    Sample,
    kept,
    split_answered,
    split_readable,
)
from modeling_dms.training.data.sources import load_sources
from modeling_dms.training.finetune.align import AlignmentTrainer
from modeling_dms.training.finetune.arguments import Arguments, DataArguments
from modeling_dms.training.finetune.calibrate import check_base
from modeling_dms.training.finetune.curves import draw_curves
from modeling_dms.training.finetune.resume import last_complete_checkpoint
from modeling_dms.training.finetune.stages import prepare
from modeling_dms.training.finetune.trainer import DMSTrainer, check_launched
from modeling_dms.training.models.calibrate import calibrate, chosen, reads_whole_prompts
from modeling_dms.training.models.loading import load, room_for_prompts
from modeling_dms.training.publish.card import write_card
from modeling_dms.training.publish.push import push
from modeling_dms.training.publish.record import is_recorded, training_request, write_record


logger = logging.getLogger(__name__)


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


def _held_out(data: DataArguments, collator: PromptCollator) -> list[Sample] | None:
    """What can be asked of the validation split; `None`, with a warning, where in some process that is too little to
    calibrate on."""
    samples, problem = None, None
    try:
        samples = load_sources(data.data, "validation", data.task, data.max_samples, False)
        readable = partial(split_readable, show_progress=False)
        for split, why in ((readable, UNREADABLE), (split_answered, UNANSWERED), (collator.split_askable, UNASKABLE)):
            samples = kept(samples, split, why)
        chosen(samples, data.calibration_samples)
    except (ValueError, OSError) as error:
        problem = str(error)
    problem = next(filter(None, gather_object([problem])), None)
    if problem is not None:
        logger.warning(f"calibrated on samples that were trained on; the validation split does not suffice: {problem}")
        return None
    return samples


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
    check_launched(training)
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
    moves = bool(data.calibration_samples) and choices.stage != "scheduler"  # what the statistics describe
    if data.calibration_samples and not model.dms.calibration.is_calibrated:
        if not (is_fsdp_enabled() or is_deepspeed_zero3_enabled()):  # which place a model themselves
            model.to(training.device)
        # how far answers can be relied on is asked at the end
        calibrate(model, collator, samples, data.calibration_samples, show_progress, level=2 if moves else 3)
    collator.whole_text = reads_whole_prompts(model)
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

    def calibrate_again(level: int = 2, on: Sequence[Sample] = samples) -> None:
        calibrate(trainer.model, collator, on, data.calibration_samples, show_progress=False, level=level)

    if moves:
        trainer.add_callback(CalibrationCallback(calibrate_again, data.calibration_steps))
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if moves:  # what a model has been trained on looks too familiar, and its answers too sure
        calibrate_again(3, _held_out(data, collator) or samples)
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
