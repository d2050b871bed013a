"""The forward pass and the generation of a DMS class: observe, weigh, steer."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from modeling_dms._compat import CACHE
from modeling_dms.mixin import DMSMixin
from modeling_dms.observe.images import Images, image_statistics
from modeling_dms.observe.layers import kept_states
from modeling_dms.observe.prompt import Generation, Schedule
from modeling_dms.outputs import ModalitySignals, with_weights
from modeling_dms.steer.bias import embedding_scale
from modeling_dms.steer.masks import Steering, check_applied, steered
from modeling_dms.steer.running import Running


logger = logging.get_logger(__name__)

# what the calls of a DMS class take beside those of its vanilla class
OWN = ("modality_ids", "modality_mask", "modality_weights", "schedule_target")
_generation: Running[Generation | None] = Running("generation", None)
_scale: Running[Tensor | None] = Running("embedding_scale", None)


def _scale_embeddings(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook in front of the language model, for `fusion="embedding"`."""
    scale, embeddings = _scale.get(), kwargs.get("inputs_embeds")
    if scale is None or embeddings is None:
        return None
    return args, {**kwargs, "inputs_embeds": embeddings * scale[..., None].to(embeddings.dtype)}


def _rows(inputs: dict[str, Any]) -> int:
    """How many rows a batch has."""
    return len(inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"])


def _with_own_parameters(method: Callable, vanilla: Callable, own: Sequence[str]) -> Callable:
    """`method` with the signature of the vanilla one and `own` behind it: `Trainer` and `generate` look there for what
    a model takes."""

    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signature = inspect.signature(vanilla)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in own]
    parameters += [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


class SteeredMixin(DMSMixin):
    """DMS for a class of transformers that continues prompts.

    A sample's way: its images are encoded, while hooks keep what the layers of the vision tower say of them; the
    scheduler weighs image and text; the vanilla `forward` runs on what the caller passed, and `steered` adds log(M w)
    to the attention scores of its keys. The weights go along with the cache.
    """

    # parameters of the vanilla class's `forward`, and those of them that `get_image_features` takes
    _forward_parameters: ClassVar[tuple[str, ...]] = ()
    _image_parameters: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, PreTrainedModel):
            return
        vanilla = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        cls._forward_parameters = tuple(inspect.signature(vanilla.forward).parameters)[1:]
        named = (*inspect.signature(vanilla.get_image_features).parameters, "image_sizes")
        cls._image_parameters = tuple(name for name in cls._forward_parameters if name in named)
        cls.forward = _with_own_parameters(cls.forward, vanilla.forward, OWN)
        prepare = "prepare_inputs_for_generation"
        setattr(cls, prepare, _with_own_parameters(getattr(cls, prepare), getattr(vanilla, prepare), ()))

    def __init__(self, config: Any):
        super().__init__(config)
        self._text_stack().register_forward_pre_hook(_scale_embeddings, with_kwargs=True)
        language = self._language_model()
        inner = [module.config for module in language.modules() if isinstance(module, PreTrainedModel)]
        self._text_configs = list({id(c): c for c in (config.get_text_config(decoder=True), *inner)}.values())

    # --- what differs between the backbones

    def _tiles(self, **kwargs: Any) -> list[int] | None:
        """How many tiles each image is cut into, from the arguments of `get_image_features`; `None` where that is told
        by its tokens."""
        return None

    def _without_images(self) -> dict[str, Any]:
        """Arguments that the vanilla `forward` wants where there are no images."""
        return {}

    # --- observe

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the vanilla class's; its output also holds `statistics`, what typicality reads of the vision tower."""
        states, outputs = kept_states(
            lambda: super(SteeredMixin, self).get_image_features(*args, **kwargs), self._vision_layers
        )
        if isinstance(outputs, ModelOutput):
            given = {**dict(zip(self._image_parameters, args, strict=False)), **kwargs}
            outputs.statistics = image_statistics(states, outputs.pooler_output, self._tiles(**given))
        return outputs

    def _observed_images(self, inputs: dict[str, Any]) -> Images | None:
        """The images of a call; `None` without any. Its pixels are replaced by `mm_encoder_outputs`."""
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        pixels = inputs.get("pixel_values")
        if encoded is not None:
            if pixels is not None:
                raise ValueError("pass either `pixel_values` or `mm_encoder_outputs`, not both")
            return Images.of(encoded)
        if pixels is None:
            return None
        self._check_images(pixels)
        given = {name: inputs[name] for name in self._image_parameters if inputs.get(name) is not None}
        encoded = self.get_image_features(**given, return_dict=True)
        inputs["mm_encoder_outputs"] = {"image": encoded}
        inputs["pixel_values"] = None
        return Images.of(encoded)

    @torch.no_grad()
    def get_modality_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, ModalitySignals | None]:
        """Weights (B, M) and signals of prompts, without running the language model on them.

        Takes what `forward` takes; `modality_weights=` makes it use the result. There are no signals where the
        scheduler is uniform.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        own = {name: inputs.pop(name, None) for name in OWN}
        schedule = self._schedule(inputs, self._observed_images(inputs), own)
        if schedule is None:
            raise ValueError("nothing of these inputs can be observed")
        return schedule.weights, None if schedule.output is None else schedule.output.signals

    # --- steer

    def _steering(self, schedule: Schedule | None) -> Steering | None:
        if schedule is None or schedule.bias is None:
            return None
        return Steering(self._text_configs, schedule.bias, self._is_causal)

    def _read_before(
        self, inputs: dict[str, Any], own: dict[str, Tensor | None], generation: Generation | None
    ) -> tuple[bool, Schedule | None]:
        """Whether a call goes on with a prompt that an earlier one has read, and its schedule if it is known."""
        cache = inputs.get(CACHE, inputs.get("past_key_values"))
        carried = getattr(cache, "schedule", None)
        if carried is None and generation is not None and generation.continues(inputs.get("input_ids")):
            carried = generation.schedule
        if carried is None and (cache is None or torch.compiler.is_compiling() or cache.get_seq_length() == 0):
            return False, None
        if own["modality_weights"] is not None and own["modality_ids"] is not None:
            weights, ids = own["modality_weights"], own["modality_ids"]
            mask = inputs.get("attention_mask")
            prompt = mask[:, : ids.shape[1]] if isinstance(mask, Tensor) and mask.ndim == 2 else None
            carried = Schedule(ids, weights > 0, weights, None, self._key_bias(weights, ids, prompt))
        elif carried is None and own["modality_weights"] is not None:
            raise ValueError(
                "`modality_weights` beside a cache need the `modality_ids` of the prompt that it holds, which the "
                "prefill returned"
            )
        elif carried is None:
            self._warn_unobserved("a cache whose prompt another model has read")
        return True, carried

    def _warn_unobserved(self, what: str) -> None:
        if not self._is_static:
            logger.warning_once(f"nothing can be observed of {what}: the modality weights are uniform there")

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        r"""
        As the vanilla class's, and:

        Args:
            modality_ids: (B, L), 1 vision, 2 text, 0 neutral; inferred where not given.
            modality_mask: (B, M), False where a modality is missing although it has positions (a blank stand-in
                image).
            modality_weights: (B, M), rows sum to 1, instead of the scheduler's. Beside a cache that has not been made
                here, with the `modality_ids` of its prompt.
            schedule_target: (B, M), target weights of the schedule loss.

        Raises:
            ValueError: for inputs that do not fit together, pixels that are not finite, or weights that cannot be
                applied: an attention implementation that takes no bias, a ready-made 4D mask.
        """
        inputs = {**dict(zip(self._forward_parameters, args, strict=False)), **kwargs}
        for name in ("input_ids", "pixel_values"):  # some classes name them without a default
            inputs.setdefault(name, None)
        own = {name: inputs.pop(name, None) for name in OWN}
        target, labels = own.pop("schedule_target"), inputs.get("labels")
        generation = _generation.get()
        if generation is not None and generation.model is not self:
            generation = None
        if generation is not None:
            own = generation.expanded(_rows(inputs))
        continued, schedule = self._read_before(inputs, own, generation)
        images = None
        if not continued:
            images = self._observed_images(inputs)
            length = None if generation is None or generation.prompt is None else generation.prompt.shape[1]
            schedule = self._schedule(inputs, images, own, labels, length)
            if schedule is None:
                self._warn_unobserved("embeddings without `modality_ids`, or image tokens without an image")
        if images is None:
            inputs |= self._without_images()
        steering, scale = self._steering(schedule), None
        if schedule is not None and not continued and self.config.dms_config.fusion == "embedding":
            scale = embedding_scale(schedule.weights, schedule.modality_ids)
        with steered(steering), _scale.set(scale):
            outputs = super().forward(**inputs, return_dict=True)
        if not continued:
            check_applied(steering)
        cache = outputs.get(CACHE)
        if cache is not None and schedule is not None:
            cache.schedule = schedule
        if generation is not None and not continued:
            generation.schedule = schedule
        num_items = inputs.get("num_items_in_batch")
        return self._with_dms(outputs, schedule, None if continued else labels, target, num_items)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the vanilla class's; masks that `generate` makes in advance for a static cache get the bias."""
        schedule = getattr(kwargs.get(CACHE), "schedule", None)
        with steered(self._steering(schedule)):
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("is_first_iteration") and schedule is None and "attention_mask" in inputs:
            # of the prompt the weights are not known yet: its masks are made when they are
            inputs["attention_mask"] = kwargs.get("attention_mask")
        return inputs

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the vanilla class's; takes `modality_ids`, `modality_mask` and `modality_weights` as well.

        The weights are computed once, from the prompt, and hold for every generated token. With
        `return_dict_in_generate=True` the output has `modality_weights` and `modality_signals`.
        """
        self._check_padding(kwargs.get("attention_mask"))
        own = {name: kwargs.pop(name, None) for name in OWN[:3]}
        given = [args[0] if args else None, *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((value for value in given if value is not None), None)
        generation = Generation(self, own, prompt)
        with _generation.set(generation):
            generated = super().generate(*args, **kwargs)
        return with_weights(generated, generation.schedule, prompt)
