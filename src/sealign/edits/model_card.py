"""The model card that is written beside an edit."""

from __future__ import annotations

from pathlib import Path

from sealign.edits.record import EditRecord


def model_card(record: EditRecord) -> str:
    """Return the Markdown card of an edit: what it does, how to load it, how it was made.

    Args:
        record: the edit's record.
    """
    settings, model = record.settings, record.model
    rows = "\n".join(
        f"| {layer} | `{entry.module}` | {entry.rank_positive} | {entry.rank_negative} "
        f"| {entry.relative_change:.4f} | {entry.signature:.4g} |"
        for layer, entry in record.layers.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    base = (
        f"base_model: {model.id}\n"
        if model.id.count("/") == 1 and not model.id.startswith(".") and not Path(model.id).exists()
        else ""
    )
    return f"""---
library_name: sealign
{base}tags:
- sealign
- spectral-editing
- activation-editing
---

# Spectral edit of {model.id}

An edit of the {settings.site} outputs of {len(record.layers)} layers, made by spectral editing of activations
(Qiu et al. 2024, arXiv 2405.09719) from {record.demonstrations_count} demonstrations. It holds thin factors only;
the base model is not part of it.

## Use

```python
import sealign

model, tokenizer = sealign.load_model("{model.id}")
edit = sealign.Edit.from_pretrained("PATH OR REPOSITORY OF THIS FOLDER")
with sealign.apply_edit(model, edit):
    ...  # model.generate(...)
```

## Settings

| setting | value |
| --- | --- |
| site | {settings.site} |
| combine | {settings.combine} |
| normalization | {settings.normalization} |
| strength | {settings.strength} |
| feature map | {settings.feature_map} |
| centered | {settings.centered} |

## Layers

| layer | module | rank + | rank - | relative change | signature |
| --- | --- | --- | --- | --- | --- |
{rows}

## Provenance

| what | value |
| --- | --- |
| base model | {model.id} |
| revision | {model.revision or "not known"} |
| demonstrations | {record.demonstrations_count}, SHA-256 {record.demonstrations_hash} |
| tensors | SHA-256 {record.tensors_hash or "not saved"} |
| versions | {versions} |
"""
