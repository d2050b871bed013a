"""Any supported checkpoint of transformers as its DMS class."""

from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from modeling_dms.modeling_dms_blip_2 import DMSBlip2ForConditionalGeneration, DMSBlip2ForImageTextRetrieval
from modeling_dms.modeling_dms_gemma3 import DMSGemma3ForConditionalGeneration
from modeling_dms.modeling_dms_glm4v import DMSGlm4vForConditionalGeneration
from modeling_dms.modeling_dms_idefics3 import DMSIdefics3ForConditionalGeneration
from modeling_dms.modeling_dms_instructblip import DMSInstructBlipForConditionalGeneration
from modeling_dms.modeling_dms_internvl import DMSInternVLForConditionalGeneration
from modeling_dms.modeling_dms_llava import DMSLlavaForConditionalGeneration
from modeling_dms.modeling_dms_llava_next import DMSLlavaNextForConditionalGeneration
from modeling_dms.modeling_dms_llava_onevision import DMSLlavaOnevisionForConditionalGeneration
from modeling_dms.modeling_dms_mistral3 import DMSMistral3ForConditionalGeneration
from modeling_dms.modeling_dms_paligemma import DMSPaliGemmaForConditionalGeneration
from modeling_dms.modeling_dms_qwen2_5_vl import DMSQwen2_5_VLForConditionalGeneration
from modeling_dms.modeling_dms_qwen3_vl import DMSQwen3VLForConditionalGeneration
from modeling_dms.modeling_dms_smolvlm import DMSSmolVLMForConditionalGeneration
from modeling_dms.save.checkpoints import OF_HUB
from modeling_dms.steered_mixin import SteeredMixin


# by the `model_type` of the vanilla class
CLASSES: dict[str, type[SteeredMixin]] = {
    cls.config_class.vanilla_model_type(): cls
    for cls in (
        DMSBlip2ForConditionalGeneration,
        DMSGemma3ForConditionalGeneration,
        DMSGlm4vForConditionalGeneration,
        DMSIdefics3ForConditionalGeneration,
        DMSInstructBlipForConditionalGeneration,
        DMSInternVLForConditionalGeneration,
        DMSLlavaForConditionalGeneration,
        DMSLlavaNextForConditionalGeneration,
        DMSLlavaOnevisionForConditionalGeneration,
        DMSMistral3ForConditionalGeneration,
        DMSPaliGemmaForConditionalGeneration,
        DMSQwen2_5_VLForConditionalGeneration,
        DMSQwen3VLForConditionalGeneration,
        DMSSmolVLMForConditionalGeneration,
    )
}

_AUTO = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
)
for _class in CLASSES.values():
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    for _auto in _AUTO:
        if _auto._model_mapping.get(_class.config_class.__bases__[-1], None) in _class.__mro__:  # the vanilla class
            _auto.register(_class.config_class, _class, exist_ok=True)
    # pipelines and `transformers serve` know classes by these names alone
    for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        cast(dict, _names)[_class.config_class.model_type] = _class.__name__
AutoModel.register(DMSBlip2ForImageTextRetrieval.config_class, DMSBlip2ForImageTextRetrieval, exist_ok=True)


def class_of(config: Any) -> Any:
    """The DMS class for a checkpoint, vanilla or DMS, with this configuration.

    Raises:
        ValueError: for a family that is not supported.
    """
    if any(kind.endswith("ForImageTextRetrieval") for kind in config.architectures or ()):
        return DMSBlip2ForImageTextRetrieval
    # configurations from remote code are other classes: only their types tell
    for vanilla, cls in CLASSES.items():
        if config.model_type in (vanilla, cls.config_class.model_type):
            return cls
    raise ValueError(f"a {config.model_type!r} checkpoint is not supported, expected one of {', '.join(CLASSES)}")


class DMSModelForImageTextToText:
    """Loads any supported image-text-to-text checkpoint, vanilla or DMS, as its DMS class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `AutoModelForImageTextToText.from_pretrained`; `dms_config=DMSConfig(...)` replaces the checkpoint's.

        Raises:
            ValueError: for a family that is not supported, or as `from_pretrained` of its class.
        """
        config = kwargs.get("config")
        if config is None:
            of_hub = {name: kwargs[name] for name in OF_HUB if name in kwargs}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **of_hub)
        cls = class_of(config)
        if kwargs.get("config") is not None and not isinstance(config, cls.config_class):  # the vanilla class's
            known = {**config.to_dict(), "model_type": cls.config_class.model_type}
            kwargs["config"] = cls.config_class.from_dict(known)
        return cls.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
