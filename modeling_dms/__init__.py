"""Dynamic Modality Scheduling for BLIP-2, LLaVA and InternVL."""

from pathlib import Path as _Path
from typing import cast as _cast

from modeling_dms import _compat  # noqa: F401  (names a version that is too old before its first missing name does)


# Installed, `configuration` and `training` lie inside this package (setup.py maps them). Run from the repository's
# root they lie beside it: without this line the root's `modeling_dms` would shadow an installed one and lack both.
if (_Path(__file__).parent.parent / "configuration" / "configuration_dms.py").is_file():
    __path__.append(str(_Path(__file__).parent.parent))

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from modeling_dms.configuration.configuration_dms import (
    DMSBlip2Config,
    DMSConfig,
    DMSInternVLConfig,
    DMSLlavaConfig,
    __version__,
)
from modeling_dms.modeling_dms_blip_2 import DMSBlip2ForConditionalGeneration, DMSBlip2ForImageTextRetrieval
from modeling_dms.modeling_dms_internvl import DMSInternVLForConditionalGeneration
from modeling_dms.modeling_dms_llava import DMSLlavaForConditionalGeneration


for _class in (
    DMSLlavaForConditionalGeneration,
    DMSInternVLForConditionalGeneration,
    DMSBlip2ForConditionalGeneration,
):
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        _auto.register(_class.config_class, _class, exist_ok=True)
    # pipelines and `transformers serve` know classes by these names alone
    for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        _cast(dict, _names)[_class.config_class.model_type] = _class.__name__
AutoModel.register(DMSBlip2Config, DMSBlip2ForImageTextRetrieval, exist_ok=True)

__all__ = [
    "DMSBlip2Config",
    "DMSBlip2ForConditionalGeneration",
    "DMSBlip2ForImageTextRetrieval",
    "DMSConfig",
    "DMSInternVLConfig",
    "DMSInternVLForConditionalGeneration",
    "DMSLlavaConfig",
    "DMSLlavaForConditionalGeneration",
    "__version__",
]
