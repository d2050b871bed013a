"""BLIP-2 with Dynamic Modality Scheduling: where DMS meets its generative and its retrieval class."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from transformers.generation import GenerationMixin
from transformers.models.blip_2.modeling_blip_2 import Blip2ImageTextMatchingModelOutput
from transformers.utils.generic import can_return_tuple

from modeling_dms.calibrate.source_agreement import SourceRecord
from modeling_dms.configuration.configuration_dms import DMSBlip2Config
from modeling_dms.dms import DMSOutput, read_out
from modeling_dms.mixin import DMSMixin
from modeling_dms.observe.images import Images, check_image_size, image_statistics
from modeling_dms.observe.layers import kept_states
from modeling_dms.observe.observation_mixin import UNNAMED
from modeling_dms.observe.prefill import Reading
from modeling_dms.observe.prompt import TEXT, VISION, Prompt, Schedule
from modeling_dms.outputs import ModalitySignals
from modeling_dms.qformer_mixin import QFORMER, QFormerMixin
from modeling_dms.steer.bias import relative_weights
from modeling_dms.steer.masks import fold_key_bias


class DMSBlip2ForConditionalGeneration(QFormerMixin, Blip2ForConditionalGeneration, GenerationMixin):
    """`Blip2ForConditionalGeneration` that weighs image and text per sample, with decoder-only and encoder-decoder
    language models.
    """

    config: DMSBlip2Config
    config_class = DMSBlip2Config
    family = "BLIP-2"


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
    family = "BLIP-2"
    bridge = QFORMER
    _auto_map_name = "AutoModel"
    _has_matching_head = True

    def _vision_tower(self) -> nn.Module:
        return self.vision_model

    def _language_model(self) -> nn.Module:
        return self.qformer

    def _text_stack(self) -> nn.Module:
        return self.qformer

    def _run_text(self, embeddings: Tensor, mask: Tensor) -> Any:
        return self.qformer(query_embeds=self._placed(embeddings), query_length=0, attention_mask=mask.long())

    def _placed(self, embeddings: Tensor) -> Tensor:
        """Embeddings of words (B, N, D) as the Q-Former reads them, with those of their positions."""
        return embeddings + self.embeddings.position_embeddings.weight[: embeddings.shape[1]]

    def _readout(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        return read_out(states, self.embeddings.word_embeddings.weight.detach(), tokens=tokens)

    def _observed_images(self, inputs: dict[str, Any]) -> Images:
        pixel_values = inputs["pixel_values"]
        self._check_images(pixel_values)
        check_image_size(pixel_values, self.config.vision_config.image_size)
        states, outputs = kept_states(
            lambda: self.vision_model(pixel_values=pixel_values, return_dict=True), self._vision_layers
        )
        features = outputs.last_hidden_state
        queries = self.query_tokens.expand(len(features), -1, -1)
        tokens = self.qformer(query_embeds=queries, encoder_hidden_states=features, return_dict=True).last_hidden_state
        lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        pixels = None if self._is_static else self._pixel_statistics(inputs, tokens)
        return Images(outputs, tokens.flatten(0, 1), lengths, image_statistics(states, tokens), pixels)

    @property
    def _is_causal(self) -> bool:
        return False

    def _special_ids(self) -> list[int]:
        return []  # the text encoder's [CLS] and [SEP] belong to the text: without it they must go as well

    def _text_of(self, rows: Tensor) -> Tensor:
        """Ids or mask (B, queries + text) of prompts without their image placeholders."""
        return rows if self.config.image_token_index is None else rows[:, self.config.num_query_tokens :]

    def _schedule_pairs(
        self,
        images: Images,
        text_ids: Tensor,
        text_mask: Tensor,
        modality_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        modality_weights: Tensor | None = None,
    ) -> Schedule:
        """Modality weights of pairs; a single image, or a single text (B, N), belongs to all of them."""
        pairs = max(len(images.lengths), len(text_ids))
        if {len(images.lengths), len(text_ids)} - {1, pairs}:
            raise ValueError(f"{len(images.lengths)} image(s) and {len(text_ids)} text(s) do not make pairs")
        queries = self.config.num_query_tokens
        if modality_ids is None:
            text = self.infer_modality_ids(text_ids, text_mask)
            modality_ids = F.pad(torch.where(text == TEXT, TEXT, 0), (queries, 0), value=VISION)
        embeddings = F.pad(self.get_input_embeddings()(text_ids), (0, 0, queries, 0))
        own = {
            "modality_ids": modality_ids.expand(pairs, -1),
            "modality_mask": modality_mask,
            "modality_weights": modality_weights,
        }
        mask = F.pad(text_mask, (queries, 0), value=1).expand(pairs, -1)
        inputs = {"inputs_embeds": embeddings.expand(pairs, -1, -1), "attention_mask": mask}
        prompt = cast(Prompt, self._prompt(inputs, images.expand(pairs), own))
        return self._schedule(prompt, signals=not self._is_static and modality_weights is None)

    def _weigh_modalities(self, prompt: Prompt, reading: Reading | None) -> DMSOutput:
        text = self._text_features(None, prompt.embeddings, prompt.modality_ids)
        if self.dms.calibration.reads_all:
            text.matched = self._log_odds(prompt, cast(Tensor, prompt.embeddings), cast(Tensor, prompt.attention_mask))
        return self.dms([self._vision_features(prompt), text], prompt.modality_mask, self._readout, prompt.given)

    def _clean_prompt(
        self, batch: dict[str, Any], place: int
    ) -> tuple[Prompt, dict[str, Any], dict[str, Any], SourceRecord | None]:
        if self.config.image_token_index is None and batch.get("pixel_values") is not None:
            # the ids are those of the texts: the queries stand in front of them, as the matching branch reads both
            queries = self.config.num_query_tokens
            places = {"input_ids": UNNAMED, "attention_mask": 1}
            batch = {k: F.pad(v, (queries, 0), value=places[k]) if k in places else v for k, v in batch.items()}
        return super()._clean_prompt(batch, place)

    def _gain(self, prompt: Prompt, inputs: dict[str, Any]) -> Tensor:
        input_ids = inputs["input_ids"]
        # an image token need not be in the vocabulary
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(self._placeholders(input_ids), 0))
        return self._log_odds(prompt, embeddings, inputs["attention_mask"]).float().cpu()

    @torch.no_grad()
    def _log_odds(self, prompt: Prompt, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """That a text belongs to its image, by the matching head: (B,).

        Args:
            prompt: its images.
            embeddings, attention_mask: (B, queries + text, D) and (B, queries + text).
        """
        queries, images = self.config.num_query_tokens, cast(Images, prompt.images)
        nothing = torch.zeros(attention_mask.shape, device=attention_mask.device)
        logits = self._match(images, embeddings[:, queries:], attention_mask[:, queries:], nothing).logits_per_image
        return logits[:, 1] - logits[:, 0]

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
        images = self._observed_images({"pixel_values": pixel_values})
        schedule = self._schedule_pairs(images, text_ids, text_mask, modality_ids, modality_mask)
        return schedule.weights, None if schedule.output is None else schedule.output.signals

    def _match(
        self, images: Images, words: Tensor, text_mask: Tensor, bias: Tensor
    ) -> Blip2ImageTextMatchingModelOutput:
        """The parent's matching branch with a bias on the keys: the parent takes a mask of two dimensions only, and
        as many images as texts.

        Args:
            words: (B, N, D), embeddings of the text.
            text_mask: (B, N).
            bias: (B, queries + N).
        """
        features = images.outputs.last_hidden_state.expand(len(words), -1, -1)
        queries = self.query_tokens.expand(len(features), -1, -1)
        keep = F.pad(text_mask.bool(), (self.config.num_query_tokens, 0), value=True)[:, None, None]
        mask = fold_key_bias(keep, bias, self.qformer.layernorm.weight.dtype)
        joint = self.qformer(
            query_embeds=torch.cat([queries.to(words.dtype), self._placed(words)], 1),
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
    ) -> Any:
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
        images = self._observed_images({"pixel_values": pixel_values})
        schedule = self._schedule_pairs(images, text_ids, text_mask, modality_ids, modality_mask, modality_weights)
        bias = schedule.bias if use_image_text_matching_head else None
        # the parent matches as many images as texts
        if bias is not None or (use_image_text_matching_head and len(pixel_values) != len(input_ids)):
            bias = torch.zeros_like(schedule.modality_ids, dtype=torch.float) if bias is None else bias
            outputs = self._match(images, self.get_input_embeddings()(text_ids), text_mask, bias)
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
        return self._with_dms(outputs, schedule, None, None)


__all__ = ["DMSBlip2ForConditionalGeneration", "DMSBlip2ForImageTextRetrieval"]
