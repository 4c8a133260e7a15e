"""Requests of the harness, scored as the harness's own model scores them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import sealign
from sealign.errors import ModelError, SealignWarning, SettingError
from tests.tiny_models import OTHER_CONFIGS, build_model

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
        # The first wide batch is compared with one that shares nothing.
        longer = [(request.args[0] + " Again and again.", request.args[1]) for request in requests]
        ours.generate_until(_instances("generate_until", longer))
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


def _instances(kind: str, rows: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


def test_each_repeat_of_a_sampled_request_has_its_own_sample(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The harness repeats the same instance."""
    sampled = {"until": ["\n\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    requests = _instances("generate_until", [(CONTEXTS[0], sampled)]) * 5
    path = tmp_path / "answers.jsonl"
    texts = _sealign_model(llama, tokenizer, journal=path).generate_until(requests)
    assert len(set(texts)) == 5
    assert _sealign_model(llama, tokenizer, journal=path).generate_until(requests) == texts


def test_the_batch_size_is_detected(llama: Any, tokenizer: Any, harness_model: Any) -> None:
    from sealign.evaluation.harness import SealignLM

    ours = SealignLM(llama, tokenizer=tokenizer, batch_size="auto", max_batch_size=2)
    assert ours.generate_until([]) == []
    _close(ours.loglikelihood(_requests()), harness_model.loglikelihood(_requests()))
    expected = harness_model.generate_until(_requests("generate_until"))
    assert ours.generate_until(_requests("generate_until")) == expected
    assert ours.batch_size == 2


def test_an_answer_longer_than_the_context_is_refused(llama: Any, tokenizer: Any) -> None:
    ours = _sealign_model(llama, tokenizer, max_length=16)
    requests = _instances("loglikelihood", [("The clerk", " asks"), ("The clerk", " asks for a form and" * 6)])
    with pytest.raises(
        SettingError, match=r"the answer ' asks for a form.* is \d\d tokens long, .* model is 16 tokens"
    ):
        ours.loglikelihood(requests)


def test_long_contexts_lose_their_beginning_as_in_the_harness(llama: Any, tokenizer: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    requests = _instances("loglikelihood", [(BEGINNING * 2, " the baker"), (BEGINNING, " rises in the night")])
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, max_length=16)
    _close(_sealign_model(llama, tokenizer, max_length=16).loglikelihood(requests), theirs.loglikelihood(requests))


class TestExpectationsOfTheHarness:
    """What the harness's own tests of a model ask of it, against its own Hugging Face model."""

    def test_log_likelihoods_of_odd_requests(self, llama: Any, tokenizer: Any, harness_model: Any) -> None:
        tokenizer_ours = _sealign_model(llama, tokenizer)
        rows = [("", "The clerk"), ("Ask ", "the clerk"), ("Ask", " the"), ("", "the"), ("Ask", " the")]
        requests = _instances("loglikelihood", rows)
        _close(tokenizer_ours.loglikelihood(requests), harness_model.loglikelihood(requests))

    def test_rolling_log_likelihoods(self, llama: Any, tokenizer: Any) -> None:
        from lm_eval.models.huggingface import HFLM

        requests = _instances("loglikelihood_rolling", [(BEGINNING * 3,), ("The clerk",), (BEGINNING,)])
        theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, max_length=24)
        expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
        found = _sealign_model(llama, tokenizer, max_length=24).loglikelihood_rolling(requests)
        assert found == pytest.approx(expected, abs=2e-3)

    def test_generation_in_batches_of_one_kind(self, llama: Any, tokenizer: Any, harness_model: Any) -> None:
        kinds = [{"until": ["."], "max_gen_toks": 5}, {"until": ["e"], "max_gen_toks": 7}]
        requests = _instances("generate_until", [(text, kinds[n % 2]) for n, text in enumerate(CONTEXTS * 2)])
        expected = harness_model.generate_until(requests, disable_tqdm=True)
        assert _sealign_model(llama, tokenizer).generate_until(requests) == expected

    def test_tokens_and_plain_generation(self, llama: Any, tokenizer: Any, harness_model: Any) -> None:
        ours = _sealign_model(llama, tokenizer)
        assert ours.tok_encode("foo bar") == harness_model.tok_encode("foo bar")
        assert ours.tok_decode(ours.tok_encode("foo bar")) == "foo bar"
        context, _ = ours.tok_batch_encode(["foo bar", "bar"])
        assert context.tolist() == harness_model.tok_batch_encode(["foo bar", "bar"])[0].tolist()
        context, mask = ours.tok_batch_encode(["foo bar"])
        for given in ({}, {"attention_mask": mask}):
            texts = [lm._model_generate(context, max_length=10, stop=["\n\n"], **given) for lm in (ours, harness_model)]
            assert torch.equal(*texts)

    def test_the_cache_of_the_harness(self, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
        from lm_eval.api.model import CachingLM

        ours = _sealign_model(llama, tokenizer, preamble="Once. ")
        cached = CachingLM(ours, str(tmp_path / "cache.db"))
        first = cached.loglikelihood(_requests()), cached.generate_until(_requests("generate_until"))
        calls: list[int] = []
        hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
        again = cached.loglikelihood(_requests()), cached.generate_until(_requests("generate_until"))
        hook.remove()
        cached.dbdict.close()
        assert again == first
        assert calls == []


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_other_architectures(name: str, tokenizer: Any) -> None:
    """One at a time, as packing, batches and shared prefixes may be wrong there."""
    from lm_eval.models.huggingface import HFLM

    from sealign.evaluation.harness import SealignLM

    model = build_model(name, vocab_size=len(tokenizer))
    scored = [(BEGINNING + context, text) for context in CONTEXTS for text in CONTINUATIONS]
    written = [
        (BEGINNING + text, {"until": ["."], "max_gen_toks": 6}) for text in ("Who?", "The baker and the clerk " * 3)
    ]
    ours = SealignLM(model, tokenizer=tokenizer, batch_size=2)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = _instances("loglikelihood", scored)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SealignWarning)
        _close(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))
        requests = _instances("generate_until", written)
        assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    sentences = [str(found.message) for found in said if found.category is SealignWarning]
    reasons = ["packed scores of GPTNeo", "a shared prefix changes the next token of GPTNeo"]
    for reason in reasons:
        assert sum(reason in sentence for sentence in sentences) == (name == "gpt_neo")


@pytest.mark.filterwarnings("ignore:padding before a prompt")
def test_prompts_are_not_padded_where_padding_changes_the_answers(tokenizer: Any) -> None:
    from sealign.evaluation.harness import SealignLM

    model = build_model("recurrent_gemma", vocab_size=len(tokenizer))
    together = SealignLM(model, tokenizer=tokenizer, batch_size=3).generate_until(_requests("generate_until"))
    alone = SealignLM(model, tokenizer=tokenizer, batch_size=1)
    assert together == [alone.generate_until([request])[0] for request in _requests("generate_until")]
    assert len(set(together)) > 1


def test_conversations_are_written_as_everywhere(llama: Any, tokenizer: Any) -> None:
    """The date is fixed, thoughts are closed, and a system turn is not lost where the template refuses it."""
    copied = copy.deepcopy(tokenizer)
    body = "{{ strftime_now('%Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    copied.chat_template = body + "{% if add_generation_prompt %}<model><think>\n{% endif %}"
    lm = _sealign_model(llama, copied, date="2031-03-04")
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "For"}
    assert lm.apply_chat_template([user]) == "2031<user>Why?<model><think>\n\n</think>\n\n"
    assert lm.apply_chat_template([user, answer], add_generation_prompt=False) == "2031<user>Why?<assistant>For"
    copied.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('users only') }}{% endif %}" + body
    with pytest.raises(ModelError, match=r"refuses the conversation \(users only\); leave out the system turn"):
        lm.apply_chat_template([{"role": "system", "content": "Be brief."}, user])
