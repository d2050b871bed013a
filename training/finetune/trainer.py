"""`DMSTrainer`: what a DMS model needs in training beyond `Trainer`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from modeling_dms._compat import require
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.training.finetune.features import FeatureCache
from modeling_dms.training.finetune.resume import last_complete_checkpoint, write_manifest
from modeling_dms.training.finetune.stages import encodes_images
from modeling_dms.training.models.request import write_request
from modeling_dms.weigh.losses import leave_one_out_target
from modeling_dms.weigh.scheduler import uniform_weights


@dataclass
class DMSTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what concerns the scheduler."""

    schedule_target: Literal["severity", "leave_one_out", "none"] = field(
        default="severity",
        metadata={
            "help": "Target of the schedule loss: the known severity of the injected corruptions, the task loss "
            "without each modality (two more forward passes), or none."
        },
    )
    schedule_temperature: float = field(
        default=0.2, metadata={"help": "Temperature of the target: the lower, the nearer to 0 and 1."}
    )
    scheduler_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps at uniform weights, before the scheduler takes part."}
    )
    scheduler_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the learned scheduler; by default `learning_rate`, which may suit LoRA."}
    )
    feature_cache_gb: float = field(
        default=0.0, metadata={"help": "Memory for the features of undamaged images, where no encoder is trained."}
    )

    def __post_init__(self):
        require("accelerate")
        super().__post_init__()
        for tracker in get_reporting_integration_callbacks(self.report_to):
            try:
                tracker()
            except RuntimeError as error:  # as in `Trainer`, but before any work
                raise ImportError(f"report_to: {error}") from error
        self.remove_unused_columns = False
        if self.schedule_temperature <= 0:
            raise ValueError(f"schedule_temperature must be above 0, got {self.schedule_temperature}")
        if not 0 <= self.scheduler_warmup_ratio <= 1:
            raise ValueError(f"scheduler_warmup_ratio must lie in [0, 1], got {self.scheduler_warmup_ratio}")
        if self.scheduler_learning_rate is not None and self.scheduler_learning_rate < 0:
            raise ValueError(f"scheduler_learning_rate must be at least 0, got {self.scheduler_learning_rate}")
        if self.feature_cache_gb < 0:
            raise ValueError(f"feature_cache_gb must be at least 0, got {self.feature_cache_gb}")


def check_launched(args: TrainingArguments) -> None:
    """Raises ValueError where `Trainer` would wrap the model in `DataParallel`, which splits images from their
    prompts."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: run `accelerate launch`, one process a GPU, or let it see one alone "
            "(CUDA_VISIBLE_DEVICES=0)"
        )


class DMSTrainer(Trainer):
    """`Trainer` with the schedule targets, the scheduler's warm-up, logs of each loss and of the weights, an error
    that names the samples of a loss that is not finite, and checkpoints that are resumed from only if complete.

    The collator may add `sample_ids` (a list of strings), `image_keys` (a list) and `schedule_target` to a batch, see
    `PromptCollator`.

    Attributes:
        request: what every checkpoint says it was made by; `dms train` resumes from those of its own request alone.
    """

    args: DMSTrainingArguments
    request: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_launched(self.args)
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        bridge = getattr(self.model, "bridge", ())
        frozen = not any(p.requires_grad for name, p in self.model.named_parameters() if encodes_images(name, bridge))
        size = int(self.args.feature_cache_gb * 2**30)
        self._features = FeatureCache(size) if size and frozen else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self.args.scheduler_learning_rate is not None:
            named = (self.model if model is None else model).named_parameters()
            own = {id(parameter) for name, parameter in named if {"dms", "scheduler"} <= {*name.split(".")}}
            for group in [*optimizer.param_groups]:
                of_scheduler = [p for p in group["params"] if id(p) in own]
                if of_scheduler:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    rate = self.args.scheduler_learning_rate
                    optimizer.add_param_group({**group, "params": of_scheduler, "lr": rate})
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        inputs = dict(inputs)
        sample_ids = inputs.pop("sample_ids", None)
        keys = inputs.pop("image_keys", None)
        if self._features is not None and keys is not None and inputs.get("pixel_values") is not None:
            encoder = self.accelerator.unwrap_model(model)
            encoded = self._features.encode(encoder, inputs.pop("pixel_values"), keys)
            inputs["mm_encoder_outputs"] = {"image": encoded}
        sources = inputs.get("source_ids")
        # what is known of the damage is of one image and one passage
        if self.args.schedule_target == "none" or sources is not None:
            inputs.pop("schedule_target", None)
        elif model.training and self.args.schedule_target == "leave_one_out":
            inputs["schedule_target"] = self._leave_one_out(model, inputs)
        if model.training and self.state.global_step < self.args.scheduler_warmup_ratio * self.state.max_steps:
            there = torch.ones(len(inputs["input_ids"]), len(MODALITIES), dtype=torch.bool)
            if sources is not None:
                there = torch.stack([(sources == s + 1).any(1) for s in range(int(sources.max()))], 1)
            inputs["modality_weights"] = uniform_weights(there).to(self.args.device)
        if model.training and not self.accelerator.unwrap_model(model).config.is_encoder_decoder:
            inputs |= only_targets(inputs["labels"])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}; samples of the batch: {sample_ids}"
            )
        if model.training:
            self._collect(outputs, inputs["labels"], kwargs.get("num_items_in_batch"), sources is None)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _leave_one_out(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """softmax(loss without m / tau): (B, M)."""
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "schedule_target"}
        shift = not self.accelerator.unwrap_model(model).config.is_encoder_decoder
        model.eval()
        losses = []
        for index in range(len(MODALITIES)):
            weights = torch.full((len(labels), len(MODALITIES)), 1 / (len(MODALITIES) - 1), device=labels.device)
            weights[:, index] = 0
            losses.append(per_sample_loss(model(**rest, modality_weights=weights).logits, labels, shift))
        model.train()
        return leave_one_out_target(torch.stack(losses, 1), self.args.schedule_temperature)

    # --- logs

    @torch.no_grad()
    def _collect(self, outputs: Any, labels: Tensor, num_items: Tensor | int | None, of_modalities: bool) -> None:
        """Adds up the losses, and the sums and squares of the weights where they are of modalities, not of sources,
        and both are there."""
        values = {f"loss_{name}": loss.detach() for name, loss in (outputs.get("dms_losses") or {}).items()}
        if num_items is not None:
            # sums over the number of all accumulated batches' targets: as means over this batch's own
            scale = num_items / (labels != -100).sum().clamp_min(1)
            values = {name: loss * scale for name, loss in values.items()}
        weights = outputs["modality_weights"].detach().float()
        if not of_modalities:
            weights = weights.new_empty(0, len(MODALITIES))
        weights = weights[(weights > 0).all(1)]
        values["_weighed"] = torch.tensor(float(len(weights)), device=weights.device)
        for name, column in zip(MODALITIES, weights.unbind(1), strict=True):
            values |= {f"weight_{name}": column.sum(), f"_square_{name}": column.pow(2).sum()}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._count += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with `loss_*`, and `weight_*` and `weight_*_spread` (standard deviation) per modality."""
        if self._count and "loss" in logs:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name].float() for name in names]) / self._count
            means = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            weighed = max(means.pop("_weighed"), 1e-9)
            for name in MODALITIES:
                means[f"weight_{name}"] /= weighed
                variance = means.pop(f"_square_{name}") / weighed - means[f"weight_{name}"] ** 2
                means[f"weight_{name}_spread"] = max(0.0, variance) ** 0.5
            logs |= means
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        target = output_dir or cast(str, self.args.output_dir)
        if not self.args.should_save:  # it only helps the process that does to gather the weights
            super()._save(target, state_dict)
            return
        from modeling_dms.training.publish.card import replacing

        with replacing(Path(target)) as folder:
            super()._save(str(folder), state_dict)
            if (folder / "adapter_config.json").exists():
                # an adapter alone does not tell DMS's choices
                self.accelerator.unwrap_model(self.model).get_base_model().config.save_pretrained(folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the card of `dms card` beside the model in `output_dir`, with what the run has recorded there.

        Args:
            tasks, dataset, dataset_args: as `Trainer` takes them; unused, since results come from `dms evaluate`.

        Raises:
            as `write_card`.
        """
        from modeling_dms.training.publish.card import write_card

        if self.is_world_process_zero():
            folder = Path(cast(str, self.args.output_dir))
            metadata = {"language": language, "license": license, "tags": tags}
            metadata |= {"base_model": finetuned_from, "datasets": dataset_tags}
            runs = [folder] if (folder / "log.json").exists() else []
            write_card(folder, runs=runs, name=model_name, metadata=metadata)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # older checkpoints go only after the new one is complete
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run = Path(self._get_output_dir(trial))
            checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_request(checkpoint, self.request)
            write_manifest(checkpoint)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last *complete* checkpoint, or starts anew."""
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(cast(str, self.args.output_dir), self.request)
            resume_from_checkpoint = None if found is None else str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks at the number of steps after a step only: a finished run would be trained one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


def only_targets(labels: Tensor) -> dict[str, Tensor]:
    """Arguments that keep a decoder-only model from computing logits (B, L, K) where no row has a target: with a
    large vocabulary and short answers they would take more time and memory than the language model."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    columns = (shifted != -100).any(0).nonzero()[:, 0]
    return {"logits_to_keep": columns, "shift_labels": shifted[:, columns]}


def per_sample_loss(logits: Tensor, labels: Tensor, shift: bool = True) -> Tensor:
    """Mean cross-entropy of each sample's targets: (B, L, K), (B, L) -> (B,); 0 for a sample without a target.

    Args:
        shift: position i predicts label i + 1, as in decoder-only models.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # (B, L), 0 where ignored
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)
