"""What every DMS backbone shares: from inputs to modality weights, and loading and saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import logging

from modeling_dms.attention import SDPA_KEY_BIAS
from modeling_dms.calibration import Statistics
from modeling_dms.calibration_mixin import CalibrationMixin
from modeling_dms.configuration.configuration_dms import MODALITIES, DMSConfig
from modeling_dms.dms import DynamicModalityScheduling, ModalityFeatures, ModalitySize, UnimodalView, read_out
from modeling_dms.export import auto_map, export_code
from modeling_dms.fusion import embedding_scale, first_attended, key_bias
from modeling_dms.outputs import ModalitySignals
from modeling_dms.prompt import TEXT, VISION, EncodedImages, Schedule, compact, take
from modeling_dms.scheduler import ZeroLinear, uniform_weights
from modeling_dms.staging import staged
from modeling_dms.text_only import layers_of, text_only_states, watch_layers
from modeling_dms.typicality import token_statistics


logger = logging.get_logger(__name__)


def _whole(parameter: Tensor) -> Tensor:
    """Its value, gathered if it is sharded."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


class DMSMixin(CalibrationMixin):
    """Adds the `dms` submodule to a `PreTrainedModel`. A backbone says how it encodes images and where its text stack
    is."""

    dms: DynamicModalityScheduling
    config: Any
    # `dtype=torch.bfloat16` at loading must not round the calibration either
    _keep_in_fp32_modules_strict: ClassVar = ["dms.calibration"]
    # the Auto class that loads an exported checkpoint
    _auto_map_name = "AutoModelForImageTextToText"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # classes outside of transformers inherit no conversion of checkpoint keys: without it a vanilla LLaVA loads
        # with a random lm_head
        mapping = None
        if issubclass(cls, PreTrainedModel):
            # quantisers leave alone what stays in single precision, whatever their own list of exceptions
            cls._keep_in_fp32_modules = [*(cls._keep_in_fp32_modules or ()), "dms"]
            mapping = get_checkpoint_conversion_mapping(cls.config_class.vanilla_model_type())
        if mapping:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)

    # --- what a backbone provides

    def _text_stack(self) -> nn.Module:
        """The language model's decoder, or the encoder of an encoder-decoder."""
        raise NotImplementedError

    def _run_text(self, embeddings: Tensor, mask: Tensor) -> Any:
        """Runs the text stack on text embeddings (B, N, D) alone."""
        return self._text_stack()(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False)

    def _encode_images(self, pixel_values: Tensor, **kwargs: Any) -> EncodedImages:
        """Encodes images (I, 3, H, W), keeping the hidden states that typicality looks at."""
        raise NotImplementedError

    def _encoded(self, outputs: Any) -> EncodedImages:
        """What `get_image_features` returned, as the other methods take it."""
        raise NotImplementedError

    def _vision_states(self, hidden: Sequence[Tensor | None] | None) -> list[Tensor] | None:
        """Those of the vision tower's hidden states that typicality looks at; `None` if they were not kept."""
        kept = [hidden[layer] for layer in self._vision_layers] if hidden is not None else []
        states = [state for state in kept if state is not None]
        return states if len(states) == len(self._vision_layers) else None

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

    # --- construction

    def _add_dms(self, vision_depth: int, vision_size: int, text_size: int) -> None:
        config: DMSConfig = self.config.dms_config
        stack = self._text_stack()
        self._vision_layers = config.layers_of("vision", vision_depth)
        self._text_layers = config.layers_of("text", len(layers_of(stack)))
        self._token_size = token_size = self.get_input_embeddings().weight.shape[1]
        self.dms = DynamicModalityScheduling(
            config,
            [
                ModalitySize(token_size, len(self._vision_layers), 2 * vision_size),
                ModalitySize(token_size, len(self._text_layers), 2 * text_size),
            ],
        )
        language = self.config.get_text_config(decoder=True)
        if config.scheduler == "learned" and language._attn_implementation == "sdpa":
            language._attn_implementation = SDPA_KEY_BIAS  # the same, but fast where the bias needs a gradient
        if self._text_layers[-1] > 0:
            watch_layers(stack, self._text_layers[-1])

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

    # --- from inputs to weights

    @property
    def _is_static(self) -> bool:
        return self.config.dms_config.scheduler == "uniform"

    def infer_modality_ids(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """1 at image placeholders, 2 at attended prompt tokens that are not special, 0 at padding and at labelled
        positions.

        Args:
            input_ids, attention_mask, labels: (B, L).

        Returns:
            (B, L), long.
        """
        text = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            text &= attention_mask.bool()
        # labels of an encoder-decoder are no positions of the prompt, even if there are as many
        prompted = not self.config.get_text_config().is_encoder_decoder
        if labels is not None and prompted and labels.shape == input_ids.shape:
            text &= labels == -100
        special = torch.tensor(self._special_ids(), device=input_ids.device, dtype=input_ids.dtype)
        text &= ~torch.isin(input_ids, special)
        return torch.where(self._placeholders(input_ids), VISION, torch.where(text, TEXT, 0))

    def _special_ids(self) -> list[int]:
        ids = self.config.get_text_config(decoder=True)
        special = [ids.pad_token_id, ids.bos_token_id, ids.eos_token_id]
        return [i for entry in special if entry is not None for i in (entry if isinstance(entry, list) else [entry])]

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        if self.config.image_token_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.config.image_token_id

    @torch.no_grad()
    def get_modality_weights(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        modality_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
    ) -> tuple[Tensor, ModalitySignals | None]:
        """Weights (B, M) and signals of prompts, without running the language model on them.

        Takes what `forward` takes; `modality_weights=` makes it use the result. There are no signals where the
        scheduler is uniform.
        """
        images = None
        if pixel_values is not None:
            images = self._encode_images(pixel_values)
        elif mm_encoder_outputs is not None:
            images = self._encoded(mm_encoder_outputs["image"])
        schedule = self._schedule(input_ids, None, attention_mask, images, modality_ids, modality_mask)
        return schedule.weights, None if schedule.output is None else schedule.output.signals

    def _schedule(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: EncodedImages | None = None,
        modality_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        modality_weights: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Schedule:
        """Modality weights of a prompt.

        Raises:
            ValueError: for inputs that do not fit together, or a sample without any modality.
        """
        if modality_ids is None:
            if input_ids is None and self._is_static:
                # as the vanilla class finds them; which of the others are text makes no difference here
                token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
                input_ids = torch.where(
                    (inputs_embeds == self.get_input_embeddings()(token)).all(-1), token, token + 1
                )
            if input_ids is None:
                raise ValueError(
                    "with `inputs_embeds` alone, `modality_ids` are needed: nothing else tells modalities apart"
                )
            mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            modality_ids = self.infer_modality_ids(input_ids, mask, labels)
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if modality_ids.shape != embeddings.shape[:2]:
            raise ValueError(
                f"modality_ids must have the shape of the prompt {tuple(embeddings.shape[:2])}, "
                f"got {tuple(modality_ids.shape)}"
            )
        if not torch.compiler.is_compiling() and bool(((modality_ids < 0) | (modality_ids > len(MODALITIES))).any()):
            raise ValueError(f"modality_ids must lie in [0, {len(MODALITIES)}], got {modality_ids.unique().tolist()}")
        placeholders = self._placeholders(input_ids) if input_ids is not None else modality_ids == VISION
        if images is None and input_ids is not None and inputs_embeds is None:
            self._check_count(placeholders, embeddings.new_zeros(0, 1, 1))
        if images is not None:
            self._check_count(placeholders, images.tokens)
            tokens = images.tokens.to(embeddings.device, embeddings.dtype)
            embeddings = embeddings.masked_scatter(placeholders[..., None], tokens)

        present = torch.stack([(modality_ids == m + 1).any(1) for m in range(len(MODALITIES))], 1)
        if images is None and inputs_embeds is None:
            present = present & (torch.arange(len(MODALITIES), device=present.device) != MODALITIES.index("vision"))
        if modality_mask is not None and modality_mask.shape != present.shape:
            raise ValueError(
                f"modality_mask must be (batch, modality) {tuple(present.shape)}, got {tuple(modality_mask.shape)}"
            )
        modality_mask = present if modality_mask is None else modality_mask.bool().to(present.device) & present
        weights = uniform_weights(modality_mask)
        if modality_weights is not None:
            weights = self._check_weights(modality_weights, modality_mask)
        output = None
        # the static baseline has neither signals nor losses; a caller's weights need signals for the losses alone
        if not self._is_static and (labels is not None or modality_weights is None):
            features = [
                self._vision_features(images, placeholders, modality_ids),
                self._text_features(embeddings, modality_ids),
            ]
            output = self.dms(features, modality_mask, self._readout, None if modality_weights is None else weights)
            weights = output.weights
        return Schedule(modality_ids, modality_mask, weights, embeddings, output)

    def _key_bias(
        self,
        weights: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        causal: bool = True,
    ) -> Tensor | None:
        """The attention bias (B, L), or `None` where fusion is not by attention or nothing is to be changed.

        Uniform weights take the backbone's own path, so that they change nothing, not even rounding.

        Args:
            attention_mask: tells where a row begins.
        """
        if self.config.dms_config.fusion != "attention":
            return None
        bias = key_bias(weights, modality_ids, first_attended(attention_mask, modality_ids) if causal else None)
        if torch.compiler.is_compiling() or bias.requires_grad or bool(bias.any()):
            return bias
        return None

    def _scaled(self, schedule: Schedule) -> Tensor:
        """The prompt's embeddings (B, L, D), scaled by the weights if fusion is by embedding."""
        if self.config.dms_config.fusion != "embedding":
            return schedule.embeddings
        scale = embedding_scale(schedule.weights, schedule.modality_ids)
        return schedule.embeddings * scale[..., None].to(schedule.embeddings.dtype)

    def _with_dms(
        self,
        output_class: type,
        outputs: Any,
        schedule: Schedule | None,
        labels: Tensor | None,
        schedule_target: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The backbone's output with weights, signals and losses; its loss plus the weighted DMS losses.

        Args:
            num_items_in_batch: targets of all the batches whose gradients are summed up, as `Trainer` passes it: all
                losses are sums over that number.
        """
        values = dict(outputs)
        if schedule is not None:
            values |= {"modality_weights": schedule.weights, "modality_ids": schedule.modality_ids}
            if schedule.output is not None:
                values["modality_signals"] = schedule.output.signals
            if labels is not None and schedule.output is not None:
                losses = self.dms.losses(
                    schedule.output, schedule.modality_mask, labels, schedule_target, num_items_in_batch
                )
                values["dms_losses"] = {"task": outputs.loss, **losses}
                values["loss"] = outputs.loss + self.dms.total(losses)
        return output_class(**values)

    def _vision_features(
        self, images: EncodedImages | None, placeholders: Tensor, modality_ids: Tensor
    ) -> ModalityFeatures:
        layers = self.dms.calibration.modalities[0].mean.shape
        # not `len`, which is one number for all that a program of `torch.export` is given
        batch, device = placeholders.shape[0], placeholders.device
        if images is None:
            mask = torch.zeros(batch, 1, dtype=torch.bool, device=device)
            return ModalityFeatures(
                torch.zeros(batch, 1, self._token_size, device=device),
                mask,
                torch.zeros(batch, *layers, device=device),
            )
        if images.states is None:
            raise ValueError(
                "`mm_encoder_outputs` without hidden states cannot be weighed: "
                "pass `pixel_values`, or `modality_weights`"
            )
        index, mask = compact(placeholders & (modality_ids == VISION))
        number = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders)
        flat = number.gather(1, index).clamp_min(0)  # (B, N), which image token stands at each place

        def rows(tokens: Tensor) -> Tensor:
            return tokens.flatten(-3, -2)[..., flat, :]

        with torch.no_grad():
            per_image = torch.stack(
                [
                    token_statistics(s, torch.ones(s.shape[:2], dtype=torch.bool, device=s.device))
                    for s in images.states
                ],
                1,
            ).to(device)
            # the images of one sample count together
            of_row = torch.div(placeholders.sum(1), images.tokens.shape[1], rounding_mode="floor")
            owner = torch.arange(batch, device=device).repeat_interleave(of_row, output_size=per_image.shape[0])
            statistics = torch.zeros(batch, *per_image.shape[1:], device=device).index_add_(0, owner, per_image)
            statistics = statistics / of_row.clamp_min(1)[:, None, None]
        return ModalityFeatures(
            rows(images.tokens), mask, statistics, lambda masks: rows(images.encode(masks)), images.encoder_size
        )

    def _text_features(self, embeddings: Tensor, modality_ids: Tensor) -> ModalityFeatures:
        index, mask = compact(modality_ids == TEXT)
        tokens = take(embeddings, index)
        attended = mask.clone()
        attended[:, 0] = True  # a sample without text must not attend to nothing

        def states(tokens: Tensor, attended: Tensor) -> list[Tensor]:
            return text_only_states(lambda: self._run_text(tokens, attended), tokens, self._text_layers)

        statistics = torch.stack([token_statistics(state, mask) for state in states(tokens, attended)], 1)

        def encode(masks: Tensor) -> Tensor:
            passes = (tokens[None] * masks[:, None, None].to(tokens.dtype)).flatten(0, 1)
            deepest = states(passes, attended.repeat(len(masks), 1))[-1]
            if deepest.shape[-1] != tokens.shape[-1]:  # embeddings narrower than the layers (OPT-350m)
                return passes.unflatten(0, (len(masks), -1))
            return deepest.unflatten(0, (len(masks), -1))

        return ModalityFeatures(tokens, mask, statistics, encode, tokens.shape[-1])

    # --- checks

    def _check_images(self, pixel_values: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        finite = pixel_values.flatten(1).isfinite().all(1)
        if not finite.all():
            raise ValueError(
                f"pixel_values of image(s) {(~finite).nonzero()[:, 0].tolist()} of the batch hold NaN or Inf"
            )

    def _check_count(self, placeholders: Tensor, tokens: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        found, needed = int(placeholders.sum()), tokens.shape[0] * tokens.shape[1]
        if found != needed or bool((placeholders.sum(1) % tokens.shape[1]).any()):
            raise ValueError(
                f"{tokens.shape[0]} image(s) need {needed} image tokens, {tokens.shape[1]} each, but the prompts hold "
                f"{placeholders.sum(1).tolist()} in turn: the number of images differs, truncation cut some, "
                "or the processor counts otherwise than the model (patch_size, num_query_tokens, ...)"
            )

    def _check_padding(self, attention_mask: Tensor | None) -> None:
        """Warns, once, of prompts (B, L) to be gone on from that end in padding."""
        if self.config.is_encoder_decoder or attention_mask is None or attention_mask.ndim != 2:
            return
        if not attention_mask[:, -1].all():
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

    # --- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors only. `dms_config=DMSConfig(...)` replaces the
        checkpoint's.

        Raises:
            ValueError: if the checkpoint is broken, has weights of other shapes, or lacks weights of the backbone or
                a part of a trained `dms`: only all of `dms.*`, or its scheduler, may be new.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name those that do
        kwargs.setdefault("use_safetensors", True)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"the weights of {pretrained_model_name_or_path} cannot be read: {error}") from error
        if info["mismatched_keys"] and not may_differ:
            raise ValueError(
                f"{pretrained_model_name_or_path} has weights of other shapes than {cls.__name__}, as (name, its "
                f"shape, the model's): {sorted(info['mismatched_keys'])[:8]}"
            )
        missing = set(info["missing_keys"])
        own = {f"dms.{name}" for name in model.dms.state_dict()}
        # a vanilla checkpoint has nothing of `dms`, and another scheduler than the saved one starts anew
        anew = {name for name in own if name.startswith("dms.scheduler.")}
        new = own if own <= missing else anew
        if missing - new:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks weights that {cls.__name__} needs: {sorted(missing - new)[:8]}"
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, and the code beside the weights: `trust_remote_code=True` loads the
        result where this package is not installed. A save that fails leaves what the folder held before.

        Raises:
            OSError: if the files cannot be written.
        """
        self.config.auto_map = auto_map(type(self), type(self.config), self._auto_map_name)
        # today's names: the original ones are found again by the class's registered conversion alone, and the vanilla
        # class, which sees another model type, would load with a random lm_head
        kwargs.setdefault("save_original_format", False)
        if kwargs.get("distributed_checkpoint"):  # all processes write into one folder
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with staged(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                export_code(type(self), type(self.config), folder)
