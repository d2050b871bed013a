"""Loading and saving of DMS classes."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.save.export import auto_map, export_code
from modeling_dms.save.staging import staged


_logger = logging.getLogger("transformers.modeling_utils")


@contextlib.contextmanager
def _report_held() -> Iterator[list[logging.LogRecord]]:
    """Holds back what transformers reports of missing weights, until it is known whether that is news: what is still
    in the list at the end is reported."""
    held: list[logging.LogRecord] = []
    thread = threading.get_ident()

    def hold(record: logging.LogRecord) -> bool:
        is_own = record.thread == thread and " LOAD REPORT" in record.getMessage()
        held.extend([record] * is_own)
        return not is_own

    _logger.addFilter(hold)
    try:
        yield held
    finally:
        _logger.removeFilter(hold)
        for record in held:
            _logger.handle(record)


# arguments that tell which version of a checkpoint is meant, and how it is reached
OF_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CheckpointMixin:
    """Checkpoints of a class with a `dms` submodule: vanilla ones load with only `dms.*` new, and what is saved loads
    where this package is not installed."""

    config: Any
    # `dtype=torch.bfloat16` at loading must not round the calibration either
    _keep_in_fp32_modules_strict: ClassVar = ["dms.calibration"]
    # the Auto class that loads an exported checkpoint
    _auto_map_name = "AutoModelForImageTextToText"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, PreTrainedModel):
            return
        # quantisers leave alone what stays in single precision, whatever their own list of exceptions
        cls._keep_in_fp32_modules = [*(cls._keep_in_fp32_modules or ()), "dms"]
        # classes outside of transformers inherit no conversion of checkpoint keys: without it a vanilla LLaVA loads
        # with a random lm_head
        vanilla = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        mapping = None
        for known in (vanilla.__name__, cls.config_class.vanilla_model_type()):
            mapping = mapping or get_checkpoint_conversion_mapping(known)
        if mapping:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors only. `dms_config=DMSConfig(...)` replaces the
        checkpoint's.

        Raises:
            ValueError: if the checkpoint is broken, has weights of other shapes, or lacks weights of the backbone or
                a part of a trained `dms`: only all of `dms.*`, or its scheduler, may be new. With
                `output_loading_info=True`, which tells what is new, more may.
        """
        saved = None
        if kwargs.get("dms_config") is not None or kwargs.get("config") is not None:
            of_hub = {name: kwargs[name] for name in OF_HUB if name in kwargs}
            saved = cls.config_class.get_config_dict(pretrained_model_name_or_path, **of_hub)[0].get("dms_config")
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name those that do
        kwargs.setdefault("use_safetensors", True)
        try:
            with _report_held() as held:
                model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
                missing, own = set(info["missing_keys"]), {f"dms.{name}" for name in model.dms.state_dict()}
                if missing == own and not info["unexpected_keys"] and not info["mismatched_keys"]:
                    held.clear()  # a vanilla checkpoint
        except SafetensorError as error:
            raise ValueError(f"the weights of {pretrained_model_name_or_path} cannot be read: {error}") from error
        # what an earlier version's calibration lacks, or has in another shape, is no damage of the checkpoint
        of_calibration = "dms.calibration."
        mismatched = sorted(key for key in info["mismatched_keys"] if not key[0].startswith(of_calibration))
        if mismatched and not may_differ:
            hint = ""
            if mismatched[0][0] == "dms.scheduler.hidden.weight":
                hint = (
                    "; a learned scheduler of version 0.1 saw other signals: train it again, or start anew with "
                    "`ignore_mismatched_sizes=True`"
                )
            raise ValueError(
                f"{pretrained_model_name_or_path} has weights of other shapes than {cls.__name__}, as (name, its "
                f"shape, the model's): {mismatched[:8]}{hint}"
            )
        calibration = model.dms.calibration
        other = any(key[0].startswith(of_calibration) for key in info["mismatched_keys"])
        if saved is not None:
            fields = {name: saved.get(name) for name in ("vision_layers", "text_layers")}
            other = other or model.watched_layers(DMSConfig(**fields)) != model.watched_layers(model.config.dms_config)
        if calibration.is_calibrated and other:
            calibration.reset()
            _logger.warning(
                "the calibration of %s is of other layers or sizes than its dms_config asks for: run "
                "`model.calibrate` again; until then the rule's weights are uniform",
                pretrained_model_name_or_path,
            )
        # a vanilla checkpoint has nothing of `dms`, and another scheduler than the saved one starts anew
        anew = {name for name in own if name.startswith("dms.scheduler.")}
        if "dms.calibration.detectors.0.count" in missing:
            anew |= {name for name in own if name.startswith(of_calibration)}
        new = own if own <= missing else anew
        if missing - new and not wants_info:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks weights that {cls.__name__} needs: {sorted(missing - new)[:8]}"
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, and the code beside the weights: `trust_remote_code=True` loads the
        result where this package is not installed. A save that fails leaves what the folder held before.

        Raises:
            OSError: if the files cannot be written.
        """
        self.config.auto_map = auto_map(type(self), type(self.config), self._auto_map_name)
        # today's names: the original ones are found again by the class's registered conversion alone, and the vanilla
        # class, which sees another model type, would load with a random lm_head
        kwargs.setdefault("save_original_format", False)
        if kwargs.get("distributed_checkpoint"):  # all processes write into one folder
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with staged(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                export_code(type(self), type(self.config), folder)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, of the code as well: `save_pretrained(push_to_hub=True)` uploads before it returns."""
        export_code(type(self), type(self.config), Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)
