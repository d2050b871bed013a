"""What backbones of LLaVA's shape share: image placeholders in the prompt, a `multi_modal_projector`, one decoder-only
language model, and the parameters of LLaVA's `forward`."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from modeling_dms._compat import CACHE, image_fields, kept_hidden_states, takes_cache
from modeling_dms.fusion import biased_attention
from modeling_dms.mixin import DMSMixin
from modeling_dms.outputs import DMSLlavaOutput, with_weights
from modeling_dms.prompt import CACHED_WITHOUT_WEIGHTS, EncodedImages


class LlavaMixin(DMSMixin):
    """DMS for a class of transformers of LLaVA's shape. A backbone says what its projector reads."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        vision, language = config.vision_config, config.get_text_config(decoder=True)
        self._add_dms(vision.num_hidden_layers, vision.hidden_size, language.hidden_size)
        self.post_init()

    def _projector_inputs(self, outputs: BaseModelOutputWithPooling, layers: list[int], strategy: str) -> Tensor:
        """What `multi_modal_projector` reads of the vision tower's outputs: (I, N, D').

        Args:
            layers, strategy: `vision_feature_layer` and `vision_feature_select_strategy`.
        """
        raise NotImplementedError

    def _text_stack(self) -> nn.Module:
        return self.model.language_model.get_decoder()

    def _encode_images(self, pixel_values: Tensor, **kwargs: Any) -> EncodedImages:
        self._check_images(pixel_values)
        outputs = self.get_image_features(
            pixel_values=pixel_values,
            output_hidden_states=kept_hidden_states([*self._vision_layers, *self._feature_layers(**kwargs)]),
            return_dict=True,
            **kwargs,
        )
        return self._encoded(outputs, **kwargs)

    def _feature_layers(self, vision_feature_layer: int | list[int] | None = None, **kwargs: Any) -> list[int]:
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    def _encoded(self, outputs: BaseModelOutputWithPooling, **kwargs: Any) -> EncodedImages:
        layers = self._feature_layers(**kwargs)
        strategy = kwargs.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        projector = self.model.multi_modal_projector

        def encode(masks: Tensor) -> Tensor:
            features = self._projector_inputs(outputs, layers, strategy)
            return projector(features[None] * masks[:, None, None].to(features))  # (T, I, N, D)

        pooled = outputs.pooler_output
        tokens = pooled if isinstance(pooled, Tensor) else torch.stack(list(cast(Iterable[Tensor], pooled)))
        states = self._vision_states(outputs.hidden_states)
        return EncodedImages(outputs, tokens, states, encode, projector.linear_1.in_features)

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        modality_ids: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        modality_weights: torch.Tensor | None = None,
        schedule_target: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DMSLlavaOutput | tuple:
        r"""
        As the parent's, and:

        Args:
            modality_ids: (B, L), 1 vision, 2 text, 0 neutral; inferred where not given. While decoding with a cache:
                that of the prompt.
            modality_mask: (B, M), False where a modality is missing although it has positions (a blank stand-in
                image).
            modality_weights: (B, M), rows sum to 1, instead of the scheduler's. While decoding with a cache by hand,
                pass the ones that the prefill returned.
            schedule_target: (B, M), target weights of the schedule loss.

        Raises:
            ValueError: for inputs that do not fit together, pixels that are not finite, a sample without any modality,
                or an attention implementation that takes no bias.
        """
        decoding = cache is not None and cache.get_seq_length() > 0
        given = modality_weights is not None or modality_mask is not None or modality_ids is not None
        schedule, bias, of_images = None, None, {}
        if decoding:
            if modality_weights is not None and modality_ids is not None:
                bias = self._key_bias(modality_weights, modality_ids, attention_mask)
            elif not self._is_static:
                raise ValueError(CACHED_WITHOUT_WEIGHTS)
        elif given or input_ids is not None or not self._is_static:
            layers = {
                "vision_feature_layer": vision_feature_layer,
                "vision_feature_select_strategy": vision_feature_select_strategy,
            }
            encoded = (mm_encoder_outputs or {}).get("image")
            if pixel_values is not None and encoded is not None:
                raise ValueError("pass either `pixel_values` or `mm_encoder_outputs`, not both")
            images = None
            if pixel_values is not None:
                images = self._encode_images(pixel_values, **layers)
            elif encoded is not None:
                images = self._encoded(encoded, **layers)
            schedule = self._schedule(
                input_ids, inputs_embeds, attention_mask, images, modality_ids, modality_mask, modality_weights, labels
            )
            bias = self._key_bias(schedule.weights, schedule.modality_ids, attention_mask)
            inputs_embeds = self._scaled(schedule)
            if images is not None:
                pooled = images.outputs.pooler_output
                of_images = image_fields(images.outputs, pooled if isinstance(pooled, Tensor) else torch.cat(pooled))
            input_ids, pixel_values, mm_encoder_outputs = None, None, None

        if bias is not None:
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            # only its shape, dtype and device are read
            inputs = torch.empty(*inputs.shape[:2], 0, dtype=self.dtype, device=inputs.device)
            language = self.config.get_text_config(decoder=True)
            steered = biased_attention(language, bias, inputs, attention_mask, cache, position_ids)
            attention_mask = steered.pop("attention_mask")
            kwargs.update(steered)
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        for name, value in of_images.items():
            outputs[name] = value
        return self._with_dms(
            DMSLlavaOutput, outputs, schedule, labels, schedule_target, kwargs.get("num_items_in_batch")
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("modality_ids")
        if ids is not None and inputs.get(CACHE) is None:  # without a cache the prompt grows
            inputs["modality_ids"] = F.pad(ids, (0, max(0, input_ids.shape[1] - ids.shape[1])))
        return inputs

    @torch.no_grad()
    @takes_cache
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """As `GenerationMixin.generate`; takes `modality_ids`, `modality_mask` and `modality_weights` as well.

        The weights are computed once, from the prompt, and hold for every generated token. With
        `return_dict_in_generate=True` the output has `modality_weights` and `modality_signals`.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        kwargs["generation_config"] = generation_config
        cache = kwargs.pop("cache", None)
        if cache is not None:
            kwargs[CACHE] = cache
        continued = cache is not None and cache.get_seq_length() > 0
        if continued or (input_ids is None and kwargs.get("modality_ids") is None):
            return super().generate(input_ids, **kwargs)
        self._check_padding(kwargs.get("attention_mask"))
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        layers = {name: kwargs.get(name) for name in names}
        pixel_values = kwargs.pop("pixel_values", None)
        images = None if pixel_values is None else self._encode_images(pixel_values, **layers)
        schedule = self._schedule(
            input_ids,
            kwargs.get("inputs_embeds"),
            kwargs.get("attention_mask"),
            images,
            kwargs.pop("modality_ids", None),
            kwargs.pop("modality_mask", None),
            kwargs.pop("modality_weights", None),
        )
        if images is not None:
            kwargs["mm_encoder_outputs"] = {"image": images.outputs}
        kwargs |= {"modality_ids": schedule.modality_ids, "modality_weights": schedule.weights}
        generated = super().generate(input_ids, **kwargs)
        signals = schedule.output.signals if schedule.output is not None else None
        return with_weights(generated, schedule.weights, signals)
