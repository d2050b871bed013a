"""What a DMS class observes of a prompt: which positions hold what, and the features of each modality."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_dms.evidence.pixels import PIXEL_STATISTICS, pixel_statistics
from modeling_dms.evidence.surprisal import SURPRISAL_STATISTICS, surprisal_statistics, token_surprisal
from modeling_dms.evidence.typicality import token_statistics
from modeling_dms.observe.images import Images, of_images, parts_of
from modeling_dms.observe.layers import kept_states, text_only_states
from modeling_dms.observe.pictures import changed_pictures, pictures_of
from modeling_dms.observe.prefill import Reading
from modeling_dms.observe.prompt import TEXT, VISION, ModalityFeatures, Prompt, compact, take


# stands where an image does in prompts of checkpoints whose vocabulary has no image token; no word's id
UNNAMED = -1


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

    def _text_within(self, prompt: Prompt, inputs: dict[str, Any]) -> ModalityFeatures | None:
        """Features of the text of each row, read within its prompt; `None` where that cannot be observed.

        Args:
            inputs: of `forward`, their images encoded.
        """
        return None

    def _parts(self, pixel_values: Tensor, **kwargs: Any) -> list[int] | None:
        """How many parts of what the vision tower returns are each image's, from the arguments of
        `get_image_features`: tiles or, where it returns the patches of all images in a row, patches. `None` where the
        number of its tokens tells it."""
        if pixel_values.ndim != 5:
            return None
        # of each row with images, which are one after the other; those that fill it up are all 0
        parts = (pixel_values != 0).flatten(2).any(2).sum(1).tolist()
        return parts if torch.compiler.is_compiling() else [count for count in parts if count]

    def _picture_sizes(self, inputs: dict[str, Any]) -> Sequence[Sequence[int]] | None:
        """Height and width of each picture, where smaller ones are padded."""
        return None

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
        text = self.config.get_text_config(decoder=True)
        special = [getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
        fields = vars(self.config).items()
        special += [value for name, value in fields if name.endswith(("_token_id", "_token_index"))]
        listed = [entry if isinstance(entry, list) else [entry] for entry in special if entry is not None]
        return sorted({i for entries in listed for i in entries})

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        token = self.config.image_token_id
        return input_ids == (UNNAMED if token is None else token)

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

    def _answer_places(self, ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """Where the first token of each answer is predicted: (B,).

        Args:
            ids, attention_mask: (B, P); of the ids only the shape matters.
            labels: (B, P), if the answers follow the prompts within them.
        """
        read = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        if labels is not None and labels.shape == ids.shape:
            read = read * ((labels != -100).cumsum(1) == 0)
        return ids.shape[1] - 1 - read.flip(1).argmax(1)

    # --- features

    def _check_images(self, pixel_values: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        finite = pixel_values.flatten(1).isfinite().all(1)
        if not finite.all():
            raise ValueError(
                f"pixel_values of image(s) {(~finite).nonzero()[:, 0].tolist()} of the batch hold NaN or Inf"
            )

    def _vision_features(self, prompt: Prompt) -> ModalityFeatures:
        """Image features of each row, whose images count together."""
        images, placeholders, owner = prompt.images, prompt.placeholders, prompt.owner
        layers, size = self.dms.calibration.modalities[0].mean.shape
        # not `len`, which is one number for all that a program of `torch.export` is given
        batch, device = placeholders.shape[0], placeholders.device
        if images is None or images.statistics is None or images.pixels is None or owner is None:
            mask = torch.zeros(batch, 1, dtype=torch.bool, device=device)
            tokens = torch.zeros(batch, 1, self._token_size, device=device)
            statistics = torch.zeros(batch, layers, size, device=device)
            numbers = torch.full((batch, PIXEL_STATISTICS), torch.nan, device=device)
            return ModalityFeatures(tokens, mask, statistics, statistics[:, -1], numbers)
        index, mask = compact(placeholders & (prompt.modality_ids == VISION))
        number = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders)
        flat = number.gather(1, index).clamp_min(0)  # (B, N), which image token stands at each place
        statistics = of_rows(images.statistics.to(device), owner, batch)
        numbers = of_rows(images.pixels.to(device), owner, batch)
        return ModalityFeatures(images.tokens.to(device)[flat], mask, statistics, statistics[:, -1], numbers)

    def _pictures(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The pictures of a call in groups of one size, (n, 3, H, W) each, as the processor scales them."""
        return pictures_of(inputs["pixel_values"], *self._layout(inputs))

    def _layout(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """Of the pixels of a call, see `changed_pictures`."""
        return inputs.get("image_grid_thw"), self.config.vision_config, self._picture_sizes(inputs)

    def _pixel_statistics(self, inputs: dict[str, Any], pooled: Any) -> Tensor:
        """`pixel_statistics` of each image: (I, P).

        Args:
            inputs: of `get_image_features`.
            pooled: the image tokens, see `image_statistics`.
        """
        # in the model's own precision, however the caller passes them
        groups = [self.dms.calibration.pixels.unit(pictures.to(self.dtype)) for pictures in self._pictures(inputs)]
        alike = [torch.cat([*some]) for _, some in itertools.groupby(groups, key=lambda pictures: pictures.shape[1:])]
        found = torch.cat([pixel_statistics(pictures) for pictures in alike])
        return of_images(found, pooled, self._parts(**inputs))

    def _changed_images(
        self, inputs: dict[str, Any], pooled: Any, change: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Any]:
        """Inputs of `get_image_features` with other pixels.

        Args:
            inputs, pooled: as of `_pixel_statistics`.
            change: is given pictures (n, 3, H, W), black is 0 and white is 1, and the number of the image that each
                belongs to, (n,), and returns others.
        """
        sizes, unit = [len(pictures) for pictures in self._pictures(inputs)], self.dms.calibration.pixels
        parts = torch.tensor(parts_of(sum(sizes), pooled, self._parts(**inputs)))
        images = iter(torch.arange(len(pooled)).repeat_interleave(parts).split(sizes))

        def changed(pictures: Tensor) -> Tensor:
            return unit.scaled(change(unit.unit(pictures), next(images))).to(pictures.dtype)

        pixels = changed_pictures(inputs["pixel_values"], changed, *self._layout(inputs))
        return {**inputs, "pixel_values": pixels}

    def _text_tokens(
        self, input_ids: Tensor | None, embeddings: Tensor | None, modality_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the text of each row stands, which of these places are filled (B, N), and its tokens (B, N, D)."""
        index, mask = compact(modality_ids == TEXT)
        if self._begin_of_text is not None and torch.compiler.is_compiling():
            # as long as the prompt, which holds more than its text: one position is free for what begins the text,
            # and the length stays one that a traced program can reason about
            index, mask = index[:, :-1], mask[:, :-1]
        if input_ids is not None:
            # an image token need not be in the vocabulary
            input_ids = input_ids.masked_fill(self._placeholders(input_ids), 0)
            embeddings = self.get_input_embeddings()(input_ids)
        return index, mask, take(cast(Tensor, embeddings), index)

    def _text_features(
        self, input_ids: Tensor | None, embeddings: Tensor | None, modality_ids: Tensor
    ) -> ModalityFeatures:
        """Features of the text of each row, which the language model reads alone."""
        index, mask, tokens = self._text_tokens(input_ids, embeddings, modality_ids)
        begin, read, attended = self._begin_of_text, tokens, mask
        if begin is not None:
            token = self.get_input_embeddings()(torch.full((mask.shape[0], 1), begin, device=mask.device))
            read, attended = torch.cat([token, tokens], 1), F.pad(mask, (1, 0), value=True)
        # a sample without text must not attend to nothing
        attended = torch.cat([torch.ones_like(attended[:, :1]), attended[:, 1:]], 1)
        first = read.shape[1] - tokens.shape[1]
        numbers = surprisal = None
        if not self._is_causal:
            states = text_only_states(lambda: self._run_text(read, attended), read, self._text_layers)
        else:
            with torch.no_grad():
                states, outputs = kept_states(lambda: self._run_text(read, attended), self._text_layers)
                if input_ids is None:
                    numbers = torch.full((mask.shape[0], SURPRISAL_STATISTICS), torch.nan, device=mask.device)
                else:
                    # the first token is predicted by what begins the text, if anything does
                    before, targets = outputs.last_hidden_state[:, :-1], input_ids.gather(1, index)[:, 1 - first :]
                    numbers, surprisal = self._surprisal(before, targets, mask[:, 1 - first :])
        statistics = [token_statistics(state[:, first:], mask) for state in states]
        return ModalityFeatures(tokens, mask, torch.stack(statistics, 1), of_words(tokens, mask), numbers, surprisal)

    def _text_in_prompt(self, prompt: Prompt, reading: Reading, rows: Tensor | None = None) -> ModalityFeatures:
        """Features of the text of each row, as the language model has read it within its prompt.

        Args:
            rows: (b,), which prompts of the reading those of `prompt` are; `None` for all of them.
        """
        input_ids = cast(Tensor, prompt.input_ids)
        index, mask, tokens = self._text_tokens(input_ids, None, prompt.modality_ids)
        statistics = [token_statistics(take(reading.states[layer], index, rows), mask) for layer in self._text_layers]
        before = (index - 1).clamp_min(0)
        predicted = mask & (index > 0)
        if prompt.attention_mask is not None:
            predicted &= prompt.attention_mask.gather(1, before).bool()
        found = self._surprisal(take(reading.last, before, rows), input_ids.gather(1, index), predicted)
        return ModalityFeatures(
            tokens, mask, torch.stack(statistics, 1), of_words(tokens, mask), *found, in_prompt=True
        )

    @property
    def _begin_of_text(self) -> int | None:
        """What a text is begun with where the language model reads it alone, so that its first token is predicted."""
        token = getattr(self.config.get_text_config(decoder=True), "bos_token_id", None)
        return token if self._is_causal and isinstance(token, int) else None

    def _surprisal(self, before: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`surprisal_statistics` (B, P) of texts, and their mean surprisal (B,).

        Args:
            before: (B, N, D), what the output layer reads at the places before the targets.
            targets, mask: (B, N).
        """
        # a copy: whether a part of a tensor can be flattened as it lies would hang on its sizes
        before = before.clone(memory_format=torch.contiguous_format)
        tokens = token_surprisal(before, targets, mask, self._readout)
        return surprisal_statistics(tokens, mask), tokens[0].sum(1) / mask.sum(1).clamp_min(1)


def of_words(tokens: Tensor, mask: Tensor) -> Tensor:
    """What a text is about, whatever the order of its words: statistics of their embeddings, which all count alike.

    Args:
        tokens, mask: (B, N, D), (B, N).

    Returns:
        (B, 2 * D).
    """
    return token_statistics(F.normalize(tokens.float(), dim=-1), mask)


def of_rows(values: Tensor, owner: Tensor, batch: int) -> Tensor:
    """The mean over the images of each row: (I, ...), (I,) -> (B, ...); 0 in a row without. An image with the owner
    `batch` counts nowhere."""
    total = torch.zeros(batch + 1, *values.shape[1:], device=values.device).index_add_(0, owner, values)
    ones = torch.ones_like(owner, dtype=values.dtype)
    counts = torch.zeros(batch + 1, device=values.device).index_add_(0, owner, ones)
    return (total / counts.clamp_min(1).view(-1, *[1] * (values.ndim - 1)))[:batch]
