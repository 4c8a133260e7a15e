"""Requests of the harness, scored as the harness's own model scores them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import sealign
from tests.tiny_models import build_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONTEXTS = ["The town lies by the river and", "Ask the clerk:", "The town lies by the river and the hills"]
CONTINUATIONS = [" the baker", " the", " a form and then another", " rises in the night"]


def _requests(kind: str = "loglikelihood") -> list[Any]:
    from lm_eval.api.instance import Instance

    if kind == "loglikelihood":
        rows: list[Any] = [(context, text) for context in CONTEXTS for text in CONTINUATIONS]
    else:
        rows = [(context, {"until": ["."], "max_gen_toks": 6, "do_sample": False}) for context in CONTEXTS]
    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


@pytest.fixture
def harness_model(llama: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=3)


def _sealign_model(llama: Any, tokenizer: Any, **kwargs: Any) -> Any:
    from sealign.evaluation.harness import SealignLM

    return SealignLM(llama, tokenizer=tokenizer, batch_size=3, **kwargs)


def _close(found: list[Any], expected: list[Any]) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_base_model_scores_as_the_harness_does(llama: Any, tokenizer: Any, harness_model: Any) -> None:
    _close(_sealign_model(llama, tokenizer).loglikelihood(_requests()), harness_model.loglikelihood(_requests()))


@pytest.mark.parametrize("normalization", ["token", "feature"])
def test_edited_model_scores_as_the_harness_does(
    normalization: Any, llama: Any, tokenizer: Any, harness_model: Any, small_edit: sealign.Edit
) -> None:
    from lm_eval.models.huggingface import HFLM

    edit = small_edit.with_normalization(normalization)
    ours = _sealign_model(llama, tokenizer, edit=edit)
    found = ours.loglikelihood(_requests())
    ours.close()
    base = harness_model.loglikelihood(_requests())
    with sealign.apply_edit(llama, edit):
        plain = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1)
        _close(found, plain.loglikelihood(_requests()))
    assert max(abs(a[0] - b[0]) for a, b in zip(found, base, strict=True)) > 0.05


@pytest.mark.parametrize("normalization", ["token", "feature"])
def test_generation(normalization: Any, llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    edit = small_edit.with_normalization(normalization)
    ours = _sealign_model(llama, tokenizer, edit=edit)
    texts = ours.generate_until(_requests("generate_until"))
    for context, text in zip(CONTEXTS, texts, strict=True):
        ids = torch.tensor([tokenizer.encode(context)])
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=False
        )
        assert tokenizer.decode(out[0, ids.shape[1] :]).split(".")[0] == text
    ours.close()


BEGINNING = "The town lies by the river and the hills, and the baker opens his shop early in the morning. "


@pytest.mark.parametrize("name", ["none", "edit", "best_of_n", "icd"])
def test_the_common_prefix_of_prompts_runs_once_for_generation(
    name: str, llama: Any, tokenizer: Any, small_edit: sealign.Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sealign.evaluation import harness

    edits: dict[str, Callable[[], sealign.Intervention | None]] = {
        "none": lambda: None,
        "edit": lambda: small_edit,
        "best_of_n": lambda: sealign.fit_edit(llama, tokenizer, config=sealign.BestOfNConfig()),
        "icd": lambda: sealign.fit_edit(llama, tokenizer, config=sealign.ICDConfig(induce="prompt")),
    }
    fitted = edits[name]()
    requests = _requests("generate_until")
    for request in requests:
        request.arguments = (BEGINNING + request.args[0], request.args[1])

    def run() -> tuple[list[str], int]:
        tokens: list[int] = []
        ours = _sealign_model(llama, tokenizer, edit=fitted)
        hook = llama.model.register_forward_pre_hook(
            lambda _module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        texts = ours.generate_until(requests)
        hook.remove()
        ours.close()
        return texts, sum(tokens)

    texts, tokens = run()
    monkeypatch.setattr(harness, "share_prefix", lambda *_: None)
    expected, without = run()
    assert texts == expected
    assert tokens == without if name == "icd" else tokens < without


def test_a_journal_saves_recomputation(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    first = _sealign_model(llama, tokenizer, journal=path).loglikelihood(_requests())
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = _sealign_model(llama, tokenizer, journal=path).loglikelihood(_requests())
    hook.remove()
    assert again == first
    assert calls == []


def test_the_edit_is_in_the_model_info(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    ours = _sealign_model(llama, tokenizer, edit=small_edit, strength=0.3)
    info = ours.get_model_info()
    ours.close()
    assert info["sealign_edit_hash"] == small_edit.with_strength(0.3).hash
    assert info["sealign_edit_strength"] == 0.3
    assert info["sealign_edited_modules"] == small_edit.modules


def test_from_the_harness_entry_points(tokenizer: Any, small_edit: sealign.Edit, tmp_path: Path) -> None:
    """Run a task by the command line of the harness, with model and edit given as folders."""
    import subprocess
    import sys

    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small_edit.save_pretrained(tmp_path / "edit")
    rows = [
        {"question": "What is ice?", "choices": ["Frozen water.", "Frozen air."]},
        {"question": "Why?", "choices": ["No.", "So."]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mini.yaml").write_text(
        "task: sealign_mini\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: 'Q: {{question}}\\nA:'\n"
        "doc_to_target: 0\ndoc_to_choice: choices\n"
    )
    command = [sys.executable, "-m", "sealign.evaluation.harness", "--model", "sealign"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},edit={tmp_path / 'edit'}", "--device", "cpu"]
    command += ["--tasks", "sealign_mini", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    recorded = json.loads(written.read_text())
    assert recorded["results"]["sealign_mini"]["sample_len"] == 2
    assert recorded["config"]["sealign_edit_hash"] == small_edit.hash
