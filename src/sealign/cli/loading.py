"""``sealign baseline``: fit a method that spectral editing is compared with, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output, require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sealign.demonstrations.demonstration import Demonstration
    from sealign.edits.edit import Edit
    from sealign.methods.method import Method
    from sealign.methods.registry import Change
    from sealign.progress import Track

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method, such as heads=24 or training.rank=4. Give it several times.",
    ),
]


@app.command()
def baseline(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD", help="icl, lora_ft, iti, dola, cd, icd, best_of_n, caa or leace; see docs/methods.md."
        ),
    ],
    output_folder: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write the method to.")],
    demonstrations: Annotated[
        list[str] | None,
        typer.Option(
            "--demonstrations",
            metavar="SOURCE",
            help="As for sealign fit; dola, cd, best_of_n and icd by a prompt need none.",
        ),
    ] = None,
    settings: Settings = None,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Fit a method that spectral editing is compared with, and save it.

    What is written can be named wherever an edit can: sealign generate --edit DIR, sealign evaluate --edit DIR.
    """
    require_method_extras(method)
    import dataclasses

    from sealign.cli.display import print_json, track
    from sealign.files import cache_dir, check_folder
    from sealign.methods.registry import fit_method, method_config
    from sealign.models.embedded_model import EMBEDDED
    from sealign.models.loading import load_model

    given = parse_settings(settings or [])
    config = method_config(method, seed_setting(method, seed) | given)
    check_folder(output_folder, replaces="method.json")
    learnt = options.load_sources(demonstrations or [], data_dir, limit, seed)
    with messages.status("Loading the model"):
        loaded, tokenizer = load_model(model or EMBEDDED, dtype=dtype, device=device)
    fitted = fit_method(
        method,
        loaded,
        tokenizer,
        learnt,
        config=config,
        checkpoint_dir=training_folder(cache_dir(), method, loaded, learnt, config),
        track=track,
    )
    fitted.save_pretrained(output_folder)
    if json:
        print_json(dataclasses.asdict(fitted.record))
        return
    seconds = f"{fitted.record.fit_seconds:.1f} s"
    output.print(f"Fitted {method} in {seconds} and saved it to {output_folder}.", markup=False)
    output.print(f"Try it: sealign generate --edit {output_folder} --prompt ...", markup=False)


def require_method_extras(method: str) -> None:
    """Fail with the line that installs what a method needs."""
    needs = {"lora_ft": "peft", "icd": "peft", "iti": "sklearn", "leace": "concept_erasure"}
    if method in needs:
        require_extra("methods", needs[method])


def seed_setting(method: str, seed: int) -> dict[str, str]:
    """Return the setting of a method that takes the command's seed; none where nothing is random."""
    import dataclasses

    from sealign.methods.registry import METHODS

    known = {field.name for field in dataclasses.fields(METHODS[method][1])} if method in METHODS else set()
    return {name: str(seed) for name in ("seed", "training.seed") if name.partition(".")[0] in known}


def parse_settings(given: list[str]) -> dict[str, str]:
    """Return the settings in texts such as ``heads=24``.

    Raises:
        SettingError: a text has no name or no value.
    """
    from sealign.errors import SettingError

    found = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not (separator and name.strip() and value.strip()):
            raise SettingError(f"--set is '{text}', but it must be a name and a value, such as heads=24")
        found[name.strip()] = value.strip()
    return found


def training_folder(
    cache: Path, method: str, model: object, learnt: list[Demonstration], config: object
) -> Path | None:
    """Return where a training keeps its epochs: a folder of its own for everything that it depends on."""
    import hashlib

    from sealign.demonstrations.demonstration import demonstrations_hash
    from sealign.models.fingerprint import weights_digest

    if method not in ("lora_ft", "icd"):
        return None
    key = hashlib.sha256(weights_digest(model))  # type: ignore[arg-type]
    key.update(f"{method} {demonstrations_hash(learnt)} {config!r}".encode())
    return cache / "trainings" / key.hexdigest()[:24]


def parse_name(text: str) -> tuple[str, str]:
    """Return name and source of ``NAME=SOURCE``; the name is the last part of the path where none is given."""
    name, separator, source = text.partition("=")
    if separator and name and "/" not in name:
        return name, source
    return Path(text).resolve().name, text


def load_changes(given: list[str], strength: float | None) -> tuple[dict[str, Change], dict[str, str]]:
    """Load edits and methods by name, each edit at the strength asked for; a plus joins what is put on together.

    Raises:
        SettingError: two have one name.
    """
    from sealign.errors import SettingError
    from sealign.methods.composition import Stack

    changes: dict[str, Change] = {}
    sources: dict[str, str] = {}
    for text in given:
        name, source = parse_name(text)
        if name in changes:
            raise SettingError(f"two edits are called '{name}'; name them, as in --edit first=DIR --edit second=DIR")
        parts = [load_at_strength(part, strength) for part in source.split("+")]
        changes[name] = parts[0] if len(parts) == 1 else Stack(parts)
        sources[name] = source
    return changes, sources


def load_at_strength(source: str, strength: float | None) -> Edit | Method:
    """Load an edit, at a strength in place of its own, or a method, which has none.

    Raises:
        SettingError: a strength is given for a method.
    """
    from sealign.edits.edit import Edit
    from sealign.errors import SettingError
    from sealign.methods.registry import load_change

    loaded = load_change(source)
    if isinstance(loaded, Edit):
        return loaded.with_settings(strength=strength)
    if strength is not None:
        raise SettingError(
            f"strength is {strength}, but only spectral edits have one, and '{source}' is none; leave it out"
        )
    return loaded


def fit_methods(
    given: list[str],
    taken: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    learnt: list[Demonstration],
    folder: Path,
    track: Track,
) -> dict[str, Change]:
    """Fit methods by name, or read them where an earlier run of the same command has fitted them.

    Raises:
        SettingError: a method is unknown, or two have one name.
    """
    from sealign.demonstrations.demonstration import demonstrations_hash
    from sealign.errors import SettingError
    from sealign.methods.registry import METHODS, fit_method, load_change, method_config

    found: dict[str, Change] = {}
    for text in given:
        name, method = parse_name(text)
        if name in taken or name in found:
            raise SettingError(f"two edits or methods are called '{name}'; name them, as in --method first={method}")
        config = method_config(method)
        learns = METHODS[method][0].needs_demonstrations(config)
        kept = folder / "methods" / (f"{name}-{demonstrations_hash(learnt)[:12]}" if learns else name)
        if not (kept / "method.json").is_file():
            training = training_folder(folder / "trainings", method, model, learnt, config)
            fitted = fit_method(method, model, tokenizer, learnt, config=config, checkpoint_dir=training, track=track)
            fitted.save_pretrained(kept)
        found[name] = load_change(kept)
    return found
