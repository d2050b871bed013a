"""Which parameters a run trains."""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from modeling_dms._compat import require


Stage = Literal["align", "bridge", "backbone", "scheduler", "joint"]
LoraTargets = Literal["attention", "all"]

# what architectures call the projections to queries and values, some of which have one for both
_ATTENTION = {"q_proj", "v_proj", "q", "v", "qkv_proj", "query_key_value", "c_attn"}


def encodes_images(name: str, bridge: Sequence[str]) -> bool:
    """Whether a parameter lies on the way from pixels to image tokens, of a model with this `bridge`."""
    return bool({"vision_tower", "vision_model", "visual", *bridge}.intersection(name.split(".")))


def prepare(
    model: Any,
    stage: Stage,
    lora_rank: int = 16,
    train_bridge: bool = False,
    lora_targets: LoraTargets = "attention",
    save_bridge: bool = False,
) -> Any:
    """Freezes what a stage does not train; wraps the model with peft where it trains LoRA.

    - `"align"`: what `"bridge"` trains, by `AlignmentTrainer`, which leaves the language model out.
    - `"bridge"`: the projector, or BLIP-2's Q-Former and the projection behind it, alone, where new.
    - `"scheduler"`: the learned scheduler alone. Backbone and unimodal views are frozen, so that the signals it learns
      from stay as they were calibrated.
    - `"backbone"`: LoRA on the language model, `dms` frozen.
    - `"joint"`: both.

    Args:
        model: a DMS model, or a `PeftModel` of one, whose adapter is trained further.
        lora_rank: 0 trains the language model's own weights instead.
        train_bridge: also train the projector or the Q-Former.
        lora_targets: `"attention"`, its queries and values; `"all"`, every linear layer.
        save_bridge: the adapter holds the projector or the Q-Former though it is not trained, because an earlier stage
            has trained it.

    Returns:
        The model, or a `PeftModel` around it whose adapter holds everything that is trained.

    Raises:
        ValueError: for an unknown stage, a bridge to train where the backbone stays frozen, a scheduler to train that
            has no parameters, or an adapter of another rank or other targets.
    """
    if stage not in get_args(Stage):
        raise ValueError(f"stage must be one of {', '.join(get_args(Stage))}, got {stage!r}")
    bridge = model.bridge
    if stage in ("align", "bridge"):
        for name, parameter in model.named_parameters():
            # without `query_tokens`: an adapter that is trained later has all that this stage changed, see below
            parameter.requires_grad_(any(part in name.split(".") for part in bridge if part != "query_tokens"))
        return model
    bridge = bridge if train_bridge else ()
    if stage == "scheduler" and bridge:
        raise ValueError("stage='scheduler' trains on the frozen backbone: train_bridge must be off")
    chosen = model.config.dms_config.scheduler
    if stage == "scheduler" and chosen != "learned":
        raise ValueError(f"stage='scheduler' needs DMSConfig(scheduler='learned'), the model's is {chosen!r}")
    if stage == "scheduler":
        model.requires_grad_(False)
        model.dms.scheduler.requires_grad_(True)
        return model
    kept = model.bridge if save_bridge else bridge
    whole = [*(["dms"] if stage == "joint" else []), *bridge]
    if lora_rank:
        require("peft")
        from peft import LoraConfig, get_peft_model

        # `query_tokens` is a bare parameter, which peft cannot copy as a module
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            target_modules=targets_of(model, lora_targets),
            modules_to_save=[name for name in ("dms", *kept) if name != "query_tokens"],
            bias="none",
        )
        wrapped = get_peft_model(model, config) if not hasattr(model, "peft_config") else _adapted(model, config)
        # peft trains all that it saves
        frozen = {"dms", *kept}.difference(whole)
        for name, parameter in wrapped.named_parameters():
            if frozen.intersection(name.split(".")):
                parameter.requires_grad_(False)
        return wrapped
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_(is_language(name) or any(part in parts for part in whole))
    return model


def targets_of(model: Any, lora_targets: LoraTargets) -> str:
    """A pattern for peft's `target_modules`, which matches linear layers of the language model: the projections to
    queries and values of its attention, or every one but the head. A bare list of suffixes would match the vision
    tower's too.

    Raises:
        ValueError: where the language model has no such layers.
    """
    head = model.get_output_embeddings()
    linear = (
        name.removesuffix(".base_layer")  # of an adapter's, beside which its own layers lie
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_language(name) and ".lora_" not in name
    )
    found = {name.rpartition(".")[2] for name in linear}
    chosen = found & _ATTENTION if lora_targets == "attention" else found
    if not chosen:
        raise ValueError(
            f"lora_targets={lora_targets!r}: the language model has none of {sorted(_ATTENTION)}; its linear layers "
            f"are called {sorted(found)}"
        )
    return rf".*(language_model|text_model).*\.({'|'.join(sorted(chosen))})"


def _adapted(model: Any, wanted: Any) -> Any:
    """A `PeftModel` whose adapter is trained further, if it is what a new one would be."""
    own = model.peft_config["default"]
    for name in ("r", "lora_alpha", "modules_to_save"):
        there, asked = getattr(own, name), getattr(wanted, name)
        if there != asked:
            raise ValueError(f"the adapter to train further has {name}={there!r}, this run asks for {asked!r}")
    # different patterns may name the same layers
    names = [name for name, _ in model.get_base_model().named_modules()]
    there, asked = ({n for n in names if re.fullmatch(c.target_modules, n)} for c in (own, wanted))
    if there != asked:
        raise ValueError(
            f"the adapter to train further has target_modules={own.target_modules!r}, this run asks for "
            f"{wanted.target_modules!r}"
        )
    model.set_adapter("default")  # loaded to be used, it is frozen
    return model


def is_language(name: str) -> bool:
    """Whether a parameter belongs to the language model."""
    return bool(re.search(r"(^|\.)(language_model|text_model|lm_head)\.", name))
