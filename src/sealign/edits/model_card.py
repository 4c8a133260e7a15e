"""The model card that is written beside an edit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sealign.edits.record import EditRecord

_CARD = """---
{metadata}
---

# {method} edit of {model}

{summary} The base model is not part of it.

## Use

```python
import sealign

model, tokenizer = sealign.load_model({quoted_model})
edit = sealign.load_edit("PATH OR REPOSITORY OF THIS FOLDER")
with sealign.apply_edit(model, edit):
    ...  # model.generate(...)
```

## Effect

{effect}

## Settings

{settings}
{layers}
## Provenance

{provenance}
"""


NOT_EVALUATED = """Not evaluated. Measure what the edit gains and what it costs with:

```sh
sealign evaluate --edit PATH --demonstrations SOURCE --output RESULTS
```"""
"""Section on the effect of an edit that was not evaluated."""

MEASURED = "sealign"
"""Name of the card's metadata on the method and, after an evaluation, on its verdict."""

_FACTS = re.compile(rf"^{MEASURED}:\n(?:  .*\n)+", re.MULTILINE)

_EFFECT = re.compile(r"(?<=^## Effect\n\n).*?(?=\n\n## )", re.DOTALL | re.MULTILINE)


def model_card(record: EditRecord) -> str:
    """Return the Markdown card of an edit: what it does, how to load it, how it was made.

    The section on the effect says that the edit was not evaluated; see ``show_effect``.

    Args:
        record: Record of the edit.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name="sealign",
        base_model=record.model.id if _is_repository(record.model.id) else None,
        tags=["sealign", "activation-editing", record.method.replace("_", "-")],
        sealign={"method": record.method},
    )
    return _CARD.format(
        metadata=metadata.to_yaml(),
        method=record.method,
        model=record.model.id,
        quoted_model=json.dumps(record.model.id)
        + (f', revision="{record.model.revision}"' if record.model.revision else ""),
        summary=_summary(record),
        effect=NOT_EVALUATED,
        settings=markdown_table(("setting", "value"), _settings(record).items()),
        layers=_layers(record),
        provenance=markdown_table(("what", "value"), _provenance(record).items()),
    )


def show_effect(card: str, effect: str, *, verdict: str, loss_increase: float) -> str:
    """Return the card of an edit with its measured effect, in the section on it and in the metadata.

    Args:
        card: Card of the edit; a card without a section "Effect" stays as it is.
        effect: Markdown without headings.
        verdict: Verdict of the evaluation.
        loss_increase: Increase of the loss on neutral text, in nats per token.
    """
    import yaml

    def with_verdict(found: re.Match[str]) -> str:
        facts = yaml.safe_load(found[0])[MEASURED] | {"verdict": verdict, "loss_increase": round(loss_increase, 4)}
        return str(yaml.safe_dump({MEASURED: facts}, sort_keys=False))

    if _EFFECT.search(card) is None:
        return card
    return _FACTS.sub(with_verdict, _EFFECT.sub(lambda _: effect, card, count=1), count=1)


def shown_effect(card: str) -> str:
    """Return the section of a card on the measured effect; empty if there is none.

    Args:
        card: Card of an edit.
    """
    found = _EFFECT.search(card)
    return "" if found is None else found[0]


def _is_repository(name: str) -> bool:
    """Return whether the name of a model has the form of a Hub repository; it may also be a path or an alias."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _summary(record: EditRecord) -> str:
    source = f"fitted with the method {record.method} from {record.demonstrations_count} demonstrations"
    if record.site is None:
        return f"An intervention {source}."
    kind = "low-rank affine" if record.feature_map == "identity" else record.feature_map
    gate = " It acts only on tokens that a probe selects." if record.config.get("gate") is not None else ""
    return f"A {kind} edit of the {record.site} outputs of {len(record.layers)} layers, {source}.{gate}"


def _settings(record: EditRecord) -> dict[str, Any]:
    shown: dict[str, Any] = {"method": record.method}
    if record.site is not None:
        shown |= {"site": record.site, "normalization": record.normalization, "feature_map": record.feature_map}
    if record.strength is not None:
        shown["strength"] = f"{record.strength:g}"
    return shown | {name: value for name, value in _flat(record.settings).items() if name not in shown}


def _flat(settings: Mapping[str, Any], outer: str = "") -> dict[str, Any]:
    """Return settings by dotted name; those that are not set, or empty, are said to be so."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{outer}{name}.")
        else:
            found[f"{outer}{name}"] = "not set" if value is None or value == {} else value
    return found


def _provenance(record: EditRecord) -> Mapping[str, Any]:
    demonstrations = f"{record.demonstrations_count}, SHA-256 {record.demonstrations_hash}"
    holdout = record.holdout
    return {
        "base model": record.model.id,
        "revision": record.model.revision or "not known",
        "demonstrations": demonstrations if record.demonstrations_hash else "none",
        "held out": f"{holdout.fraction:.0%} of the prompts, seed {holdout.seed}" if holdout else "none",
        "tensors": f"SHA-256 {record.tensors_hash}",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }


def _layers(record: EditRecord) -> str:
    if not record.layers:
        return ""
    names = list(dict.fromkeys(name for entry in record.layers.values() for name in entry.statistics))
    rows = []
    for layer, entry in record.layers.items():
        figures = [f"{entry.statistics[name]:.4g}" if name in entry.statistics else "" for name in names]
        rows.append((layer, f"`{entry.module}`", entry.rank_text, f"{entry.relative_change:.4f}", *figures))
    return f"\n## Layers\n\n{markdown_table(('layer', 'module', 'rank', 'relative change', *names), rows)}\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; underscores of names in the header and the first column become spaces.

    Args:
        header: Names of the columns.
        rows: Cells of each row.
    """
    lines = ["| " + " | ".join(name.replace("_", " ") for name in header) + " |", "|" + " --- |" * len(header)]
    for name, *values in rows:
        lines.append("| " + " | ".join((str(name).replace("_", " "), *map(_cell, values))) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Return a value as the text of a cell, on one line of at most 200 characters."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 200 else text[:197] + "..."
