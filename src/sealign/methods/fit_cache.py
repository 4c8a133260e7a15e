"""Fitted methods that are kept in a folder, so that the same fit is not run twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.edits.intervention import Intervention
from sealign.edits.record import FORMAT_VERSION, RECORD_NAME
from sealign.methods.registry import check_fit, fit_edit, load_edit
from sealign.models.fingerprint import model_fingerprint
from sealign.models.weights import weights_digest
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fit_or_load(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: Config,
    folder: Path,
    track: Track = no_progress,
) -> Intervention:
    """Fit a method and keep it in a folder, or load it if the same fit is there.

    A fit is the same if its method, its settings, its demonstrations and its model are the same.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        demonstrations: As for ``fit_edit``.
        config: Configuration of the method.
        folder: Folder of all fits; those that were killed continue from their checkpoints in it.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        DemonstrationError, SettingError: As for ``fit_edit``.
    """
    method, used = check_fit(config, demonstrations)
    key = hashlib.sha256(weights_digest(model))
    key.update(
        json.dumps([FORMAT_VERSION, method.name, config.dump(), model_fingerprint(model)], sort_keys=True).encode()
    )
    if method.needs_demonstrations(config):
        key.update(demonstrations_hash(used).encode())
    kept = folder / f"{method.name}-{key.hexdigest()[:12]}"
    if not (kept / RECORD_NAME).is_file():
        fitted = fit_edit(model, tokenizer, used, config=config, checkpoint_dir=folder / "checkpoints", track=track)
        fitted.save_pretrained(kept, overwrite=True)  # another process may have finished the same fit
    return load_edit(kept)
