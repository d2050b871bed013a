"""Adapters small enough to be kept in a repository, over a base that `dms assemble` builds anywhere."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from modeling_dms.save.staging import check_writable
from modeling_dms.training.models.assemble import RECIPES, digest
from modeling_dms.training.models.loading import base_of, load
from modeling_dms.training.names import check_names
from modeling_dms.training.publish.card import replacing


def of_rank(state: dict[str, Tensor], scale: float, rank: int) -> dict[str, Tensor]:
    """What a LoRA of a lower rank, of scale 1, keeps best of one: the first singular vectors of each product.

    Args:
        state: an adapter's weights; others than LoRA's stay as they are.
        scale: by which its products count, alpha / rank.

    Raises:
        ValueError: if the rank is not at least 1 and below the adapter's.
    """
    kept = {name: value for name, value in state.items() if "lora_" not in name}
    for name in (name for name in state if "lora_A" in name):
        partner = name.replace("lora_A", "lora_B")
        wide, high = state[name].float(), state[partner].float()
        if not 1 <= rank < len(wide):
            raise ValueError(f"rank must be from 1 to {len(wide) - 1}, below the adapter's, got {rank}")
        (left, upper), (right, lower) = torch.linalg.qr(scale * high), torch.linalg.qr(wide.T)
        u, size, vh = torch.linalg.svd(upper @ lower.T)
        root = size[:rank].sqrt()
        kept[partner] = (left @ u[:, :rank] * root).contiguous()
        kept[name] = (root[:, None] * vh[:rank] @ right.T).contiguous()
    return kept


def release(run: Path, base: str, out: Path, rank: int | None = None) -> Path:
    """Writes the adapter of a run with another base: the assembled checkpoint that training began with.

    What training changed before (`stage: bridge`) is in the adapter whole. The backbone's weights are rounded to
    bfloat16, `dms` stays as it is.

    Args:
        run: a folder that `dms train` or `dms calibrate` wrote.
        base: of `RECIPES`.
        out: the folder that is written.
        rank: of the LoRA that is written; `None` keeps the run's.

    Raises:
        ValueError: if the run's own base differs from `base` in more than what the adapter holds, or as `of_rank`.
        FileNotFoundError: if `run` holds no adapter.
        OSError: if `out` cannot be written to.
    """
    check_names("base", [base], RECIPES)
    check_writable(out)
    adapter = run / "adapter_config.json"
    if not adapter.exists():
        raise FileNotFoundError(f"{run} is no adapter: it holds no {adapter.name}")
    own, _ = load(base_of(adapter))
    found = digest(own, without=("dms",))
    if found != RECIPES[base].sha256:
        raise ValueError(f"the adapter of {run} was not trained on {base}: SHA-256 {found} of the frozen weights")
    state = load_file(run / "adapter_model.safetensors")
    described = json.loads(adapter.read_text(encoding="utf-8"))
    if rank is not None:
        state = of_rank(state, described["lora_alpha"] / described["r"], rank)
        described |= {"r": rank, "lora_alpha": rank}
    rounded = {
        name: value if "dms" in name.split(".") or not value.is_floating_point() else value.to(torch.bfloat16)
        for name, value in state.items()
    }
    config = AutoConfig.from_pretrained(run, trust_remote_code=False)
    described["base_model_name_or_path"] = base
    text = json.dumps(described, indent=1, sort_keys=True) + "\n"
    with replacing(out) as folder:
        save_file(rounded, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        config.save_pretrained(folder)
    return out


def merge(name: str, out: Path) -> Path:
    """Writes an adapter merged into its base as a whole checkpoint, with its processor and the code beside it.

    Args:
        name: as `load` takes it.
        out: the folder that is written.

    Raises:
        OSError: if `out` cannot be written to.
        others as `load`.
    """
    check_writable(out)
    model, processor = load(name)
    with replacing(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return out
