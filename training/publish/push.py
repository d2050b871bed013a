"""`dms push`: a folder to the Hugging Face Hub."""

import json
import logging
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from modeling_dms.auto import class_of
from modeling_dms.save.export import auto_map, export_code
from modeling_dms.training.publish.card import (
    CARD,
    LISTS,
    Checkpoint,
    generate,
    is_generated,
    is_hub_id,
    is_made_here,
    merged,
    own_text,
)


logger = logging.getLogger(__name__)

# what Trainer leaves beside a model, which is for resuming, and unsafe to load
PICKLES = (".bin", ".pt", ".pth")


def push(folder: Path, repo: str, private: bool | None = False, token: str | None = None) -> str:
    """Uploads a checkpoint or an adapter with its processor, code and card, all in one commit. The folder stays as it
    is.

    A folder without a card gets one. Text of a user's own is kept: the folder's, if it has any, else that of the card
    on the Hub. Metadata of both are joined, where they differ the folder's card counts.

    Args:
        folder: files in it are uploaded, but for pickles; folders in it are not.
        repo: `owner/name`, created where there is none.
        private: of a new one; `None` leaves it to the owner's settings.
        token: by default that of `hf auth login` or HF_TOKEN.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder holds no checkpoint, or the Hub refuses a card's metadata.
        ConnectionError: without a token, or if the Hub cannot be reached or refuses; nothing is committed then.
    """
    checkpoint = Checkpoint.read(folder)
    if (token or get_token()) is None:
        raise ConnectionError("pushing needs a token: run `hf auth login`, or set HF_TOKEN")
    files = {
        path.name: path.read_bytes() if path.name == CARD else path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in PICKLES and not path.name.startswith(".")
    }
    described = checkpoint.adapter or {}
    base = described.get("base_model_name_or_path")
    if base is not None and (named := published_base(base)) != base:
        content = json.dumps({**described, "base_model_name_or_path": named}, indent=2)
        files["adapter_config.json"] = content.encode()
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as made:
        is_whole = checkpoint.adapter is None and checkpoint.model_type.startswith("dms_")
        if is_whole and not hasattr(checkpoint.config, "auto_map"):
            files |= {path.name: path for path in _with_code(checkpoint, Path(made))}
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            files[CARD] = str(card_for(folder, repo, _published(api, repo))).encode()
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]
            return api.create_commit(repo, additions, commit_message="Upload model").commit_url
        except (HTTPError, RuntimeError) as error:  # an upload within a thread raises the latter
            raise ConnectionError(f"nothing was pushed to {repo}, {api.endpoint} says: {error}") from error


def published_base(base: str) -> str:
    """What an adapter's base is called on any machine: a checkpoint that this package makes or ships by its name,
    wherever it lies here. Of another folder it is told that others do not have it."""
    if is_made_here(Path(base).name):
        return Path(base).name
    if not is_hub_id(base):
        logger.warning(
            f"the adapter is built on the folder {base}: elsewhere that is nothing, or somebody else's repository of "
            "that name; `dms merge` makes a whole checkpoint of both, which loads anywhere"
        )
    return base


def _with_code(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """The configuration and the code of a checkpoint that was saved without."""
    model_class, config = class_of(checkpoint.config), checkpoint.config
    config.auto_map = auto_map(model_class, type(config), model_class._auto_map_name)
    config.save_pretrained(folder)
    return [folder / "config.json", *export_code(model_class, type(config), folder)]


def _published(api: HfApi, repo: str) -> ModelCard | None:
    """The card on the Hub."""
    try:
        return ModelCard(
            Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8"), ignore_metadata_errors=True
        )
    except EntryNotFoundError:
        return None
    except yaml.YAMLError as error:
        raise ValueError(f"the card of {repo} on the Hub cannot be read: {error}") from error


def card_for(folder: Path, repo: str, published: ModelCard | None) -> ModelCard:
    """The card that is pushed, see [`push`]."""
    path = folder / CARD
    card = ModelCard.load(path) if path.exists() else None
    if card is None or not is_generated(card):
        made = generate(folder, [], [], repo.split("/")[-1])
        card = made if card is None else merged(card, made)
    if published is None:
        return card
    joined = merged(published, card)
    if own_text(card).strip():
        joined.text = card.text
    if path.exists():
        for key, value in card.data.to_dict().items():
            if key not in (*LISTS, "model-index"):
                joined.data[key] = value
    return joined
