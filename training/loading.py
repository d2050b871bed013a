"""Checkpoints as DMS models."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import find_adapter_config_file

from modeling_dms import (
    DMSBlip2ForConditionalGeneration,
    DMSBlip2ForImageTextRetrieval,
    DMSConfig,
    DMSInternVLForConditionalGeneration,
    DMSLlavaForConditionalGeneration,
)
from modeling_dms._compat import require
from modeling_dms.training.processors import load_processor


CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODEL_CLASSES = {
    "llava": DMSLlavaForConditionalGeneration,
    "dms_llava": DMSLlavaForConditionalGeneration,
    "internvl": DMSInternVLForConditionalGeneration,
    "dms_internvl": DMSInternVLForConditionalGeneration,
    "blip-2": DMSBlip2ForConditionalGeneration,
    "dms_blip_2": DMSBlip2ForConditionalGeneration,
}


def load(
    name: str | Path, dms: dict[str, Any] | None = None, merge: bool = True, **kwargs: Any
) -> tuple[Any, ProcessorMixin]:
    """A BLIP-2, LLaVA, InternVL or DMS checkpoint as a DMS model, and its processor, see [`load_processor`].

    Args:
        name: a folder, a Hub id, a checkpoint that ships with this package (`"demo-llava"`, `"demo-blip2"`), or one
            that `dms assemble` knows. A folder with an adapter that `dms train` wrote gives its base with the adapter
            merged into it.
        dms: fields of [`DMSConfig`] that replace the checkpoint's.
        merge: `False` gives a `PeftModel` where there is an adapter.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ValueError: for another model type, a checkpoint that needs code of its own, weights or a configuration that
            are broken, a processor that does not fit, an adapter with pickled weights, or a field that `DMSConfig`
            does not have or refuses.
        OSError: naming a checkpoint that is neither here nor to be had.
        ImportError: naming what an assembled checkpoint's parts or an adapter need.
    """
    adapter = _adapter(name)
    if adapter is not None:
        require("peft")
        from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
        from peft.utils import SAFETENSORS_WEIGHTS_NAME

        folder = adapter.parent
        if not (folder / SAFETENSORS_WEIGHTS_NAME).exists():  # peft would read pickled ones
            raise ValueError(f"{name} holds no {SAFETENSORS_WEIGHTS_NAME}: adapters are read from safetensors only")
        own = _dms_config(_config(folder)) if (folder / "config.json").exists() else {}
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model, processor = load(base, {**own, **(dms or {})}, **kwargs)
        weights = load_peft_weights(str(folder), device="cpu")
        if own.get("scheduler") != "learned":  # one that is asked for is new
            for part, value in model.dms.scheduler.state_dict().items():
                weights.setdefault(f"base_model.model.dms.scheduler.{part}", value)
        adapted = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
        try:
            set_peft_model_state_dict(adapted, weights)
        except KeyError as error:
            raise ValueError(f"{name} lacks the weights {error}: it is damaged, or of an older version") from error
        # peft trains a copy of `dms`, whose configuration would no longer be the model's
        for module in adapted.modules():
            if isinstance(getattr(module, "config", None), DMSConfig):
                module.config = model.config.dms_config  # type: ignore[assignment]
        if merge:
            # as `from_pretrained` leaves weights; besides, torch multiplies the last state of each row by frozen ones
            # row by row, which on a CPU takes a hundred times as long with a large vocabulary
            return adapted.merge_and_unload().requires_grad_(True), processor
        return adapted, processor
    name = _located(name)
    config = _config(name)
    if config.model_type not in MODEL_CLASSES:
        raise ValueError(f"{name} is a {config.model_type!r} checkpoint, expected one of {', '.join(MODEL_CLASSES)}")
    if dms:
        unknown = sorted(set(dms) - set(DMSConfig.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown field(s) {', '.join(unknown)} of DMSConfig")
        try:
            kwargs["dms_config"] = DMSConfig(**{**_dms_config(config), **dms})
        except StrictDataclassError as error:
            raise ValueError(f"dms: {error}") from error
    model = class_of(config).from_pretrained(name, **kwargs)
    return model, load_processor(name, model.config, model.can_generate())


def room_for_prompts(model: Any, processor: ProcessorMixin, new_tokens: int) -> int | None:
    """How many tokens a prompt may have, so that so many new ones fit behind it; `None` where nothing limits it.

    Raises:
        ValueError: if they alone are more than fit.
    """
    if not model.can_generate():  # BLIP-2's retrieval reads texts with its Q-Former
        return model.config.qformer_config.max_position_embeddings
    if not model.config.is_encoder_decoder:
        positions = model.config.get_text_config(decoder=True).max_position_embeddings
        if new_tokens >= positions:
            raise ValueError(
                f"{new_tokens} new tokens do not fit: the model has room for {positions}, prompt included"
            )
        return positions - new_tokens
    # relative positions know no end, but the tokenizer knows what its model was trained on
    length = processor.tokenizer.model_max_length
    return length if length < LARGE_INTEGER else None


def _config(name: str | Path) -> Any:
    try:
        # left to its default, transformers asks whether to run a checkpoint's code
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:  # which does not always say what it looked for
        raise OSError(f"{name}: {error}") from error
    except (ValueError, ImportError):
        raise
    except Exception as error:  # what transformers stumbles over in a file that is JSON but no configuration
        raise ValueError(f"the configuration of {name} cannot be read: {error}") from error


def _adapter(name: str | Path) -> Path | None:
    """The configuration of an adapter, which is downloaded if it is on the Hub; `None` for other checkpoints."""
    folder = Path(name)
    if not folder.exists() and "/" in str(name) and find_adapter_config_file(str(name)):
        folder = Path(snapshot_download(str(name)))
    file = folder / "adapter_config.json"
    return file if file.exists() else None


def class_of(config: Any) -> Any:
    """The DMS class for a checkpoint of `MODEL_CLASSES`."""
    retrieves = any(kind.endswith("ForImageTextRetrieval") for kind in config.architectures or ())
    return DMSBlip2ForImageTextRetrieval if retrieves else MODEL_CLASSES[config.model_type]


def _located(name: str | Path) -> str | Path:
    """The folder of a checkpoint that this package ships or assembles; other names as they are."""
    if Path(name).exists():
        return name
    if (CHECKPOINTS / name).exists():
        return CHECKPOINTS / name
    from modeling_dms.training.assemble import RECIPES, assembled

    return assembled(str(name)) if name in RECIPES else name


def _dms_config(config: Any) -> dict[str, Any]:
    """The fields of a composite configuration's `DMSConfig`; none of a vanilla one."""
    before = config.dms_config.to_dict() if hasattr(config, "dms_config") else {}
    return {key: value for key, value in before.items() if key in DMSConfig.__dataclass_fields__}
