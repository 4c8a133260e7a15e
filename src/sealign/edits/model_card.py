"""The model card that is written beside an edit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sealign.edits.record import EditRecord


def model_card(record: EditRecord) -> str:
    """Return the Markdown card of an edit: what it does, how to load it, how it was made.

    Args:
        record: Record of the edit.
    """
    model = record.model
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
- activation-editing
- {record.method.replace("_", "-")}
---

# {record.method} edit of {model.id}

{_summary(record)} The base model is not part of it.

## Use

```python
import sealign

model, tokenizer = sealign.load_model("{model.id}")
edit = sealign.load_edit("PATH OR REPOSITORY OF THIS FOLDER")
with sealign.apply_edit(model, edit):
    ...  # model.generate(...)
```

## Settings

{_table(("setting", "value"), _settings(record))}
{_layers(record)}
## Provenance

| what | value |
| --- | --- |
| base model | {model.id} |
| revision | {model.revision or "not known"} |
| demonstrations | {record.demonstrations_count}, SHA-256 {record.demonstrations_hash or "none"} |
| tensors | SHA-256 {record.tensors_hash} |
| versions | {versions} |
"""


def _summary(record: EditRecord) -> str:
    source = f"fitted with the method {record.method} from {record.demonstrations_count} demonstrations"
    if record.site is None:
        return f"An intervention {source}."
    kind = "low-rank affine" if record.feature_map == "identity" else record.feature_map
    return f"A {kind} edit of the {record.site} outputs of {len(record.layers)} layers, {source}."


def _settings(record: EditRecord) -> Mapping[str, Any]:
    shown = {"method": record.method}
    if record.site is not None:
        shown |= {"site": record.site, "normalization": record.normalization, "feature_map": record.feature_map}
    if record.strength is not None:
        shown["strength"] = f"{record.strength:g}"
    return {**shown, **{name: value for name, value in record.settings.items() if name not in shown}}


def _layers(record: EditRecord) -> str:
    if not record.layers:
        return ""
    names = list(dict.fromkeys(name for entry in record.layers.values() for name in entry.statistics))
    header = ("layer", "module", "rank", "relative change", *(name.replace("_", " ") for name in names))
    rows = [
        "| " + " | ".join([
            layer, f"`{entry.module}`", str(entry.rank), f"{entry.relative_change:.4f}",
            *(f"{entry.statistics[name]:.4g}" if name in entry.statistics else "" for name in names),
        ]) + " |"
        for layer, entry in record.layers.items()
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *rows]
    return "\n## Layers\n\n" + "\n".join(lines) + "\n"


def _table(header: tuple[str, str], values: Mapping[str, Any]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    for name, value in values.items():
        text = str(value).replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {name.replace('_', ' ')} | {text if len(text) <= 200 else text[:197] + '...'} |")
    return "\n".join(lines) + "\n"
