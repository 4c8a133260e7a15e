"""The model card that is written beside an exported edit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sealign.edits.edit import Edit

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def export_card(edit: Edit, form: str, *, library: str | None = None, approximate: bool = False) -> ModelCard:
    """Return the model card of an exported edit.

    Args:
        edit: The edit that was exported.
        form: Name of the form that it was exported in, such as ``LoRA adapter``.
        library: Name of the library that loads the export, for the Hub.
        approximate: Whether a rescaling, if the edit has one, was left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    record = edit.record
    model = record.model
    exact = (
        "The edit's rescaling is left out, so it approximates the edit."
        if approximate and edit.normalization != "none"
        else "It computes what the edit computes, up to rounding."
    )
    listed = ("site", "layers", "strength")  # given above, as they are in the edit
    settings = "\n".join(f"- {name}: {value}" for name, value in record.settings.items() if name not in listed)
    data = ModelCardData(base_model=model.id, library_name=library, tags=["sealign"])
    return ModelCard(f"""---
{data.to_yaml()}
---

# {form} of a {edit.method} edit of {model.id}

Fitted from {record.demonstrations_count} demonstrations, without training, by Sealign
{record.versions.get("sealign", "")}. {exact}

- base model: {model.id}, revision {model.revision or "not known"}
- site: {edit.site}
- layers: {", ".join(map(str, edit.layers))}
- strength: {edit.strength:g}
- SHA-256 of the edit: {edit.hash}
- SHA-256 of the demonstrations: {record.demonstrations_hash or "none"}

## Settings of the method

{settings}
""")
