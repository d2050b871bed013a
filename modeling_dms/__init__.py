"""Dynamic Modality Scheduling for vision-language models of transformers."""

from pathlib import Path as _Path

from modeling_dms import _compat  # noqa: F401  (names a version that is too old before its first missing name does)


# Installed, `configuration` and `training` lie inside this package (setup.py maps them). Run from the repository's
# root they lie beside it: without this line the root's `modeling_dms` would shadow an installed one and lack both.
if (_Path(__file__).parent.parent / "configuration" / "configuration_dms.py").is_file():
    __path__.append(str(_Path(__file__).parent.parent))

from modeling_dms.auto import (
    DMSBlip2ForConditionalGeneration,
    DMSBlip2ForImageTextRetrieval,
    DMSGemma3ForConditionalGeneration,
    DMSGlm4vForConditionalGeneration,
    DMSIdefics3ForConditionalGeneration,
    DMSInstructBlipForConditionalGeneration,
    DMSInternVLForConditionalGeneration,
    DMSLlavaForConditionalGeneration,
    DMSLlavaNextForConditionalGeneration,
    DMSLlavaOnevisionForConditionalGeneration,
    DMSMistral3ForConditionalGeneration,
    DMSModelForImageTextToText,
    DMSPaliGemmaForConditionalGeneration,
    DMSQwen2_5_VLForConditionalGeneration,
    DMSQwen3VLForConditionalGeneration,
    DMSSmolVLMForConditionalGeneration,
)
from modeling_dms.configuration.configuration_dms import (
    DMSBlip2Config,
    DMSConfig,
    DMSGemma3Config,
    DMSGlm4vConfig,
    DMSIdefics3Config,
    DMSInstructBlipConfig,
    DMSInternVLConfig,
    DMSLlavaConfig,
    DMSLlavaNextConfig,
    DMSLlavaOnevisionConfig,
    DMSMistral3Config,
    DMSPaliGemmaConfig,
    DMSQwen2_5_VLConfig,
    DMSQwen3VLConfig,
    DMSSmolVLMConfig,
    __version__,
)
from modeling_dms.reliability_mixin import kept_reliability


__all__ = [
    "DMSBlip2Config",
    "DMSBlip2ForConditionalGeneration",
    "DMSBlip2ForImageTextRetrieval",
    "DMSConfig",
    "DMSGemma3Config",
    "DMSGemma3ForConditionalGeneration",
    "DMSGlm4vConfig",
    "DMSGlm4vForConditionalGeneration",
    "DMSIdefics3Config",
    "DMSIdefics3ForConditionalGeneration",
    "DMSInstructBlipConfig",
    "DMSInstructBlipForConditionalGeneration",
    "DMSInternVLConfig",
    "DMSInternVLForConditionalGeneration",
    "DMSLlavaConfig",
    "DMSLlavaForConditionalGeneration",
    "DMSLlavaNextConfig",
    "DMSLlavaNextForConditionalGeneration",
    "DMSLlavaOnevisionConfig",
    "DMSLlavaOnevisionForConditionalGeneration",
    "DMSMistral3Config",
    "DMSMistral3ForConditionalGeneration",
    "DMSModelForImageTextToText",
    "DMSPaliGemmaConfig",
    "DMSPaliGemmaForConditionalGeneration",
    "DMSQwen2_5_VLConfig",
    "DMSQwen2_5_VLForConditionalGeneration",
    "DMSQwen3VLConfig",
    "DMSQwen3VLForConditionalGeneration",
    "DMSSmolVLMConfig",
    "DMSSmolVLMForConditionalGeneration",
    "__version__",
    "kept_reliability",
]
