"""Compare the throughput of ``sealign serve`` with that of stock vLLM on the same machine and load, in turns.

    python benchmarks/serving.py [--rounds 5] [--requests 32] [--concurrency 8] [--json FILE]

Two servers run at a time, of which one gets requests. Edits that the plug-in serves are compared with stock vLLM as it
starts by default, compiled; LoRAs with stock vLLM and --enforce-eager, since vLLM on a CPU compiles no model that has
LoRAs. A round sends the same prompts, of random tokens that no cache holds, to every arm; ratios are formed within a
round. Needs ``make engines-env``; all requests stay on loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table

import sealign
from sealign import SEAConfig
from sealign.models.loading import checkpoint_folder

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin"
EDITS = {
    "rescaled": SEAConfig(layers="all", explained_variance=0.9, centered=True, strength=0.25),
    "reversed": SEAConfig(layers="all", explained_variance=0.9, centered=True, strength=0.25, combine="reversed"),
    "uncentred": SEAConfig(layers="last:21/32"),
    "positive": SEAConfig(layers="last:10", rank=16, combine="positive", strength=0.1),
    "lora": SEAConfig(layers="all", rank=(8, 8), normalization="none", strength=0.25),
}


def fit_edits(folder: Path) -> None:
    """Fit the edits on the embedded model and save them."""
    model, tokenizer = sealign.load_model("smollm2")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=40)
    for name, config in EDITS.items():
        sealign.fit_edit(model, tokenizer, demonstrations, config=config).save_pretrained(folder / name)


@contextmanager
def server(command: Sequence[str], options: argparse.Namespace, log: Path) -> Iterator[str]:
    """Start a server, and yield its URL when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype, "--max-model-len", "1024"]
    more += ["--served-model-name", "base"] if "sealign" not in command[0] else []
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([*command, *more], env=variables, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            try:
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def run(url: str, edits: Sequence[str | None], prompts: list[list[int]], options: argparse.Namespace) -> float:
    """Return the throughput of one load in output tokens per second; request i names edit i mod n."""
    model = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]

    def ask(number: int) -> int:
        edit = edits[number % len(edits)]
        body: dict[str, Any] = {"model": model, "prompt": prompts[number], "max_tokens": options.new_tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        if edit is not None:
            body["vllm_xargs"] = {"sealign_edit": edit}
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    with ThreadPoolExecutor(options.concurrency) as pool:
        started = time.perf_counter()
        tokens = sum(pool.map(ask, range(len(prompts))))
        return tokens / (time.perf_counter() - started)


def compare(
    stock: Sequence[str], served: Sequence[str], arms: dict[str, Sequence[str]], options: argparse.Namespace, logs: Path
) -> dict[str, list[float]]:
    """Return output tokens per second by arm and round; two servers run, and take turns."""
    source = random.Random(0)
    found: dict[str, list[float]] = {"stock": [], "plain": [], **{arm: [] for arm in arms}}
    with ExitStack() as stack:
        first = stack.enter_context(server(stock, options, logs / "stock.log"))
        second = stack.enter_context(server(served, options, logs / "served.log"))
        for number in range(-1, options.rounds):  # the first round warms up
            plans = [("stock", first, [None]), ("plain", second, [None])]
            plans += [(arm, second, list(names)) for arm, names in arms.items()]
            source.shuffle(plans)
            lengths = [options.prompt_tokens + source.randrange(-16, 17) for _ in range(options.requests)]
            base = [[source.randrange(1000, 40000) for _ in range(length)] for length in lengths]
            for shift, (arm, url, edits) in enumerate(plans):
                # Another first token for each arm, so that none reads what another one stored.
                prompts = [[2000 + shift, *ids[1:]] for ids in base]
                speed = run(url, edits, prompts, options)
                if number >= 0:
                    found[arm].append(speed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=["plugin", "lora"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    results["load"] = {key: value for key, value in vars(options).items() if key not in ("json", "only")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fit_edits(folder)
        base = [str(ENVIRONMENT / "python"), "-m", "vllm.entrypoints.launchers.api_server.entry"]
        base += ["--model", str(checkpoint_folder("smollm2"))]
        names = [name for name in EDITS if name != "lora"]
        slots = [str(ENVIRONMENT / "sealign"), "serve", *(f"--edit={name}={folder / name}" for name in names)]
        lora = [str(ENVIRONMENT / "sealign"), "serve", f"--edit=lora={folder / 'lora'}"]
        if options.only != "lora":
            arms = {"one edit": ["rescaled"], "four edits mixed": names, "half edited": ["rescaled", None]}
            results["plugin"] = compare(base, slots, arms, options, folder)
            show("plugin", results)
        if options.only != "plugin":
            results["lora"] = compare([*base, "--enforce-eager"], lora, {"one edit": ["lora"]}, options, folder)
            show("lora", results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def show(route: str, results: dict[str, Any]) -> None:
    """Print medians and ratios."""
    table = Table("requests", "tokens/s", "of stock vLLM", "lowest to highest", title=route, box=None)
    for arm, speeds in results[route].items():
        ratios = [speed / stock for speed, stock in zip(speeds, results[route]["stock"], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(arm, f"{statistics.median(speeds):.1f}", f"{statistics.median(ratios):.3f}", spread)
    load = results["load"]
    table.caption = (
        f"{load['requests']} requests of {load['prompt_tokens']} +- 16 prompt and {load['new_tokens']} new tokens, "
        f"{load['concurrency']} at a time, {load['rounds']} rounds, {load['dtype']}, {results['cores']} cores"
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
