"""What BLIP-2 and InstructBLIP share: a Q-Former makes the image tokens, and `generate` is that of an inner language
model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from modeling_dms._compat import cache_of
from modeling_dms.observe.first_tokens import FirstTokens, asked_for
from modeling_dms.observe.images import Images, check_image_size
from modeling_dms.observe.prefill import Prefill
from modeling_dms.observe.prompt import OWN, Schedule
from modeling_dms.steer.bias import embedding_scale
from modeling_dms.steer.masks import steered
from modeling_dms.steered_mixin import SteeredMixin


QFORMER = ("query_tokens", "qformer", "language_projection")


class _Encoded(BaseModelOutputWithPooling):
    """Images that are not there, as the vanilla classes take them."""

    qformer_outputs = vision_outputs = None


class QFormerMixin(SteeredMixin):
    """DMS for a class of BLIP-2's shape."""

    bridge = QFORMER

    def _language_model(self) -> nn.Module:
        return self.language_model

    def _text_stack(self) -> nn.Module:
        return self.language_model.get_decoder() if self._is_causal else self.language_model.get_encoder()

    def _without_images(self, input_ids: Tensor | None) -> dict[str, Any]:
        self._check_unused(input_ids)
        return {
            "pixel_values": None,
            "mm_encoder_outputs": {"image": _Encoded(pooler_output=torch.zeros(0, device=self.device))},
        }

    def _check_unused(self, input_ids: Tensor | None) -> None:
        """Raises ValueError for image tokens without an image, which the vanilla classes do not take."""
        traced = torch.compiler.is_compiling()
        if input_ids is not None and not traced and self._placeholders(input_ids).any():
            raise ValueError("the prompts hold image tokens, but there are no images: pass `pixel_values`")

    def _takes(self, tokens: int, places: int) -> bool:
        return tokens >= places  # what is left over is dropped

    def _observed_images(self, inputs: dict[str, Any]) -> Images | None:
        pixels = inputs.get("pixel_values")
        if pixels is not None and not inputs.get("interpolate_pos_encoding"):
            check_image_size(pixels, self.config.vision_config.image_size)
        return super()._observed_images(inputs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `Trainer` may pass `num_items_in_batch`: an encoder-decoder takes the mean whatever it is told."""
        return self.config.use_decoder_only_language_model

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As [`SteeredMixin.generate`]."""
        if hasattr(self, "hf_device_map"):
            self._preprocess_accelerate()
        self._check_padding(attention_mask)
        own = {name: kwargs.pop(name, None) for name in OWN[:-1]}
        of_images = {name: kwargs.pop(name) for name in self._image_parameters if name in kwargs}
        of_images["mm_encoder_outputs"] = kwargs.pop("mm_encoder_outputs", None)
        images = self._observed_images({"pixel_values": pixel_values, "input_ids": input_ids, **of_images})
        if input_ids is None and inputs_embeds is None:
            if images is None:
                raise ValueError("`generate` needs `pixel_values`, `input_ids` or `inputs_embeds`")
            start = [self.config.image_token_id] * self.config.num_query_tokens
            start.append(self.config.text_config.bos_token_id)
            input_ids = torch.tensor([start], device=self.device).repeat(len(images.lengths), 1)
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        schedule = self._observe(inputs, images, own)
        if images is None:
            self._check_unused(input_ids)
        else:
            placeholders = self._placeholders_of(input_ids, embeddings)
            embeddings = embeddings.masked_scatter(placeholders[..., None], images.tokens.to(embeddings))
        if isinstance(schedule, Schedule) and self.config.dms_config.fusion == "embedding":
            embeddings = embeddings * embedding_scale(schedule.weights, schedule.modality_ids)[..., None].to(
                embeddings
            )
        prompt = {"inputs_embeds": embeddings, "attention_mask": attention_mask}
        if self._is_causal and input_ids is not None:
            prompt["input_ids"] = input_ids
        own_config = self.language_model.generation_config
        first = FirstTokens(kwargs, own_config)
        if asked_for("guidance_scale", kwargs, own_config) not in (None, 1):
            schedule = schedule.settle() if isinstance(schedule, Prefill) else schedule
            if schedule is not None and self._steering(schedule) is not None:
                raise ValueError(
                    f"the modality weights {schedule.weights.tolist()} cannot steer {type(self).__name__} under "
                    "guidance: its language model reads two prompts then. Generate without `guidance_scale`"
                )
        with schedule.observed() if isinstance(schedule, Prefill) else steered(self._steering(schedule)):
            generated = self.language_model.generate(**prompt, **kwargs)
        if isinstance(schedule, Prefill) and schedule.schedule is None:
            schedule.settle()  # its language model is compiled
            first.sureness = None
            with steered(schedule.steering):
                generated = self.language_model.generate(**prompt, **kwargs)
        if isinstance(generated, ModelOutput) and cache_of(generated) is not None:
            cache_of(generated).schedule = schedule.schedule if isinstance(schedule, Prefill) else schedule
        return self._generated(generated, schedule, first)
