"""The card of an exported edit: what it is, where it came from, and whether it is exact."""

from __future__ import annotations

import dataclasses

from sealign.edits.edit import Edit


def export_card(edit: Edit, title: str, *, library: str | None = None, approximate: bool = False) -> str:
    """Return the text of an export's README.

    Args:
        edit: what was exported.
        title: its heading.
        library: that loads it, for the Hub.
        approximate: whether its rescaling was left out.
    """
    record = edit.record
    settings = "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(record.settings).items())
    exact = (
        "The edit's rescaling is left out: this is an approximation of it."
        if approximate and record.settings.normalization != "none"
        else "It computes exactly what the edit computes, up to rounding."
    )
    front = f"library_name: {library}\n" if library else ""
    return f"""---
{front}base_model: {record.model.id}
tags:
- sealign
---

# {title}

Fitted in closed form from {record.demonstrations_count} demonstrations, without training, by Sealign
{record.versions.get("sealign", "")} (spectral editing of activations, Qiu et al. 2024, arXiv 2405.09719). {exact}

- base model: {record.model.id}, revision {record.model.revision or "not known"}
- layers: {", ".join(map(str, edit.layers))}
{settings}
- SHA-256 of the edit: {edit.hash}
- SHA-256 of the demonstrations: {record.demonstrations_hash}
"""
