"""The forward pass and the generation of a DMS class: observe, weigh, steer."""

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from modeling_dms._compat import CACHE, EXPANDS_IMAGES, cache_of
from modeling_dms.encoding_mixin import EncodingMixin
from modeling_dms.observe.first_tokens import FirstTokens
from modeling_dms.observe.images import Images
from modeling_dms.observe.prefill import Generation, Prefill, Reading, observe_prefill
from modeling_dms.observe.prompt import OWN, ModalityFeatures, Prompt, Schedule, by_name, with_own_parameters
from modeling_dms.outputs import ModalitySignals, with_weights
from modeling_dms.steer.bias import embedding_scale
from modeling_dms.steer.masks import Steering, check_applied, scale_embeddings, steered
from modeling_dms.steer.running import Running
from modeling_dms.weigh.scheduler import uniform_weights


logger = logging.get_logger(__name__)

_generation: Running[Generation | None] = Running("generation", None)
_POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[2:]  # of `generate`, behind its inputs


class SteeredMixin(EncodingMixin):
    """DMS for a class of transformers that continues prompts.

    A sample's way: its images are encoded, while hooks keep what the layers of the vision tower say of them; the
    scheduler weighs image and text; the vanilla `forward` runs on what the caller passed, and `steered` adds log(M w)
    to the attention scores of its keys. The weights go along with the cache.
    """

    # parameters of the vanilla class's `forward`
    _forward_parameters: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, PreTrainedModel):
            return
        vanilla = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        cls._forward_parameters = tuple(inspect.signature(vanilla.forward).parameters)[1:]
        named = (*inspect.signature(vanilla.get_image_features).parameters, "image_sizes")
        cls._image_parameters = tuple(name for name in cls._forward_parameters if name in named)
        cls.forward = with_own_parameters(cls.forward, vanilla.forward)
        prepare = "prepare_inputs_for_generation"
        setattr(cls, prepare, with_own_parameters(getattr(cls, prepare), getattr(vanilla, prepare), ()))

    def __init__(self, config: Any):
        super().__init__(config)
        if self._is_causal:
            observe_prefill(self._text_stack())
        self._text_stack().register_forward_pre_hook(scale_embeddings, with_kwargs=True)
        language = self._language_model()
        inner = [module.config for module in language.modules() if isinstance(module, PreTrainedModel)]
        self._text_configs = list({id(c): c for c in (config.get_text_config(decoder=True), *inner)}.values())

    # --- what differs between the backbones

    def _without_images(self, input_ids: Tensor | None) -> dict[str, Any]:
        """Arguments that the vanilla `forward` wants where there are no images."""
        return {}

    # --- observe

    @torch.no_grad()
    def get_modality_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, ModalitySignals | None]:
        """Weights (B, M) and signals of prompts, which the language model reads without answering.

        Takes what `forward` takes; `modality_weights=` makes it use the result. There are no signals where the
        scheduler is uniform.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        own = {name: inputs.pop(name, None) for name in OWN}
        schedule = self._observe(inputs, self._observed_images(inputs), own, stops=True)
        if schedule is None:
            raise ValueError("nothing of these inputs can be observed")
        if isinstance(schedule, Prefill):
            schedule = self._read(schedule, inputs)
        return schedule.weights, None if schedule.output is None else schedule.output.signals

    @torch.no_grad()
    def _text_within(self, prompt: Prompt, inputs: dict[str, Any]) -> ModalityFeatures | None:
        found: list[ModalityFeatures] = []

        def weigh(reading: Reading | None) -> Schedule:
            if reading is not None:
                found.append(self._text_in_prompt(prompt, reading))
            return Schedule(prompt.modality_ids, prompt.modality_mask, uniform_weights(prompt.modality_mask))

        if self._is_causal:
            self._read(Prefill(self._steering_of(None), *prompt.modality_ids.shape, weigh, stops=True), inputs)
        return found[0] if found else None

    def _read(self, prefill: Prefill, inputs: dict[str, Any]) -> Schedule:
        """Runs the vanilla class until its language model has read the prompts."""
        inputs = {"input_ids": None, "pixel_values": None, **inputs, "use_cache": False}
        with prefill.observed():
            super().forward(**self._with_stand_ins(inputs))
        return prefill.settle()

    def _with_stand_ins(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the vanilla `forward`, with what it wants where there are no images."""
        if inputs["pixel_values"] is None and inputs.get("mm_encoder_outputs") is None:
            return inputs | self._without_images(inputs["input_ids"])
        return inputs

    # --- steer

    def _steering(self, schedule: Schedule | None, read: int | None = None) -> Steering | None:
        """How a schedule acts on a pass over a prompt, of which so many tokens were read before, or, with `None`, on
        one over what follows it."""
        if schedule is not None and read is not None and self.config.dms_config.fusion == "embedding":
            return Steering(scale=embedding_scale(schedule.weights, schedule.modality_ids)[:, read:])
        if schedule is None or schedule.bias is None:
            return None
        return self._steering_of(schedule.bias)

    def _steering_of(self, bias: Tensor | None) -> Steering:
        return Steering(self._text_configs, bias, causal=self._is_causal)

    def _known(self, inputs: dict[str, Any], own: dict[str, Tensor | None]) -> tuple[bool, Schedule | Prefill | None]:
        """Whether a call reads, or goes on with, a prompt that has been observed, or is being, and its schedule."""
        cache, generation = cache_of(inputs), _generation.get()
        carried = getattr(cache, "schedule", None)
        if carried is not None and not torch.compiler.is_compiling() and cache.get_seq_length() == 0:
            carried = None  # of a prompt that the cache holds no more
        if carried is None and generation is not None and generation.reads(self, inputs.get("input_ids"), cache):
            schedule = generation.schedule
            made = schedule.schedule if isinstance(schedule, Prefill) else None
            return True, schedule if made is None else made
        weights, ids = own.get("modality_weights"), own.get("modality_ids")
        if carried is None and cache is not None and not hasattr(cache, "get_seq_length"):
            # continuous batching: several prompts in one row, whose masks are none of the library's
            if weights is not None:
                raise ValueError("`modality_weights` cannot steer continuous batching: use `generate`")
            self._warn_unobserved("prompts in continuous batching")
            return True, None
        if carried is None and (cache is None or torch.compiler.is_compiling() or cache.get_seq_length() == 0):
            return False, None
        if ids is None and carried is not None:
            ids = carried.modality_ids
        if weights is not None and ids is not None:
            mask = inputs.get("attention_mask")
            prompt = mask[:, : ids.shape[1]] if isinstance(mask, Tensor) and mask.ndim == 2 else None
            carried = Schedule(ids, weights > 0, weights, None, self._key_bias(weights, ids, prompt))
        elif weights is not None:
            raise ValueError(
                "`modality_weights` beside a cache need the `modality_ids` of the prompt that it holds, which the "
                "prefill returned"
            )
        elif carried is None:
            self._warn_unobserved("a cache whose prompt another model has read")
        elif generation is None and inputs.get("pixel_values") is not None and not self._is_static:
            logger.warning_once("images behind a cached prompt are not observed: the weights are those of that prompt")
        return True, carried

    def _observe(
        self,
        inputs: dict[str, Any],
        images: Images | None,
        own: dict[str, Tensor | None],
        labels: Tensor | None = None,
        stops: bool = False,
    ) -> Schedule | Prefill | None:
        """The schedule of new prompts. The rule's is made by the language model's own pass over them, which mostly is
        the answer.

        Other schedulers hardly ever give uniform weights. For them, with gradients, in compiled and exported programs,
        and in models of which every process holds a part, so that all have to run in step, weights are an input of the
        pass, for which the text is read alone.

        Args:
            inputs, images, own, labels: see `_prompt`.
            stops: see [`Prefill`].
        """
        config, prompt = self.config.dms_config, self._prompt(inputs, images, own, labels)
        if prompt is None:
            self._warn_unobserved()
            return None
        signals = not self._is_static and (labels is not None or prompt.given is None)
        weigh = functools.partial(self._schedule, prompt, signals)
        if not signals or prompt.given is not None or prompt.input_ids is None or config.fusion != "attention":
            return weigh()
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._is_sharded:
            return weigh()
        if self.dms.scheduler.config.scheduler != "rule" or not self.dms.calibration.reads_prompts:
            return weigh()
        return Prefill(self._steering_of(None), *prompt.modality_ids.shape, weigh, stops)

    def _warn_unobserved(
        self,
        what: str = "embeddings without `modality_ids`, image tokens without their pixels, or images whose tokens the "
        "prompts do not hold",
    ) -> None:
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
            source_ids: (B, L), instead of `modality_ids`: 0 neutral, 1 to S for each image and each passage of text.
                `modality_mask`, `modality_weights` and what is returned of modalities then has a column a source. Not
                given, each image of a row with several is one, and all text, if calibration has seen several sources.
            source_types: (B, S), 1 for an image and 2 for text; told by the image tokens where not given.
            schedule_target: (B, M), target weights of the schedule loss.

        Raises:
            ValueError: for inputs that do not fit together, pixels that are not finite, or weights that cannot be
                applied: an attention implementation that takes no bias, a ready-made 4D mask.
        """
        inputs = by_name(self._forward_parameters, args, kwargs)
        for name in ("input_ids", "pixel_values"):  # some classes name them without a default
            inputs.setdefault(name, None)
        own = {name: inputs.pop(name, None) for name in OWN}
        target, labels, shifted = own.pop("schedule_target"), inputs.get("labels"), inputs.get("shift_labels")
        if labels is not None and shifted is not None and self._is_causal and shifted.shape == labels.shape:
            labels = F.pad(shifted, (1, -1), value=-100)
        cache = cache_of(inputs)
        known, schedule = self._known(inputs, own)
        if not known:
            schedule = self._observe(inputs, self._observed_images(inputs), own, labels)
        inputs = self._with_stand_ins(inputs) | {"return_dict": True}
        if isinstance(schedule, Prefill):
            steering, prefill = schedule.steering, schedule
            with prefill.observed():
                outputs = super().forward(**inputs)
            unread = prefill.schedule is None  # its language model, or a part of it, is compiled
            schedule = prefill.settle()
            if unread and steering.bias is not None:
                if cache is not None:
                    cache.reset()
                with steered(steering):
                    outputs = super().forward(**inputs)
        else:
            read = 0 if not known or cache is None else None
            if read is None and schedule is not None and not torch.compiler.is_compiling():
                read = int(cache.get_seq_length())
                ends = schedule.modality_ids.shape[1] if self._is_causal else 1  # what encoders read they read at once
                read = None if read >= ends else read
            steering = self._steering(schedule, read)
            with steered(steering):
                outputs = super().forward(**inputs)
        if not known:
            check_applied(steering)
        cache = outputs.get("language_model_outputs", outputs).get(CACHE)
        if cache is not None:
            cache.schedule = schedule
        num_items = inputs.get("num_items_in_batch")
        if labels is not None and shifted is not None and self._is_causal:
            labels = shifted  # of which the backbone's own loss is, too; they may hold some positions alone
        sureness = None if known or labels is not None else self._sureness(outputs, schedule, inputs)
        reliability = self._reliability(schedule, sureness)
        return self._with_dms(outputs, schedule, None if known else labels, target, num_items, reliability)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the vanilla class's; masks that `generate` makes in advance for a static cache get the bias."""
        _, schedule = self._known({**kwargs, "input_ids": args[0] if args else kwargs["input_ids"]}, {})
        with steered(schedule.steering if isinstance(schedule, Prefill) else self._steering(schedule)):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the vanilla class's; takes `modality_ids`, `modality_mask`, `modality_weights` and `source_ids` as well.

        The weights are computed once, from the prompt, and hold for every generated token. With
        `return_dict_in_generate=True` the output has `modality_weights`, `modality_signals` and `reliability`.
        """
        kwargs = by_name(_POSITIONAL, args, kwargs)
        self._check_padding(kwargs.get("attention_mask"))
        own = {name: kwargs.pop(name, None) for name in OWN[:-1]}
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        known, schedule = self._known({**kwargs, "input_ids": prompt}, own)
        if not known:
            observed = {**kwargs, "input_ids": prompt}
            schedule = self._observe(observed, self._observed_images(observed), own)
            if EXPANDS_IMAGES and "mm_encoder_outputs" in observed:
                kwargs["mm_encoder_outputs"] = observed["mm_encoder_outputs"]
                for pixels in ("pixel_values", "pixel_values_videos"):
                    kwargs.pop(pixels, None)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim > 2:
            if isinstance(schedule, Prefill):
                schedule = schedule.settle()
            if self._steering(schedule) is not None:
                raise ValueError(
                    f"the modality weights cannot steer a ready-made attention_mask of {mask.ndim} dimensions: pass "
                    "one of (batch, length)"
                )
        first = FirstTokens(kwargs, self.generation_config)
        with _generation.set(Generation(self, prompt, schedule)):
            generated = super().generate(inputs, **kwargs)
        if known:  # the cache holds the prompt
            first.sureness = None
        return self._generated(generated, schedule, first)

    def _generated(self, generated: Any, schedule: Schedule | Prefill | None, first: FirstTokens) -> Any:
        """What `generate` returned, with what DMS knows of it."""
        if isinstance(schedule, Prefill):
            schedule = schedule.settle()
        return with_weights(generated, schedule, self._keep(self._reliability(schedule, first.sureness)))
