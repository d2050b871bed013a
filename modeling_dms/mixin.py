"""What every DMS class adds to its vanilla class: observe, weigh, steer; loading and saving."""

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from modeling_dms.calibrate.calibration_mixin import CalibrationMixin
from modeling_dms.calibrate.damage import IMAGE_FAMILIES, TEXT_FAMILIES
from modeling_dms.calibrate.statistics import Statistics
from modeling_dms.configuration.configuration_dms import MODALITIES, DMSConfig
from modeling_dms.dms import DynamicModalityScheduling, ModalitySize, UnimodalView, read_out
from modeling_dms.evidence.pixels import PIXEL_STATISTICS
from modeling_dms.evidence.surprisal import SURPRISAL_STATISTICS
from modeling_dms.observe.images import Images
from modeling_dms.observe.layers import layers_of, watch_layers
from modeling_dms.observe.observation_mixin import ObservationMixin
from modeling_dms.observe.prefill import Reading
from modeling_dms.observe.prompt import OWN, VISION, Prompt, Schedule
from modeling_dms.outputs import DMSOutput, dms_output
from modeling_dms.reliability_mixin import ReliabilityMixin
from modeling_dms.save.checkpoints import CheckpointMixin
from modeling_dms.sources_mixin import SourcesMixin
from modeling_dms.steer.bias import first_attended, key_bias
from modeling_dms.weigh.scheduler import ZeroLinear, uniform_weights


logger = logging.get_logger(__name__)


def _whole(parameter: Tensor) -> Tensor:
    """Its value, gathered if it is sharded."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


class DMSMixin(ObservationMixin, SourcesMixin, CalibrationMixin, ReliabilityMixin, CheckpointMixin):
    """Adds the `dms` submodule to a class of transformers: what is observed of a prompt, and the weights it gives.

    Until calibrated (or with `scheduler="uniform"`) a model answers exactly as the vanilla class.
    """

    dms: DynamicModalityScheduling
    config: Any
    # what its makers call the backbone, and the modules between its vision tower and its language model
    family: ClassVar[str]
    bridge: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)

    # --- construction

    def __init__(self, config: Any):
        super().__init__(config)
        dms: DMSConfig = config.dms_config
        tower, stack = cast(PreTrainedModel, self._vision_tower()), cast(PreTrainedModel, self._text_stack())
        self._vision_layers, self._text_layers = self.watched_layers(dms)
        self._token_size = token_size = self.get_input_embeddings().weight.shape[1]
        self.dms = DynamicModalityScheduling(
            dms,
            [
                ModalitySize(
                    token_size,
                    len(self._vision_layers),
                    2 * tower.config.hidden_size,
                    2 * tower.config.hidden_size,
                    PIXEL_STATISTICS,
                    len(IMAGE_FAMILIES),
                    # what pixels tell of damage the tower's layers do not add to
                    reads_layers=False,
                ),
                ModalitySize(
                    token_size,
                    len(self._text_layers),
                    2 * stack.config.hidden_size,
                    2 * token_size,
                    SURPRISAL_STATISTICS if self._is_causal else 0,
                    len(TEXT_FAMILIES),
                    # words that clean texts never hold
                    reads_layers=True,
                    in_prompt=self._is_causal,
                ),
            ],
        )
        watch_layers(tower, self._vision_layers)
        watch_layers(stack, self._text_layers)
        self.post_init()

    def watched_layers(self, dms: DMSConfig) -> tuple[list[int], list[int]]:
        """The layers of the vision tower, and of the text stack, that a configuration has watched."""
        tower, stack = len(layers_of(self._vision_tower())), len(layers_of(self._text_stack()))
        return dms.layers_of("vision", tower), dms.layers_of("text", stack, self._is_causal)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Statistics):
            module.reset()
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, UnimodalView):
            init.zeros_(module.query)
        else:
            super()._init_weights(module)

    def _readout(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The backbone's output layer, frozen and in its own precision, see [`Readout`]."""
        head = self.get_output_embeddings()
        # sharded by itself (FSDP2) it is still a plain layer, whose weight is whole after a gather; its module would
        # train it, and keep its output besides
        plain = type(head) is nn.Linear or type(head).__bases__ == (FSDPModule, nn.Linear)
        # torchao puts a weight of its own into a plain layer
        plain = plain and (isinstance(head.weight, DTensor) or not is_traceable_wrapper_subclass(head.weight))
        if plain and not head.weight.is_meta:
            bias = None if head.bias is None else _whole(head.bias)
            return read_out(states, _whole(cast(Tensor, head.weight)), bias, tokens)
        # quantised, wrapped or offloaded: only the module itself knows how
        logits = head(states.to(head.weight.dtype if head.weight.dtype.is_floating_point else self.dtype))
        return logits if tokens is None else logits.gather(-1, tokens.expand(*logits.shape[:-1], -1))

    @property
    def _is_sharded(self) -> bool:
        """Whether other processes hold parts of the model."""
        sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(cast(nn.Module, self))
        return sharded or any(isinstance(parameter, DTensor) for parameter in self.parameters())

    # --- weigh

    @property
    def _is_static(self) -> bool:
        return self.config.dms_config.scheduler == "uniform"

    def _prompt(
        self,
        inputs: dict[str, Any],
        images: Images | None,
        own: dict[str, Tensor | None],
        labels: Tensor | None = None,
    ) -> Prompt | None:
        """Where the modalities of prompts are; `None` where nothing tells.

        Args:
            inputs: of `forward`.
            images: theirs, encoded.
            own: the caller's values of `OWN`, or `None` for each.
            labels: of the losses.

        Raises:
            ValueError: for inputs that do not fit together, or a sample of which there is nothing.
        """
        input_ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        mask, modality_ids, given = inputs.get("attention_mask"), own["modality_ids"], own["modality_weights"]
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if input_ids is None and embeddings is None:
            return None
        if input_ids is None and own.get("source_ids") is not None:
            raise ValueError("source_ids need input_ids: embeddings do not tell which source is an image")
        if input_ids is None and modality_ids is None and not self._is_static:
            return None  # nothing tells which positions are text
        if input_ids is None and modality_ids is not None:
            placeholders = modality_ids == VISION
        else:
            placeholders = self._placeholders_of(input_ids, embeddings)
        owner = None if images is None else self._owner(images, placeholders)
        sources = own.get("source_ids")
        named = "modality_ids" if sources is None else "source_ids"
        if sources is not None and modality_ids is not None:
            raise ValueError("pass either modality_ids or source_ids, not both")
        if sources is not None:
            modality_ids = sources
        elif modality_ids is None:
            ids = torch.where(placeholders, self.config.image_token_id, -1) if input_ids is None else input_ids
            modality_ids = self.infer_modality_ids(ids, mask, labels)
        if modality_ids.shape != placeholders.shape:
            raise ValueError(
                f"{named} must have the shape of the prompt {tuple(placeholders.shape)}, "
                f"got {tuple(modality_ids.shape)}"
            )
        most = len(MODALITIES) if named == "modality_ids" else modality_ids.shape[1]
        if not torch.compiler.is_compiling() and bool(((modality_ids < 0) | (modality_ids > most)).any()):
            raise ValueError(f"{named} must lie in [0, {most}], got {modality_ids.unique().tolist()}")
        unseen = images is None and embeddings is None
        weighed = given is None and not self._is_static
        if weighed and images is not None and (images.statistics is None or images.pixels is None or owner is None):
            return None  # encoded by another model, or nobody's
        if unseen and weighed and not torch.compiler.is_compiling() and placeholders.any():
            return None  # image tokens without an image
        unknown = torch.zeros_like(modality_ids[:, :0], dtype=torch.bool)
        prompt = Prompt(input_ids, embeddings, mask, modality_ids, unknown, placeholders, images, owner, given)
        if sources is None and labels is None and input_ids is not None and all(own[name] is None for name in OWN[:3]):
            sources = self._infer_sources(prompt)
        if sources is not None:
            return self._with_sources(replace(prompt, modality_ids=sources), own)

        present = torch.stack([(modality_ids == m + 1).any(1) for m in range(len(MODALITIES))], 1)
        if unseen:
            present[:, MODALITIES.index("vision")] &= given is not None
        if own["modality_ids"] is None:
            # special tokens alone count as text, on which no weight has an effect
            present[:, MODALITIES.index("text")] |= ~present.any(1)
        modality_mask = own["modality_mask"]
        if modality_mask is not None and modality_mask.shape != present.shape:
            raise ValueError(
                f"modality_mask must be (batch, modality) {tuple(present.shape)}, got {tuple(modality_mask.shape)}"
            )
        modality_mask = present if modality_mask is None else modality_mask.bool().to(present.device) & present
        uniform_weights(modality_mask)  # raises for a sample without any
        if given is not None:
            given = self._check_weights(given, modality_mask)
        return replace(prompt, modality_mask=modality_mask, given=given)

    def _schedule(self, prompt: Prompt, signals: bool, reading: Reading | None = None) -> Schedule:
        """Modality weights of prompts.

        Args:
            signals: whether any are wanted. The static baseline has neither signals nor losses; a caller's weights
                need signals for the losses alone.
            reading: what the language model has made of the prompts; `None` where it has not read them yet.
        """
        output, weights = None, prompt.given
        if signals and prompt.source_types is not None:
            self._check_calibration()
            output = self._weigh_sources(prompt, reading)
            weights = output.weights
        elif signals:
            self._check_calibration()
            output = self._weigh_modalities(prompt, reading)
            weights = output.weights
        if weights is None:
            weights = uniform_weights(prompt.modality_mask)
        schedule = Schedule(prompt.modality_ids, prompt.modality_mask, weights, output)
        schedule.bias = self._key_bias(weights, prompt.modality_ids, prompt.attention_mask)
        if reading is not None and output is not None and prompt.source_types is None:
            schedule.look = self._second_look(prompt, schedule, output)
        return schedule

    def _weigh_modalities(self, prompt: Prompt, reading: Reading | None) -> DMSOutput:
        """Weights and signals of each modality: (B, M)."""
        if reading is None:
            text = self._text_features(prompt.input_ids, prompt.embeddings, prompt.modality_ids)
        else:
            text = self._text_in_prompt(prompt, reading)
            looked_at = self.dms.calibration.suspicious(text) | self.dms.calibration.reads_all
            rows = looked_at.nonzero()[:, 0]
            if len(rows):
                ids = cast(Tensor, prompt.input_ids)[rows]
                text.closer = (rows, self._text_features(ids, None, prompt.modality_ids[rows]))
        features = [self._vision_features(prompt), text]
        return self.dms(features, prompt.modality_mask, self._readout, prompt.given)

    def _key_bias(self, weights: Tensor, modality_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """The attention bias (B, P), or `None` where fusion is not by attention or nothing is to be changed.

        Uniform weights take the backbone's own path, so that they change nothing, not even rounding.

        Args:
            attention_mask: (B, P), tells where a row begins.
        """
        if self.config.dms_config.fusion != "attention":
            return None
        bias = key_bias(
            weights, modality_ids, first_attended(attention_mask, modality_ids) if self._is_causal else None
        )
        if torch.compiler.is_compiling() or bias.requires_grad or bool(bias.any()):
            return bias
        return None

    # --- checks

    def _check_calibration(self) -> None:
        """Warns, once, of statistics that an earlier version fitted: its detectors read other numbers."""
        calibration = self.dms.calibration
        if not torch.compiler.is_compiling() and calibration.modalities[0].level > 0 and not calibration.is_calibrated:
            logger.warning_once(
                "this checkpoint was calibrated by modeling_dms 0.1, whose detectors read other numbers than today's: "
                "run `model.calibrate` (or `dms calibrate`) again; until then the rule's weights are uniform"
            )

    def _check_padding(self, attention_mask: Tensor | None) -> None:
        """Warns, once, of prompts (B, L) to be gone on from that end in padding."""
        known = attention_mask is not None and attention_mask.ndim == 2
        if self._is_causal and known and not attention_mask[:, -1].all():
            logger.warning_once(
                "some prompts are padded on the right, where a decoder-only model goes on from the padding and "
                "answers wrongly: set `processor.tokenizer.padding_side = 'left'`"
            )

    def _check_weights(self, weights: Tensor, modality_mask: Tensor) -> Tensor:
        if weights.shape != modality_mask.shape:
            raise ValueError(
                f"modality_weights must be (batch, modality) {tuple(modality_mask.shape)}, got {tuple(weights.shape)}"
            )
        weights = weights.to(modality_mask.device).float()
        if not torch.compiler.is_compiling():
            fine = weights.isfinite().all() and (weights >= 0).all() and (weights.sum(1) - 1).abs().max() < 1e-3
            if not fine:
                raise ValueError(
                    f"modality_weights must be at least 0 and sum to 1 in every row, got {weights.tolist()}"
                )
        # an absent modality has weight 0 whatever the caller says
        weights = weights * modality_mask
        total = weights.sum(1, keepdim=True)
        return torch.where(total > 0, weights / total.clamp_min(1e-12), uniform_weights(modality_mask))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """As the parent's; never reentrant, which fails with a mask that has a gradient."""
        options = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    # --- output

    def _with_dms(
        self,
        outputs: Any,
        schedule: Schedule | None,
        labels: Tensor | None,
        schedule_target: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        reliability: Tensor | None = None,
    ) -> Any:
        """The backbone's output with weights, signals and losses; its loss plus the weighted DMS losses.

        Args:
            num_items_in_batch: see [`DynamicModalityScheduling.losses`].
        """
        values = dict(outputs)
        if schedule is not None:
            values |= {"modality_weights": schedule.weights, "modality_ids": schedule.modality_ids}
            values["reliability"] = reliability
            if schedule.output is not None:
                values["modality_signals"] = schedule.output.signals
            if labels is not None and isinstance(schedule.output, DMSOutput):
                losses = self.dms.losses(
                    schedule.output, schedule.modality_mask, labels, schedule_target, num_items_in_batch
                )
                values["dms_losses"] = {"task": outputs.loss, **losses}
                values["loss"] = outputs.loss + self.dms.total(losses)
        return dms_output(type(outputs))(**values)
