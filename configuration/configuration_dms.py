"""`DMSConfig`, every choice of Dynamic Modality Scheduling, and the configurations of the backbones that hold it."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

# an exported copy begins here: before a name that too old a version lacks, its version is named
from modeling_dms._compat import require  # noqa: F401


# isort: split
from huggingface_hub.dataclasses import strict
from transformers import (
    Blip2Config,
    Gemma3Config,
    Glm4vConfig,
    Idefics3Config,
    InstructBlipConfig,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging


logger = logging.get_logger(__name__)

__version__ = "0.2.0"

MODALITIES = ("vision", "text")
SIGNALS = ("confidence", "uncertainty", "consistency", "typicality", "damage")

# field: (lowest, highest) accepted value, both inclusive
_RANGES: dict[str, tuple[float, float]] = {
    "shared_size": (1, float("inf")),
    "mc_samples": (2, float("inf")),
    "mc_tokens": (2, float("inf")),
    "mc_dropout": (0.0, 0.9),
    "mc_seed": (0, 2**63 - 1),
    "subspace_size": (1, float("inf")),
    "kappa": (0.0, float("inf")),
    "weight_floor": (0.0, 0.49),
    "false_alarm_rate": (0.0, 0.5),
    "scheduler_hidden_size": (1, float("inf")),
    "temperature": (1e-6, float("inf")),
    "lambda_mwc": (0.0, float("inf")),
    "lambda_unimodal": (0.0, float("inf")),
    "lambda_consistency": (0.0, float("inf")),
    "lambda_schedule": (0.0, float("inf")),
    "contrastive_temperature": (1e-6, float("inf")),
}


class _Checked:
    """Mixed in before a configuration of transformers: what cannot be read is a `ValueError` that names the field,
    whatever the library stumbles over."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: naming the field that has a wrong type or value.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except Exception as error:
            if cls._reads(config_dict):  # one of `kwargs` is wrong
                raise
            name = ".".join((cls.__name__, *_fault(config_dict, cls._reads)))
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        try:
            found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(found, dict):
                raise TypeError(f"expected an object of fields, got {type(found).__name__}")
            return found, rest
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{pretrained_model_name_or_path} holds no {cls.__name__}: {error}") from error

    @classmethod
    def _reads(cls, config_dict: dict[str, Any]) -> bool:
        try:
            super().from_dict(config_dict)
        except Exception:  # whatever the library stumbles over: only whether it does is asked
            return False
        return True


def _fault(fields: dict[str, Any], reads: Callable[[dict[str, Any]], bool]) -> tuple[str, ...]:
    """Path of the field without which the others can be read; empty if there is none, or more than one is wrong."""
    for name, value in fields.items():
        if reads({other: fields[other] for other in fields if other != name}):
            within = isinstance(value, dict)
            return (name, *(_fault(value, lambda rest, name=name: reads({**fields, name: rest})) if within else ()))
    return ()


@strict
class DMSConfig(_Checked, PreTrainedConfig):
    r"""Choices of Dynamic Modality Scheduling. All are keyword arguments; values outside the stated range raise.

    Args:
        scheduler (`str`, defaults to `"rule"`): how signals become weights. `"uniform"`: all equal, the static
            backbone. `"rule"`: training-free; exactly uniform until `calibrate` has run and wherever nothing is
            suspicious. `"learned"`: the rule's scores, corrected by an MLP over all signals that is 0 at
            initialisation; it decides where the rule is silent or undecided but cannot overrule clear evidence. With
            `kappa=0` the MLP is alone. `"entropy"`: softmax of negative unimodal entropy (as in MLA). `"energy"`:
            softmax of the log-sum-exp of unimodal logits (as in QMF).
        fusion (`str`, defaults to `"attention"`): `"attention"` adds log(M * w_m) to the attention scores of modality
            m's keys. `"embedding"` multiplies its input embeddings by M * w_m (an ablation: pre-norm language models
            divide it out).
        shared_size (`int`, defaults to 256): size d_s of the unimodal representations h_m.
        normalize_entropy (`bool`, defaults to `True`): entropies over log K, so that confidence lies in [0, 1].
        uncertainty (`str`, defaults to `"mutual_information"`): what Monte Carlo dropout reports; `"variance"` is the
            paper's.
        mc_samples (`int`, defaults to 20): dropout passes, at least 2.
        mc_tokens (`int`, defaults to 256): how many of the likeliest tokens the dropout passes are compared on, at
            least 2; from the size of the vocabulary on, all of them. The output layer is the largest thing they read.
        mc_dropout (`float`, defaults to 0.1): dropout probability, 0 to 0.9.
        mc_seed (`int`, defaults to 0): seed of the dropout masks. The same masks serve every sample and call.
        vision_layers (`list[int]`, *optional*): layers of the vision tower whose token statistics measure typicality
            (0 is the embedding output). Default: the embeddings and four inner layers.
        text_layers (`list[int]`, *optional*): the same for the text-only pass through the first layers of the language
            model. Default: the embeddings and layer 1; of an encoder its middle and last layer too.
        subspace_size (`int`, defaults to 64): principal components kept per layer, fewer where the calibration set is
            small.
        kappa (`float`, defaults to 16.0): how strongly the rule reacts to evidence of damage beyond the threshold.
        weight_floor (`float`, defaults to 0.01): smallest weight of a present modality in the rule and the learned
            scheduler, 0 to 0.49; where `conflict_prior` decides, 0.01 at most; 0 for a damaged one without which
            calibration's answers were as good.
        conflict_prior (`str`, *optional*): which modality to believe where they disagree and neither is suspicious
            (`"vision"` or `"text"`). `"learned"` takes a second look at prompts that disagree or look damaged: the
            backbone reads them twice more, with each modality alone, and the answer that can be relied on most is
            taken. Calibrate with it set: then calibration also asks by how much the image makes the text likelier.
            Default: neither, weights stay uniform.
        false_alarm_rate (`float`, defaults to 0.01): share of clean samples that may be flagged for whatever reason, 0
            to 0.5. Damage of the image, of the text and, with `conflict_prior`, their disagreement share it alike.
        scheduler_hidden_size (`int`, defaults to 64): hidden units of the learned scheduler.
        scheduler_signals (`list[str]`, *optional*): what the MLP of the learned scheduler sees of `"confidence"`,
            `"uncertainty"`, `"consistency"`, `"typicality"` and `"damage"`, which calibration makes of the others.
            Default: all.
        temperature (`float`, defaults to 1.0): softmax temperature of `"entropy"` and `"energy"`.
        lambda_mwc, lambda_unimodal, lambda_consistency, lambda_schedule (`float`): weights of the losses (see
            `modeling_dms.weigh.losses`); 0 leaves a loss out.
        contrastive_temperature (`float`, defaults to 0.07): temperature of the contrastive loss.
        modeling_dms_version (`str`): version that wrote this configuration.
    """

    model_type: ClassVar[str] = "dms"

    scheduler: Literal["uniform", "rule", "learned", "entropy", "energy"] = "rule"
    fusion: Literal["attention", "embedding"] = "attention"
    shared_size: int = 256
    normalize_entropy: bool = True
    uncertainty: Literal["mutual_information", "variance"] = "mutual_information"
    mc_samples: int = 20
    mc_tokens: int = 256
    mc_dropout: float | int = 0.1
    mc_seed: int = 0
    vision_layers: list[int] | None = None
    text_layers: list[int] | None = None
    subspace_size: int = 64
    kappa: float | int = 16.0
    weight_floor: float | int = 0.01
    conflict_prior: Literal["vision", "text", "learned"] | None = None
    false_alarm_rate: float | int = 0.01
    scheduler_hidden_size: int = 64
    scheduler_signals: list[str] | None = None
    temperature: float | int = 1.0
    lambda_mwc: float | int = 0.1
    lambda_unimodal: float | int = 0.1
    lambda_consistency: float | int = 0.1
    lambda_schedule: float | int = 0.1
    contrastive_temperature: float | int = 0.07
    modeling_dms_version: str = __version__

    def __post_init__(self, **kwargs: Any):
        # what every transformers configuration may carry is not ours to judge; what a checkpoint of an earlier version
        # says of a choice that is gone, and chose as things are now, is no news
        kwargs = {name: value for name, value in kwargs.items() if _RETIRED.get(name, kwargs) != value}
        unknown = sorted(set(kwargs) - _INHERITED)
        if unknown:
            logger.warning(
                f"DMSConfig: unknown field(s) {', '.join(unknown)} ignored; the configuration was written by "
                f"modeling_dms {self.modeling_dms_version}, this is {__version__}"
            )
            kwargs = {name: value for name, value in kwargs.items() if name not in unknown}
        super().__post_init__(**kwargs)
        self.modeling_dms_version = __version__

    def validate_ranges(self):
        """Raises `ValueError` naming the first field outside its range."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high or value == float("inf"):
                raise ValueError(f"DMSConfig.{name} must lie in [{low}, {high}], got {value!r}")
        for name in ("vision_layers", "text_layers"):
            layers = getattr(self, name)
            if layers is not None and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
                raise ValueError(f"DMSConfig.{name} must be distinct layer numbers from 0, got {layers!r}")

        chosen = self.scheduler_signals
        if chosen is not None and (not chosen or set(chosen) - set(SIGNALS)):
            raise ValueError(f"DMSConfig.scheduler_signals must be some of {', '.join(SIGNALS)}, got {chosen!r}")

    @property
    def alarm_rate(self) -> float:
        """Share of clean samples that each reason may flag."""
        return float(self.false_alarm_rate) / (len(MODALITIES) + (self.conflict_prior is not None))

    def layers_of(self, modality: str, depth: int, causal: bool = True) -> list[int]:
        """Layers whose statistics measure typicality, sorted.

        Args:
            modality: `"vision"` or `"text"`.
            depth: layers of the vision tower, or of the language model (its encoder, if it has one).
            causal: whether the language model predicts the next token.

        Raises:
            ValueError: if a configured layer does not exist.
        """
        if modality == "vision":
            # middle layers tell most kinds of damage, the embeddings see noise that the first layers already absorb
            default = {0, *(max(1, round(depth * share)) for share in (0.2, 0.4, 0.6, 0.8))}
        else:
            # the embeddings tell unknown words; what is likely, a model that predicts tells by its predictions, an
            # encoder by its deep layers
            default = {0, 1} if causal else {0, 1, max(1, depth // 2), depth}
        layers = getattr(self, f"{modality}_layers")
        layers = sorted(default if layers is None else layers)
        if layers[-1] > depth:
            raise ValueError(
                f"DMSConfig.{modality}_layers must not exceed the backbone's {depth} layers, got {layers}"
            )
        return layers


# fields of earlier versions, with the value that is as things are now
_RETIRED = {"mc_depth": "head", "scheduler_embeddings": False, "consistency": "sharpen", "arbitration_rate": 0.05}
_INHERITED = {
    "transformers_version",
    "model_type",
    "auto_map",
    "_name_or_path",
    "name_or_path",
    "torch_dtype",
    "_commit_hash",
}
_INHERITED |= {"attn_implementation", "_attn_implementation", "output_attentions"}


class _OfVanilla(_Checked):
    """Mixed in before a configuration of transformers."""

    @classmethod
    def vanilla_model_type(cls) -> str:
        """The `model_type` of that configuration."""
        return super().model_type

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # a vanilla checkpoint's configuration is a DMS one without choices: no reason to warn of another model type
        if config_dict.get("model_type") == cls.vanilla_model_type():
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs


def _with_dms(defaults: dict[str, SubConfigSpec]) -> dict[str, SubConfigSpec]:
    return {**defaults, "dms_config": SubConfigSpec(config_class=DMSConfig)}


@strict
class DMSLlavaConfig(_OfVanilla, LlavaConfig):
    r"""A `LlavaConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_llava"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(LlavaConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSLlavaNextConfig(_OfVanilla, LlavaNextConfig):
    r"""A `LlavaNextConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_llava_next"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(LlavaNextConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSLlavaOnevisionConfig(_OfVanilla, LlavaOnevisionConfig):
    r"""A `LlavaOnevisionConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_llava_onevision"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(LlavaOnevisionConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSGlm4vConfig(_OfVanilla, Glm4vConfig):
    r"""A `Glm4vConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_glm4v"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Glm4vConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSInternVLConfig(_OfVanilla, InternVLConfig):
    r"""An `InternVLConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_internvl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(InternVLConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSBlip2Config(_OfVanilla, Blip2Config):
    r"""A `Blip2Config` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_blip_2"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Blip2Config.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSInstructBlipConfig(_OfVanilla, InstructBlipConfig):
    r"""An `InstructBlipConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_instructblip"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(InstructBlipConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSQwen2_5_VLConfig(_OfVanilla, Qwen2_5_VLConfig):  # noqa: N801
    r"""A `Qwen2_5_VLConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_qwen2_5_vl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Qwen2_5_VLConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSQwen3VLConfig(_OfVanilla, Qwen3VLConfig):
    r"""A `Qwen3VLConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_qwen3_vl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Qwen3VLConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSGemma3Config(_OfVanilla, Gemma3Config):
    r"""A `Gemma3Config` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_gemma3"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Gemma3Config.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSSmolVLMConfig(_OfVanilla, SmolVLMConfig):
    r"""A `SmolVLMConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_smolvlm"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(SmolVLMConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSIdefics3Config(_OfVanilla, Idefics3Config):
    r"""An `Idefics3Config` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_idefics3"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Idefics3Config.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSPaliGemmaConfig(_OfVanilla, PaliGemmaConfig):
    r"""A `PaliGemmaConfig` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_paligemma"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(PaliGemmaConfig.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


@strict
class DMSMistral3Config(_OfVanilla, Mistral3Config):
    r"""A `Mistral3Config` with `dms_config`, a [`DMSConfig`] or a dictionary of its fields."""

    model_type: ClassVar[str] = "dms_mistral3"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = _with_dms(Mistral3Config.sub_configs_defaults)

    dms_config: dict | PreTrainedConfig | None = None


__all__ = [
    "DMSBlip2Config",
    "DMSConfig",
    "DMSGemma3Config",
    "DMSGlm4vConfig",
    "DMSIdefics3Config",
    "DMSInstructBlipConfig",
    "DMSInternVLConfig",
    "DMSLlavaConfig",
    "DMSLlavaNextConfig",
    "DMSLlavaOnevisionConfig",
    "DMSMistral3Config",
    "DMSPaliGemmaConfig",
    "DMSQwen2_5_VLConfig",
    "DMSQwen3VLConfig",
    "DMSSmolVLMConfig",
]
