"""An edit that is evaluated on prompts of another form than it was fitted on gets a remark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import sealign
from sealign.demonstrations import Prompt
from sealign.errors import SettingError
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.results import Results
from sealign.models.prompt_format import PromptFormat
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa
from tests.tiny_models import build_model

pytestmark = HARNESS_WARNINGS

RAW = "was fitted with the chat template, but these prompts are written without a chat template"
CHAT = "was fitted without a chat template, but these prompts are written with the chat template"


@pytest.fixture
def roomy(tokenizer: Any) -> Any:
    return build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)


def _fitted(model: Any, tokenizer: Any, demonstrations: Any, style: Any) -> sealign.Edit:
    config = sealign.SEAConfig(rank=2, layers=(1,), prompt_format=PromptFormat(style))
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    assert isinstance(edit, sealign.Edit)
    return edit


def test_remarks_follow_the_form_of_each_task(roomy: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    write_truthfulqa(tmp_path, 3)
    edits = {style: _fitted(roomy, tokenizer, demonstrations, style) for style in ("auto", "plain")}
    assert edits["auto"].record.config["prompt_format"]["style"] in ("auto", "chat")

    def run(name: str, **settings: Any) -> Results:
        config = EvaluationConfig(
            tasks=["truthfulqa_mc1"],
            data_dir=tmp_path,
            demonstrations=demonstrations[:4],
            prompts=[Prompt("Why?"), Prompt("How?")],
            max_new_tokens={"answers": 3},
            control_seeds=(),
            reversed_control=False,
            **settings,
        )
        return evaluate(roomy, tokenizer, edits, config=config, output=tmp_path / name)

    for name, settings, of_task, of_own in (
        ("raw", {"prompt_format": PromptFormat("plain")}, ("auto", RAW), ("auto", RAW)),
        ("mixed", {}, ("auto", RAW), ("plain", CHAT)),
        ("chat", {"apply_chat_template": True}, ("plain", CHAT), ("plain", CHAT)),
    ):
        results = run(name, **settings)
        for task, (edit, words) in {"truthfulqa_mc1": of_task, "answers": of_own, "preference": of_own}.items():
            (note,) = results.tasks[task].notes
            assert note.startswith(f"the edit '{edit}' {words}"), (name, task)
        option = results.tasks["truthfulqa_mc1"].notes[0].rsplit("; ", 1)[1]
        assert option.startswith("leave out" if name == "chat" else "add")


@pytest.mark.parametrize(
    ("settings", "harness"),
    [
        ({"apply_chat_template": True}, {"apply_chat_template": True, "fewshot_as_multiturn": True}),
        ({"system_instruction": "Be brief."}, {"system_instruction": "Be brief."}),
        ({"num_fewshot": 2}, {"num_fewshot": 2}),
        (
            {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": "Be brief."},
            {
                "apply_chat_template": True,
                "num_fewshot": 1,
                "system_instruction": "Be brief.",
                "fewshot_as_multiturn": True,
            },
        ),
    ],
)
def test_prompts_of_tasks_are_those_of_the_harness(
    roomy: Any, tokenizer: Any, tmp_path: Path, settings: Any, harness: Any
) -> None:
    """Compare with the harness's own model and ``simple_evaluate`` with the settings of the same names."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from sealign.evaluation.local_tasks import task_manager
    from tests.evaluation_data import write_rows

    rows = [
        {
            "question": f"What is {n}?",
            "choices": {"label": list("ABCDE"), "text": ["ice", "a cat", "fog", "sand", "tea"]},
        }
        for n in ("cold", "wet", "old", "grey")
    ]
    write_rows(
        tmp_path,
        "commonsense_qa/validation.jsonl",
        [{"id": str(n), "question_concept": "x", "answerKey": "ABCDE"[n], **row} for n, row in enumerate(rows)],
    )
    config = EvaluationConfig(tasks=["commonsense_qa"], data_dir=tmp_path, limit=3, **settings)
    found = evaluate(roomy, tokenizer, {}, config=config, output=tmp_path / "out").tasks["commonsense_qa"]
    with task_manager(["commonsense_qa"], tmp_path) as manager:
        lm = HFLM(pretrained=roomy, tokenizer=tokenizer, batch_size=1)
        theirs = simple_evaluate(
            model=lm, tasks=["commonsense_qa"], limit=3, bootstrap_iters=0, task_manager=manager, **harness
        )
        raw = simple_evaluate(model=lm, tasks=["commonsense_qa"], limit=3, bootstrap_iters=0, task_manager=manager)
    samples = sorted(theirs["samples"]["commonsense_qa"], key=lambda sample: sample["doc_id"])
    plain = sorted(raw["samples"]["commonsense_qa"], key=lambda sample: sample["doc_id"])
    assert [s["arguments"][0][0] for s in samples] != [s["arguments"][0][0] for s in plain]
    assert found.metrics["acc"].arms["base"].numerators == [sample["acc"] for sample in samples]


def test_text_before_prompts_is_refused_with_the_template(
    roomy: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    icl = sealign.fit_edit(roomy, tokenizer, demonstrations, config=sealign.ICLConfig())
    write_truthfulqa(tmp_path, 3)
    config = EvaluationConfig(tasks=["truthfulqa_mc1"], data_dir=tmp_path, apply_chat_template=True)
    with pytest.raises(SettingError, match="'icl' puts text before every prompt.*without --apply-chat-template"):
        evaluate(roomy, tokenizer, {"icl": icl}, config=config, output=tmp_path / "out")


def test_examples_that_the_harness_refuses_are_refused(roomy: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_truthfulqa(tmp_path, 3)
    config = EvaluationConfig(tasks=["truthfulqa_mc1"], data_dir=tmp_path, num_fewshot=3)
    with pytest.raises(SettingError, match="num_fewshot is 3, but the harness fixes it at 0 for task 'truthfulqa_mc1'"):
        evaluate(roomy, tokenizer, {}, config=config, output=tmp_path / "out")
