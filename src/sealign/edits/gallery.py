"""The gallery: edits in model repositories of the Hugging Face Hub, found by the tag of their card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealign.edits.edit_files import read_edit_files
from sealign.edits.model_card import MEASURED
from sealign.edits.record import RECORD_NAME, EditRecord
from sealign.errors import EditFileError, first_sentence
from sealign.files import EDIT_FILES, locate_folder
from sealign.folders import new_folder
from sealign.hub import hub_access

TAG = "sealign"
"""Tag of the repositories of edits."""

MOST = 20
"""Largest number of edits that a search returns."""


@dataclass(frozen=True)
class GalleryEdit:
    """An edit of the gallery, as its card describes it.

    Attributes:
        repo_id: Repository as ``owner/name``.
        base_model: Repository of the base model; None if the card names none.
        method: Method of the edit; None if the card does not say.
        verdict: Verdict of an evaluation, such as ``"helps"``; None if there was none.
        loss_increase: Increase of the loss on neutral text in that evaluation, in nats per token.
        downloads: Number of downloads, as the Hub counts them.
    """

    repo_id: str
    base_model: str | None
    method: str | None
    verdict: str | None
    loss_increase: float | None
    downloads: int


def search_edits(query: str = "", *, base_model: str | None = None, token: str | None = None) -> list[GalleryEdit]:
    """Return edits on the Hub, the most downloaded first, at most ``MOST``.

    What their cards say is what their owners say; evaluate an edit before you rely on it.

    Args:
        query: Part of the names of repositories; all if empty.
        base_model: Repository of the base model, as ``owner/name``; any if None.
        token: Access token; that of the stored login if None.

    Raises:
        EditFileError: The Hub does not answer.
    """
    from huggingface_hub import HfApi

    wanted = [TAG] if base_model is None else [TAG, f"base_model:{base_model}"]
    try:
        with hub_access():
            found = HfApi(token=token).list_models(
                filter=wanted, search=query or None, sort="downloads", limit=MOST, cardData=True
            )
            return [_described(each) for each in found]
    except Exception as error:  # the Hub client raises many unrelated types
        raise EditFileError(
            f"the Hub cannot be searched ({type(error).__name__}); check the network and HF_HUB_OFFLINE"
        ) from error


def pull_edit(repo_id: str, folder: str | Path, *, revision: str | None = None, overwrite: bool = False) -> EditRecord:
    """Download an edit into a folder, and return its record; nothing but the files of the edit is downloaded.

    Args:
        repo_id: Repository as ``owner/name``.
        folder: Folder to write. Must be new or empty, or an edit's if ``overwrite`` is True.
        revision: Branch, tag or commit on the Hub.
        overwrite: Whether to replace an edit that is there.

    Raises:
        EditFileError: The repository cannot be downloaded or holds no valid edit, or the folder holds something.
    """
    source = locate_folder(repo_id, revision=revision)
    record, _ = read_edit_files(source)
    with new_folder(Path(folder), mark=RECORD_NAME, overwrite=overwrite, sources=[source]) as temporary:
        for name in EDIT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
    return record


def push_edit(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the edit in a folder with its card, which may show the measured effect; return the URL of the commit.

    Args:
        folder: Folder of the edit.
        repo_id: Repository as ``owner/name``; created if it does not exist.
        private: Whether a new repository is private.
        token: Access token with write permission; that of the stored login if None.

    Raises:
        EditFileError: The folder holds no valid edit, there is no token, or the Hub cannot be reached or refuses the
            upload.
    """
    from huggingface_hub import HfApi, get_token

    read_edit_files(Path(folder))
    if token is None and get_token() is None:
        raise EditFileError(
            f"the edit cannot be uploaded to '{repo_id}' without a login to the Hub; run hf auth login, or set HF_TOKEN"
        )
    api = HfApi(token=token)
    try:
        with hub_access():
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(folder),
                allow_patterns=list(EDIT_FILES),
                commit_message="Upload Sealign edit",
            )
    except Exception as error:  # the Hub client raises many unrelated types
        raise EditFileError(
            f"the edit cannot be uploaded to '{repo_id}' ({first_sentence(error)}); check the name, the login "
            "(hf auth login, or HF_TOKEN) and the network"
        ) from error
    return str(commit.commit_url)


def _described(model: Any) -> GalleryEdit:
    card: Mapping[str, Any] = {} if model.card_data is None else model.card_data.to_dict()
    measured = card.get(MEASURED)
    own = measured if isinstance(measured, Mapping) else {}
    base = card.get("base_model")
    loss = own.get("loss_increase")
    return GalleryEdit(
        repo_id=model.id,
        base_model=base if isinstance(base, str) else None,
        method=_text(own.get("method")),
        verdict=_text(own.get("verdict")),
        loss_increase=float(loss) if isinstance(loss, int | float) else None,
        downloads=model.downloads or 0,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
