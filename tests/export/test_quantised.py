"""LoRA exports of edits of quantised base models, in the environment that has the libraries of quantisation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.edit_server import engine_command

pytestmark = [pytest.mark.engines, pytest.mark.slow]


@pytest.mark.parametrize("name", ["torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit"])
def test_the_adapter_does_on_the_quantised_base_what_the_hooks_do(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "quantised_lora.py"
    command = [engine_command("python"), str(script), name, str(tmp_path / "adapter")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["passed"], found
    assert found["applied"] == pytest.approx(1.0, abs=0.03)
    assert found["mean"] < 0.05 * found["effect"]
    assert found["unchanged"], "reading weights back must leave the model as it is"
    assert found["weight"] != "Parameter", "the model is not quantised"
