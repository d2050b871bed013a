"""Checkpoints as DMS models."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import find_adapter_config_file

from modeling_dms import DMSConfig
from modeling_dms._compat import require
from modeling_dms.auto import class_of
from modeling_dms.training.models.processors import load_processor
from modeling_dms.training.names import check_names


CHECKPOINTS = Path(__file__).parent / "checkpoints"
# one of them makes a folder a checkpoint
CONFIGURATIONS = ("config.json", "adapter_config.json")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    name: str | Path, dms: dict[str, Any] | None = None, merge: bool = True, **kwargs: Any
) -> tuple[Any, ProcessorMixin]:
    """Any supported checkpoint, vanilla or DMS, as a DMS model, and its processor, see [`load_processor`].

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
    name = located(name)
    adapter = _adapter(name)
    if adapter is not None:
        require("peft")
        from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
        from peft.utils import SAFETENSORS_WEIGHTS_NAME

        folder = adapter.parent
        if not (folder / SAFETENSORS_WEIGHTS_NAME).exists():  # peft would read pickled ones
            raise ValueError(f"{name} holds no {SAFETENSORS_WEIGHTS_NAME}: adapters are read from safetensors only")
        own = _dms_config(read_config(folder)) if (folder / "config.json").exists() else {}
        model, processor = load(base_of(adapter), {**own, **(dms or {})}, **kwargs)
        weights = load_peft_weights(str(folder), device="cpu")
        if own.get("scheduler") != "learned":  # one that is asked for is new
            for part, value in model.dms.scheduler.state_dict().items():
                weights.setdefault(f"base_model.model.dms.scheduler.{part}", value)
        calibration = "base_model.model.dms.calibration."
        fitted = {f"{calibration}{part}": value for part, value in model.dms.calibration.state_dict().items()}
        if f"{calibration}agreement.0_map" not in weights:
            # calibrated by version 0.1, to other numbers: of that there is left that it was
            weights |= {part: value for part, value in fitted.items() if not part.endswith(".level")}
            weights = {**fitted, **weights}
        with warnings.catch_warnings():
            # peft asks transformers by a name that it calls old
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
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
    config = read_config(name)
    try:
        model_class = class_of(config)
    except ValueError as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    if dms:
        check_dms(dms)
        kwargs["dms_config"] = DMSConfig(**{**_dms_config(config), **dms})
    model = model_class.from_pretrained(name, **kwargs)
    return model, load_processor(name, model.config, model.can_generate())


def check_dms(fields: dict[str, Any]) -> None:
    """Raises ValueError for a field that `DMSConfig` does not have, or whose value it refuses."""
    check_names("field of DMSConfig", fields, DMSConfig.__dataclass_fields__)
    try:
        DMSConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"dms: {error}") from error


def on_accelerator(model: Any) -> Any:
    """The model on an accelerator where there is one; one that was spread over devices stays where it is."""
    if getattr(model, "hf_device_map", None) is not None or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())


def room_for_prompts(model: Any, processor: ProcessorMixin, new_tokens: int) -> int | None:
    """How many tokens a prompt may have, so that so many new ones fit behind it; `None` where nothing limits it.

    Raises:
        ValueError: if they alone are more than fit.
    """
    if not model.can_generate():  # BLIP-2's retrieval reads texts with its Q-Former
        return model.config.qformer_config.max_position_embeddings
    if not model.config.is_encoder_decoder:
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is None:
            return None
        if new_tokens >= positions:
            raise ValueError(
                f"{new_tokens} new tokens do not fit: the model has room for {positions}, prompt included"
            )
        return positions - new_tokens
    # relative positions know no end, but the tokenizer knows what its model was trained on
    length = processor.tokenizer.model_max_length
    return length if length < LARGE_INTEGER else None


def read_config(name: str | Path) -> Any:
    """The configuration of a checkpoint, whose code is not run.

    Raises:
        OSError, ValueError: as `load`.
    """
    try:
        # left to its default, transformers asks whether to run a checkpoint's code
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:  # which does not always say what it looked for
        if Path(name).exists():
            raise OSError(f"{name}: {error}") from error
        raise OSError(f"{_nowhere(name)}, and the Hub gives none: {error}") from error
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


def base_of(adapter: Path) -> str:
    """The checkpoint that an adapter's configuration builds on.

    Raises:
        ValueError: if the file does not say.
    """
    try:
        described = json.loads(adapter.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{adapter} is not JSON: {error}") from error
    base = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{adapter} names no base_model_name_or_path, got {base!r}")
    return base


def located(name: str | Path) -> str | Path:
    """The folder of a checkpoint: given, shipped or assembled; or a Hub id.

    Raises:
        OSError: naming what can be given, for a folder without a checkpoint, or a name that cannot be one.
    """
    folder = Path(name)
    if any((folder / file).is_file() for file in CONFIGURATIONS):
        return name
    if str(name) in shipped():
        return CHECKPOINTS / name
    from modeling_dms.training.models.assemble import RECIPES, assembled

    if str(name) in RECIPES:
        return assembled(str(name))
    if folder.is_dir():
        raise FileNotFoundError(f"the folder {name} holds no {' or '.join(CONFIGURATIONS)}: it is no checkpoint")
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file, expected the folder of a checkpoint")
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise FileNotFoundError(f"{_nowhere(name)}, and it is no id of the Hub (owner/name)") from error
    return name


def shipped() -> list[str]:
    """The names of the checkpoints that this package ships."""
    return sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())


def _nowhere(name: str | Path) -> str:
    from modeling_dms.training.models.assemble import RECIPES

    return (
        f"{name}: there is no such folder, this package has no such checkpoint ({', '.join((*shipped(), *RECIPES))})"
    )


def folders_of(name: str | Path) -> list[Path]:
    """The folders that `load` has read a checkpoint from: an adapter's own, and its base's behind it."""
    name = located(name)
    adapter = _adapter(name)
    if adapter is not None:
        return [adapter.parent, *folders_of(base_of(adapter))]
    folder = Path(name)
    return [folder if folder.exists() else Path(snapshot_download(str(name), local_files_only=True))]


def _dms_config(config: Any) -> dict[str, Any]:
    """The fields of a composite configuration's `DMSConfig`; none of a vanilla one."""
    before = config.dms_config.to_dict() if hasattr(config, "dms_config") else {}
    return {key: value for key, value in before.items() if key in DMSConfig.__dataclass_fields__}
