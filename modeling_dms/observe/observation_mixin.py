"""What a DMS class observes of a prompt: which positions hold what, and the features of each modality."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from modeling_dms.evidence.typicality import token_statistics
from modeling_dms.observe.images import Images
from modeling_dms.observe.layers import text_only_states
from modeling_dms.observe.prompt import TEXT, VISION, ModalityFeatures, compact, take


class ObservationMixin:
    """Says where to observe a class of transformers, and reads the features of image and text there."""

    config: Any
    # what `__init__` of `DMSMixin` sets: the layers of the text stack to watch, and D of image and text tokens
    _text_layers: list[int]
    _token_size: int

    # --- what differs between the backbones

    def _vision_tower(self) -> nn.Module:
        return self.get_encoder(modality="image")

    def _language_model(self) -> nn.Module:
        """What holds the language model, with all configurations that its masks are built for."""
        return self.get_decoder()

    def _text_stack(self) -> nn.Module:
        """The language model's decoder, or the encoder of an encoder-decoder."""
        return self._language_model()

    def _run_text(self, embeddings: Tensor, mask: Tensor) -> Any:
        """Runs the text stack on text embeddings (B, N, D) alone."""
        return self._text_stack()(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False)

    def _observed_images(self, inputs: dict[str, Any]) -> Images | None:
        """The images of a call; `None` without any."""
        raise NotImplementedError

    @property
    def _is_causal(self) -> bool:
        """Whether the language model reads its prompt from the left to the right."""
        return not self.config.get_text_config().is_encoder_decoder

    # --- positions

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
        if labels is not None and self._is_causal and labels.shape == input_ids.shape:
            text &= labels == -100
        special = torch.tensor(self._special_ids(), device=input_ids.device, dtype=input_ids.dtype)
        text &= ~torch.isin(input_ids, special)
        return torch.where(self._placeholders(input_ids), VISION, torch.where(text, TEXT, 0))

    def _special_ids(self) -> list[int]:
        """Padding, beginning and end, and what marks images and videos in a prompt."""
        ids = self.config.get_text_config(decoder=True)
        special = [ids.pad_token_id, ids.bos_token_id, ids.eos_token_id]
        fields = vars(self.config).items()
        special += [value for name, value in fields if name.endswith(("_token_id", "_token_index"))]
        listed = [entry if isinstance(entry, list) else [entry] for entry in special if entry is not None]
        return sorted({i for entries in listed for i in entries})

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        if self.config.image_token_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.config.image_token_id

    def _placeholders_of(self, input_ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """Where image tokens stand: (B, P). Without ids, where the vanilla classes find them."""
        if input_ids is not None:
            return self._placeholders(input_ids)
        token = torch.full((), self.config.image_token_id, device=embeddings.device)
        return (embeddings == self.get_input_embeddings()(token)).all(-1)

    def _owner(self, images: Images, placeholders: Tensor) -> Tensor | None:
        """The row of the batch that each image belongs to: (I,). `None` where their tokens do not fit the prompts, but
        the vanilla class answers.

        Raises:
            ValueError: where it does not answer either.
        """
        if not images.fit(placeholders) and self._takes(len(images.tokens), int(placeholders.sum())):
            return None
        return images.rows(placeholders)

    def _takes(self, tokens: int, places: int) -> bool:
        """Whether the vanilla class puts so many image tokens into so many places."""
        return tokens == places

    # --- features

    def _check_images(self, pixel_values: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        finite = pixel_values.flatten(1).isfinite().all(1)
        if not finite.all():
            raise ValueError(
                f"pixel_values of image(s) {(~finite).nonzero()[:, 0].tolist()} of the batch hold NaN or Inf"
            )

    def _vision_features(
        self, images: Images | None, placeholders: Tensor, modality_ids: Tensor, owner: Tensor | None
    ) -> ModalityFeatures:
        """Image features of each row; `owner` (I,) tells the row of each image, whose images count together."""
        layers = self.dms.calibration.modalities[0].mean.shape
        # not `len`, which is one number for all that a program of `torch.export` is given
        batch, device = placeholders.shape[0], placeholders.device
        if images is None or images.statistics is None or owner is None:
            mask = torch.zeros(batch, 1, dtype=torch.bool, device=device)
            tokens = torch.zeros(batch, 1, self._token_size, device=device)
            return ModalityFeatures(tokens, mask, torch.zeros(batch, *layers, device=device))
        index, mask = compact(placeholders & (modality_ids == VISION))
        number = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders)
        flat = number.gather(1, index).clamp_min(0)  # (B, N), which image token stands at each place
        statistics = torch.zeros(batch, *images.statistics.shape[1:], device=device)
        statistics = statistics.index_add_(0, owner, images.statistics.to(device))
        counts = torch.zeros(batch, device=device).index_add_(0, owner, torch.ones_like(owner, dtype=torch.float32))
        statistics = statistics / counts.clamp_min(1)[:, None, None]
        return ModalityFeatures(images.tokens.to(device)[flat], mask, statistics)

    def _text_features(
        self, input_ids: Tensor | None, embeddings: Tensor | None, modality_ids: Tensor
    ) -> ModalityFeatures:
        index, mask = compact(modality_ids == TEXT)
        if input_ids is not None:
            # an image token need not be in the vocabulary
            embeddings = self.get_input_embeddings()(input_ids.masked_fill(self._placeholders(input_ids), 0))
        tokens = take(cast(Tensor, embeddings), index)
        attended = mask.clone()
        attended[:, 0] = True  # a sample without text must not attend to nothing
        states = text_only_states(lambda: self._run_text(tokens, attended), tokens, self._text_layers)
        return ModalityFeatures(tokens, mask, torch.stack([token_statistics(state, mask) for state in states], 1))
