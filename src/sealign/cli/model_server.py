"""The options of a command whose model runs on a server of ``sealign serve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sealign.cli import option_values
from sealign.cli.consoles import messages
from sealign.cli.loading import ModelOptions

if TYPE_CHECKING:
    from sealign.evaluation.engines import ServedEngine


def check_server(
    server: str | None,
    edits_dir: Path | None,
    methods: dict[str, str],
    model: ModelOptions,
    ignore_mismatch: bool,
    *,
    judged: bool,
    measured: bool,
) -> None:
    """Raise an error if the options of a server lack each other, or another option has no effect with a server.

    Args:
        server: Value of ``--server``.
        edits_dir: Value of ``--edits-dir``.
        methods: Values of ``--method``, by name.
        model: Options of the model.
        ignore_mismatch: Value of ``--ignore-mismatch``.
        judged: Whether a judge, which may run in this process, scores answers.
        measured: Whether a classifier, which runs in this process, measures answers.

    Raises:
        SettingError: An option lacks another, or has no effect.
    """
    from sealign.errors import SettingError

    if server is None:
        option_values.check_absent({"--edits-dir": edits_dir}, "--server, which is not given")
        return
    if edits_dir is None:
        raise SettingError(f"--server is {server}, but the folder of its edits is not given; add --edits-dir")
    here = {
        "--method": methods or None,
        "--attn-implementation": model.attn_implementation,
        "--quantization": model.quantization,
        "--ignore-mismatch": ignore_mismatch or None,
        "--dtype": None if model.dtype == "auto" or judged else model.dtype,
        "--device": None if model.device == "auto" or judged or measured else model.device,
    }
    option_values.check_absent(here, "a model in this process, but --server runs it")


def open_engine(server: str, edits_dir: Path, model: ModelOptions, batch_size: int) -> ServedEngine:
    """Return the engine of a server, after a check that it answers.

    Args:
        server: Value of ``--server``.
        edits_dir: Value of ``--edits-dir``.
        model: Options of the model, of which the configuration and the tokenizer are read.
        batch_size: Number of requests at the same time.

    Raises:
        ServingError: The server cannot be reached, or is not one of ``sealign serve``.
        ModelError: The model is not found.
    """
    from sealign.evaluation.engines import served_engine
    from sealign.evaluation.served_model import ServedModel
    from sealign.models.embedded_model import EMBEDDED

    with messages.status("Asking the server"):
        served = ServedModel(server, edits_dir, at_once=batch_size)
        name = model.name or EMBEDDED
        return served_engine(served, name, revision=model.revision, trust_remote_code=model.trust_remote_code)
