"""BLIP-2 with Dynamic Modality Scheduling: where DMS meets its generative and its retrieval class."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from transformers.generation import GenerationMixin
from transformers.models.blip_2.modeling_blip_2 import (
    BaseModelOutputWithVisionQformerOutputs,
    Blip2ImageTextMatchingModelOutput,
)
from transformers.utils.generic import can_return_tuple

from modeling_dms._compat import CACHE, kept_hidden_states, takes_cache
from modeling_dms.configuration.configuration_dms import DMSBlip2Config
from modeling_dms.dms import read_out
from modeling_dms.fusion import check_attention, fold_key_bias, relative_weights
from modeling_dms.key_biased import key_biased
from modeling_dms.mixin import DMSMixin
from modeling_dms.outputs import DMSBlip2Output, DMSBlip2RetrievalOutput, ModalitySignals, with_weights
from modeling_dms.prompt import CACHED_WITHOUT_WEIGHTS, TEXT, VISION, EncodedImages, Schedule


def _check_image_size(pixel_values: Tensor, size: int) -> None:
    """Raises ValueError for images (I, 3, H, W) of another size than the vision model has positions for: a smaller one
    would get the first of them."""
    height, width = pixel_values.shape[-2:]
    if (height, width) != (size, size):
        raise ValueError(
            f"pixel_values of {height} x {width} pixels, config.vision_config.image_size is {size}: let the processor "
            "resize to that, or pass interpolate_pos_encoding=True"
        )


class DMSBlip2ForConditionalGeneration(DMSMixin, Blip2ForConditionalGeneration, GenerationMixin):
    """`Blip2ForConditionalGeneration` that weighs image and text per sample, with decoder-only and encoder-decoder
    language models.

    A vanilla checkpoint loads with only `dms.*` new. Until calibrated (or with `scheduler="uniform"`) it answers
    exactly as the vanilla class.
    """

    config: DMSBlip2Config
    config_class = DMSBlip2Config

    def __init__(self, config: DMSBlip2Config):
        super().__init__(config)
        if config.use_decoder_only_language_model:
            self.language_model.__class__ = key_biased(type(self.language_model))
        vision, language = config.vision_config, config.text_config
        self._add_dms(vision.num_hidden_layers, vision.hidden_size, language.hidden_size)
        self.post_init()

    def _text_stack(self) -> nn.Module:
        if self.config.use_decoder_only_language_model:
            return self.language_model.get_decoder()
        return self.language_model.get_encoder()

    def _encode_images(self, pixel_values: Tensor, **kwargs: Any) -> EncodedImages:
        self._check_images(pixel_values)
        if not kwargs.get("interpolate_pos_encoding"):
            _check_image_size(pixel_values, self.config.vision_config.image_size)
        kept = kept_hidden_states(self._vision_layers)
        outputs = self.get_image_features(pixel_values, output_hidden_states=kept, return_dict=True, **kwargs)
        return self._encoded(outputs)

    def _encoded(self, outputs: BaseModelOutputWithVisionQformerOutputs) -> EncodedImages:
        features, states = outputs.last_hidden_state, self._vision_states(outputs.hidden_states)

        def encode(masks: Tensor) -> Tensor:
            passes = (features[None] * masks[:, None, None].to(features)).flatten(0, 1)  # (T I, N, D')
            queries = self.query_tokens.expand(passes.shape[0], -1, -1)
            out = self.qformer(query_embeds=queries, encoder_hidden_states=passes, return_dict=True).last_hidden_state
            return self.language_projection(out.to(features.dtype)).unflatten(0, (len(masks), -1))

        return EncodedImages(outputs, cast(Tensor, outputs.pooler_output), states, encode, features.shape[-1])

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `Trainer` may pass `num_items_in_batch`: an encoder-decoder takes the mean whatever it is told."""
        return self.config.use_decoder_only_language_model

    def _steer(self, schedule: Schedule, attention_mask: Tensor | None) -> dict[str, Any]:
        """Keyword arguments that make the language model attend by the weights."""
        if attention_mask is None:
            attention_mask = torch.ones_like(schedule.modality_ids)
        causal = self.config.use_decoder_only_language_model
        bias = self._key_bias(schedule.weights, schedule.modality_ids, attention_mask, causal)
        if bias is None:
            return {"attention_mask": attention_mask}
        check_attention(self.config.text_config._attn_implementation)
        if causal:
            return {"attention_mask": attention_mask, "key_bias": bias}
        # the encoder's self-attention and the decoder's cross-attention both take this mask
        mask = attention_mask.bool()[:, None, None]
        return {"attention_mask": fold_key_bias(mask, bias, self.language_model.dtype)}

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        mm_encoder_outputs: dict[str, Any] | None = None,
        modality_ids: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        modality_weights: torch.Tensor | None = None,
        schedule_target: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DMSBlip2Output | tuple:
        r"""
        As [`Blip2ForConditionalGeneration.forward`], and:

        Args:
            pixel_values: (I, 3, H, W), one for each row that holds image tokens; `None` if no row does.
            modality_ids: (B, L), 1 vision, 2 text, 0 neutral; inferred where not given.
            modality_mask: (B, M), False where a modality is missing although it has positions (a blank stand-in
                image).
            modality_weights: (B, M), rows sum to 1, instead of the scheduler's.
            schedule_target: (B, M), target weights of the schedule loss.

        Raises:
            ValueError: for inputs that do not fit together, pixels that are not finite, a sample without any modality,
                or an attention implementation that takes no bias.
        """
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("pass either `pixel_values` or `mm_encoder_outputs`, not both")
        cache = kwargs.pop("cache", None)
        if cache is not None:
            kwargs[CACHE] = cache
        if self.config.use_decoder_only_language_model and cache is not None and cache.get_seq_length() > 0:
            return self._decode(input_ids, inputs_embeds, attention_mask, modality_ids, modality_weights, **kwargs)
        images = None
        if pixel_values is not None:
            images = self._encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        elif mm_encoder_outputs is not None:
            images = self._encoded(mm_encoder_outputs["image"])
        schedule = self._schedule(
            input_ids, inputs_embeds, attention_mask, images, modality_ids, modality_mask, modality_weights, labels
        )
        # the image tokens are in place: the parent finds no placeholder to fill, and no images where there are none
        none = BaseModelOutputWithVisionQformerOutputs(pooler_output=schedule.embeddings.new_zeros(0))
        outputs = super().forward(
            pixel_values=None,
            input_ids=None,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            inputs_embeds=self._scaled(schedule),
            labels=labels,
            mm_encoder_outputs={"image": none if images is None else images.outputs},
            return_dict=True,
            **self._steer(schedule, attention_mask),
            **kwargs,
        )
        return self._with_dms(
            DMSBlip2Output, outputs, schedule, labels, schedule_target, kwargs.get("num_items_in_batch")
        )

    def _decode(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        modality_ids: Tensor | None,
        modality_weights: Tensor | None,
        **kwargs: Any,
    ) -> DMSBlip2Output:
        """A step with a cache by hand: the prompt's weights and ids hold on."""
        if modality_weights is not None and modality_ids is not None:
            bias = self._key_bias(modality_weights, modality_ids, attention_mask)
            if bias is not None:
                kwargs["key_bias"] = bias
        elif not self._is_static:
            raise ValueError(CACHED_WITHOUT_WEIGHTS)
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            length = kwargs[CACHE].get_seq_length() + embeddings.shape[1]
            attention_mask = torch.ones(len(embeddings), length, dtype=torch.long, device=embeddings.device)
        outputs = self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        return DMSBlip2Output(logits=outputs.logits, language_model_outputs=outputs)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        modality_ids: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        modality_weights: torch.Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """As [`Blip2ForConditionalGeneration.generate`]; takes `modality_ids`, `modality_mask` and `modality_weights`
        as well.

        The weights are computed once, from the prompt, and hold for every generated token. With
        `return_dict_in_generate=True` the output has `modality_weights` and `modality_signals`.
        """
        if hasattr(self, "hf_device_map"):
            self._preprocess_accelerate()
        self._check_padding(attention_mask)
        images = None
        if pixel_values is not None:
            images = self._encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if input_ids is None and inputs_embeds is None:
            if pixel_values is None:
                raise ValueError("`generate` needs `pixel_values`, `input_ids` or `inputs_embeds`")
            start = [self.config.image_token_id] * self.config.num_query_tokens + [
                self.config.text_config.bos_token_id
            ]
            input_ids = torch.tensor([start], device=pixel_values.device).repeat(len(pixel_values), 1)
        schedule = self._schedule(
            input_ids, inputs_embeds, attention_mask, images, modality_ids, modality_mask, modality_weights
        )
        inputs = {"inputs_embeds": self._scaled(schedule), **self._steer(schedule, attention_mask)}
        if self.config.use_decoder_only_language_model and input_ids is not None:
            inputs["input_ids"] = input_ids
        generated = self.language_model.generate(**inputs, **generate_kwargs)
        return with_weights(
            generated, schedule.weights, schedule.output.signals if schedule.output is not None else None
        )


class DMSBlip2ForImageTextRetrieval(DMSMixin, Blip2ForImageTextRetrieval):
    """`Blip2ForImageTextRetrieval` that weighs image and text per pair.

    Matching branch: the Q-Former reads queries (vision) and text together, so its self-attention keys get the bias as
    in generation. Contrastive branch: image and text never meet, there is no attention to bias and a softmax over one
    image's texts would cancel any factor per image. So the similarity of image i and text j is multiplied by min(1, M
    w_vision,i) times min(1, M w_text,j): what cannot be trusted is drawn towards 0, "no evidence", and stops being
    anybody's best match; nothing is raised above what the backbone says, and uniform weights change nothing.
    """

    config: DMSBlip2Config
    config_class = DMSBlip2Config
    _auto_map_name = "AutoModel"

    def __init__(self, config: DMSBlip2Config):
        super().__init__(config)
        vision, language = config.vision_config, config.qformer_config
        self._add_dms(vision.num_hidden_layers, vision.hidden_size, language.hidden_size)
        self.post_init()

    def _text_stack(self) -> nn.Module:
        return self.qformer.encoder

    def _run_text(self, embeddings: Tensor, mask: Tensor) -> Any:
        positions = self.embeddings.position_embeddings.weight[: embeddings.shape[1]]
        return self.qformer(query_embeds=embeddings + positions, query_length=0, attention_mask=mask.long())

    def _readout(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        return read_out(states, self.embeddings.word_embeddings.weight.detach(), tokens=tokens)

    def _encode_images(self, pixel_values: Tensor, **kwargs: Any) -> EncodedImages:
        self._check_images(pixel_values)
        _check_image_size(pixel_values, self.config.vision_config.image_size)
        kept = kept_hidden_states(self._vision_layers)
        outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=kept, return_dict=True, **kwargs)
        features = outputs.last_hidden_state

        def queries(images: Tensor) -> Tensor:
            tokens = self.query_tokens.expand(len(images), -1, -1)
            return self.qformer(query_embeds=tokens, encoder_hidden_states=images, return_dict=True).last_hidden_state

        def encode(masks: Tensor) -> Tensor:
            passes = (features[None] * masks[:, None, None].to(features)).flatten(0, 1)
            return queries(passes).unflatten(0, (len(masks), -1))

        states = self._vision_states(outputs.hidden_states)
        return EncodedImages(outputs, queries(features), states, encode, features.shape[-1])

    def _special_ids(self) -> list[int]:
        return []  # the text encoder's [CLS] and [SEP] belong to the text: without it they must go as well

    def _text_of(self, rows: Tensor) -> Tensor:
        """Ids or mask (B, queries + text) of prompts without their image placeholders."""
        return rows if self.config.image_token_index is None else rows[:, self.config.num_query_tokens :]

    def _schedule_pairs(
        self,
        images: EncodedImages,
        text_ids: Tensor,
        text_mask: Tensor,
        modality_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        modality_weights: Tensor | None = None,
    ) -> Schedule:
        """Modality weights of pairs; a single image, or a single text (B, N), belongs to all of them."""
        pairs = max(len(images.tokens), len(text_ids))
        if {len(images.tokens), len(text_ids)} - {1, pairs}:
            raise ValueError(f"{len(images.tokens)} image(s) and {len(text_ids)} text(s) do not make pairs")
        queries = self.config.num_query_tokens
        if modality_ids is None:
            text = self.infer_modality_ids(text_ids, text_mask)
            modality_ids = F.pad(torch.where(text == TEXT, TEXT, 0), (queries, 0), value=VISION)
        embeddings = F.pad(self.get_input_embeddings()(text_ids), (0, 0, queries, 0))
        return self._schedule(
            None,
            embeddings.expand(pairs, -1, -1),
            None,
            images.expand(pairs),
            modality_ids.expand(pairs, -1),
            modality_mask,
            modality_weights,
        )

    @torch.no_grad()
    def get_modality_weights(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        modality_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
    ) -> tuple[Tensor, ModalitySignals | None]:
        """Weights (B, M) and signals of pairs, without matching them; numbers of images and texts as in `forward`."""
        if pixel_values is None:
            raise ValueError("`get_modality_weights` of pairs needs `pixel_values`")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text_ids, text_mask = self._text_of(input_ids), self._text_of(mask)
        images = self._encode_images(pixel_values)
        schedule = self._schedule_pairs(images, text_ids, text_mask, modality_ids, modality_mask)
        return schedule.weights, None if schedule.output is None else schedule.output.signals

    def _match(self, images: EncodedImages, text_ids: Tensor, mask: Tensor) -> Blip2ImageTextMatchingModelOutput:
        """The parent's matching branch with an additive mask (B, 1, 1, K): the parent takes one only if the prompt
        holds image placeholders."""
        features = images.outputs.last_hidden_state.expand(len(text_ids), -1, -1)
        queries = self.query_tokens.expand(len(features), -1, -1)
        joint = self.qformer(
            query_embeds=self.embeddings(input_ids=text_ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=features,
            return_dict=True,
        )
        states = joint.last_hidden_state.to(self.itm_head.weight.dtype)
        logits = self.itm_head(states[:, : queries.shape[1]]).mean(dim=1)
        return Blip2ImageTextMatchingModelOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            text_embeds=states,
            image_embeds=features,
            text_model_output=joint,
            vision_model_output=images.outputs,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_image_text_matching_head: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        modality_ids: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        modality_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DMSBlip2RetrievalOutput | tuple:
        r"""
        As [`Blip2ForImageTextRetrieval.forward`], and:

        Args:
            modality_ids: (B, queries + text), 1 vision, 2 text, 0 neutral; inferred where not given.
            modality_mask: (B, M), False where a modality is missing although it has positions.
            modality_weights: (B, M), rows sum to 1, instead of the scheduler's.

        There may be one image for several texts, in the contrastive branch also one text for several images; row i of
        the weights then belongs to the i-th pair.

        Raises:
            ValueError: for inputs that do not fit together, pixels that are not finite, or a sample without any
                modality.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if use_image_text_matching_head and len(pixel_values) not in (1, len(input_ids)):
            raise ValueError(f"{len(pixel_values)} image(s) and {len(input_ids)} text(s) do not make pairs")
        text_ids, text_mask = self._text_of(input_ids), self._text_of(attention_mask)
        images = self._encode_images(pixel_values)
        schedule = self._schedule_pairs(images, text_ids, text_mask, modality_ids, modality_mask, modality_weights)
        bias = None
        if use_image_text_matching_head:
            bias = self._key_bias(schedule.weights, schedule.modality_ids, causal=False)
        # the parent matches as many images as texts
        if bias is not None or (use_image_text_matching_head and len(pixel_values) != len(input_ids)):
            keep = F.pad(text_mask.bool(), (self.config.num_query_tokens, 0), value=True)[:, None, None]
            bias = torch.zeros_like(schedule.modality_ids, dtype=torch.float) if bias is None else bias
            mask = fold_key_bias(keep, bias, self.qformer.layernorm.weight.dtype)
            outputs = self._match(images, text_ids, mask)
        else:
            outputs = super().forward(
                pixel_values=pixel_values,
                input_ids=cast(Any, input_ids),
                attention_mask=cast(Any, attention_mask),
                use_image_text_matching_head=use_image_text_matching_head,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **kwargs,
            )
        if not use_image_text_matching_head:
            trust = relative_weights(schedule.weights).clamp_max(1).to(outputs.logits_per_image.dtype)
            of_image = trust[:, :1] if len(pixel_values) == len(trust) else trust[:, :1].amin(0, keepdim=True)
            of_text = trust[:, 1] if len(text_ids) == len(trust) else trust[:, 1].amin(0, keepdim=True)
            outputs.logits_per_image = outputs.logits_per_image * of_image * of_text
            outputs.logits_per_text = outputs.logits_per_image.t()
        return self._with_dms(DMSBlip2RetrievalOutput, outputs, schedule, None, None)


__all__ = ["DMSBlip2ForConditionalGeneration", "DMSBlip2ForImageTextRetrieval"]
