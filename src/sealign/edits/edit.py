"""Edit: the edit of a model, saved to and loaded from a folder or the Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sealign.edits.model_card import model_card
from sealign.edits.record import EditRecord, EditSettings, dump_record, parse_record
from sealign.errors import EditFileError, SettingError, SiteError
from sealign.files import (
    CARD_NAME,
    CONFIG_NAME,
    TENSORS_NAME,
    locate_folder,
    new_folder,
    read_tensors,
    tensors_hash,
    write_tensors,
)
from sealign.models.sites import SITES
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.projection import (
    COMBINES,
    NORMALIZATIONS,
    Combine,
    Normalization,
    Projection,
    check_choice,
    check_strength,
)


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a model: a projection for each edited layer, and the record of how it was made.

    Attributes:
        projections: by layer index.
        record: settings, layers, base model, provenance; the contents of ``edit.json``.
    """

    projections: Mapping[int, Projection]
    record: EditRecord

    @property
    def layers(self) -> list[int]:
        """Indices of the edited layers, rising."""
        return sorted(self.projections)

    @property
    def settings(self) -> EditSettings:
        """Site, combination, normalization, strength, feature map and centring."""
        return self.record.settings

    @property
    def modules(self) -> list[str]:
        """Dotted paths of the modules whose outputs are edited, by rising layer."""
        return [self.record.layers[str(layer)].module for layer in self.layers]

    @property
    def hash(self) -> str:
        """SHA-256 of the factors and of the settings that they are applied with."""
        settings = dataclasses.asdict(self.settings)
        return tensors_hash(self._tensors() | {f"settings {settings} {self.modules}": torch.zeros(0)})

    def with_settings(
        self,
        *,
        combine: Combine | None = None,
        normalization: Normalization | None = None,
        strength: float | None = None,
    ) -> Edit:
        """Return the same projections with other settings; those not given stay.

        Raises:
            SettingError: an unknown combination or normalization.
        """
        number = None if strength is None else float(strength)  # 1 and 1.0 are one edit, with one hash
        given = {"combine": combine, "normalization": normalization, "strength": number}
        changed = {name: value for name, value in given.items() if value is not None}
        settings = dataclasses.replace(self.settings, **changed)  # type: ignore[arg-type]
        check_settings(settings)
        return dataclasses.replace(self, record=dataclasses.replace(self.record, settings=settings))

    def with_layers(self, layers: Sequence[int]) -> Edit:
        """Return the edit of some of its layers only.

        Raises:
            SiteError: none is named, or one is not in the edit.
        """
        if not layers:
            raise SiteError(f"no layers are named, but an edit needs at least 1; it has layers {self.layers}")
        missing = [layer for layer in layers if layer not in self.projections]
        if missing:
            raise SiteError(f"layers {missing} are not in the edit, which has layers {self.layers}")
        kept = {str(layer): self.record.layers[str(layer)] for layer in sorted(layers)}
        record = dataclasses.replace(self.record, layers=kept)
        return Edit({layer: self.projections[layer] for layer in sorted(layers)}, record)

    def randomized(self, seed: int) -> Edit:
        """Return the same edit with random orthonormal directions of the same ranks, as a control.

        Args:
            seed: of the directions; each layer draws its own from it.
        """
        randomized = {
            layer: projection.randomized(seed * 100_003 + layer) for layer, projection in self.projections.items()
        }
        return dataclasses.replace(self, projections=randomized)

    def reversed(self) -> Edit:
        """Return the same edit with the roles of positive and negative swapped, as a control."""
        projections = {layer: projection.reversed() for layer, projection in self.projections.items()}
        layers = {
            layer: dataclasses.replace(
                entry,
                rank_positive=entry.rank_negative,
                rank_negative=entry.rank_positive,
                explained_variance_positive=entry.explained_variance_negative,
                explained_variance_negative=entry.explained_variance_positive,
                energy_positive=entry.energy_negative,
                energy_negative=entry.energy_positive,
            )
            for layer, entry in self.record.layers.items()
        }
        return Edit(projections, dataclasses.replace(self.record, layers=layers))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the edit to a folder: ``edit.json``, ``edit.safetensors`` and a model card.

        The folder appears whole or not at all; an edit that is already there is replaced.

        Raises:
            EditFileError: the folder holds something else.
            OSError: the disk is full or not writable.
        """
        tensors = self._tensors()
        record = dataclasses.replace(self.record, tensors_hash=tensors_hash(tensors))
        with new_folder(Path(folder), replaces=CONFIG_NAME) as temporary:
            write_tensors(temporary / TENSORS_NAME, tensors)
            (temporary / CONFIG_NAME).write_text(dump_record(record), encoding="utf-8")
            (temporary / CARD_NAME).write_text(model_card(record), encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the edit to a model repository of the Hugging Face Hub, and return the commit's address.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            private: whether a new repository is private.
            token: of an account that may write there; the stored login if None.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary) / "edit")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=Path(temporary) / "edit", commit_message="Upload Sealign edit"
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(cls, folder_or_repo_id: str | Path, *, revision: str | None = None) -> Edit:
        """Load an edit from a local folder or a repository of the Hugging Face Hub, checking all of it.

        Args:
            folder_or_repo_id: a folder, or ``owner/name``.
            revision: branch, tag or commit of the repository.

        Raises:
            EditFileError: missing, truncated, corrupted, of a newer format, with unknown keys, or with
                tensors that do not fit the record.
        """
        folder = locate_folder(folder_or_repo_id, revision=revision)
        config = folder / CONFIG_NAME
        if not config.is_file():
            raise EditFileError(f"'{folder}' has no {CONFIG_NAME}, so it is not an edit; check the path")
        record = parse_record(config.read_text(encoding="utf-8", errors="replace"), str(config))
        _check_record(record, str(config))
        tensors = read_tensors(folder / TENSORS_NAME)
        if tensors_hash(tensors) != record.tensors_hash:
            raise EditFileError(
                f"the tensors of '{folder}' do not match their hash in {CONFIG_NAME}; copy or download the edit again"
            )
        _check_names(tensors, record, str(folder))
        projections = {int(layer): _read_projection(tensors, layer, record, str(folder)) for layer in record.layers}
        return cls(projections, record)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for layer, projection in self.projections.items():
            named = {
                "positive": projection.positive,
                "negative": projection.negative,
                "mean": projection.mean,
                "singular_values_positive": projection.singular_values_positive,
                "singular_values_negative": projection.singular_values_negative,
            }
            tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in named.items() if tensor is not None}
        return tensors


def check_settings(settings: EditSettings) -> None:
    """Raise where a setting of an edit is unknown or out of range.

    Raises:
        SettingError: names the setting.
    """
    check_choice("site", settings.site, SITES)
    check_choice("combination", settings.combine, COMBINES)
    check_choice("normalization", settings.normalization, NORMALIZATIONS)
    get_feature_map(settings.feature_map)
    check_strength(settings.strength)


def _check_record(record: EditRecord, place: str) -> None:
    try:
        check_settings(record.settings)
    except SettingError as error:
        raise EditFileError(f"'{place}': {error}") from error
    if not record.layers:
        raise EditFileError(f"'{place}' has no layers, but an edit needs at least 1; copy or download it again")
    bad = [layer for layer in record.layers if not layer.isdecimal() or str(int(layer)) != layer]
    if bad:
        raise EditFileError(f"'{place}': layer {bad[0]!r} is not a whole number")


def _check_names(tensors: Mapping[str, Tensor], record: EditRecord, place: str) -> None:
    names = ["positive", "negative", "singular_values_positive", "singular_values_negative"]
    names += ["mean"] if record.settings.centered else []
    expected = {f"layers.{layer}.{name}" for layer in record.layers for name in names}
    missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or extra:
        raise EditFileError(
            f"'{place}': tensors that are missing: {missing or 'none'}, that are not in the record: {extra or 'none'}; "
            "copy or download the edit again"
        )


def _read_projection(tensors: Mapping[str, Tensor], layer: str, record: EditRecord, place: str) -> Projection:
    """Return one layer's projection after checking shapes, types and finiteness."""
    entry = record.layers[layer]
    prefix = f"layers.{layer}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    width = found["positive"].shape[0] if found["positive"].dim() else 0
    shapes = {
        "positive": (width, entry.rank_positive),
        "negative": (width, entry.rank_negative),
        "mean": (width,),
        # At least the kept ones; more may be known.
        "singular_values_positive": (max(found["singular_values_positive"].numel(), entry.rank_positive),),
        "singular_values_negative": (max(found["singular_values_negative"].numel(), entry.rank_negative),),
    }
    for name, wanted in shapes.items():
        tensor = found.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise EditFileError(f"'{place}': tensor {prefix}{name} is {tuple(tensor.shape)}, but must be {wanted}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise EditFileError(f"'{place}': tensor {prefix}{name} holds NaN, infinity or no floating-point numbers")
    return Projection(
        found["positive"],
        found["negative"],
        found.get("mean"),
        record.settings.feature_map,
        found["singular_values_positive"],
        found["singular_values_negative"],
        entry.energy_positive,
        entry.energy_negative,
    )
