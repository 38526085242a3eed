"""lm_eval's `hf` backend on tasks from local files: one by one equals batches of eight, which it pads."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PAD, SIZES, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gka import GKAForCausalLM

lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

END = 1
KINDS = ("gka", "hybrid, sliding")
QUESTIONS = (
    "w05 w09 w11 w12",
    "w05",
    "w60 w03 w04 w05 w33 w34 w20",
    "w08 w08",
    "w17 w40",
    "w02",
    "w21",
    "w50 w41 w30 w29 w03",
)
CHOICES = ("w03 w04", "w12", "w44 w07 w09")
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = (
    COMMON
    + """
task: gka_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)
WRITE = (
    COMMON
    + """
task: gka_write
output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["w07"], do_sample: false, max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Two tasks of eight questions, of lengths that differ."""
    place = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": text, "choices": CHOICES, "answer": number % len(CHOICES)}
        for number, text in enumerate(QUESTIONS)
    ]
    (place / "test.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    for name, task in (("choice", CHOICE), ("write", WRITE)):
        (place / f"{name}.yaml").write_text(task.format(data=place / "test.jsonl"), encoding="utf-8")
    return TaskManager(include_path=str(place), include_defaults=False)


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with random weights, and a tokenizer whose every token is a word."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_model(request.param, eos_token_id=END).save_pretrained(tmp_path / "model")
    words = [f"w{number:02}" for number in range(SIZES["vocab_size"])]
    words[PAD], words[END] = "<pad>", "<end>"
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w02"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    whole.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def evaluate(checkpoint: Path, tasks: TaskManager, batch_size: int) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={checkpoint},dtype=float64",
        tasks=["gka_choice", "gka_write"],
        task_manager=tasks,
        batch_size=batch_size,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )


def responses(run: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to every question: (log-likelihood, whether greedy) of each choice, or a text."""
    samples = sorted(run["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["doc"]["question"] for sample in samples] == list(QUESTIONS)
    return [sample["filtered_resps"] for sample in samples]


def test_batches_change_nothing(checkpoint: Path, tasks: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], GKAForCausalLM.forward

    def spied(self: Any, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        calls.append((input_ids.shape[0], attention_mask))
        return forward(self, input_ids, attention_mask, **kwargs)

    monkeypatch.setattr(GKAForCausalLM, "forward", spied)
    alone = evaluate(checkpoint, tasks, batch_size=1)
    assert {rows for rows, _ in calls} == {1}
    calls.clear()
    together = evaluate(checkpoint, tasks, batch_size=8)
    assert {rows for rows, _ in calls} == {8}
    padded = [mask for _, mask in calls if mask is not None and not mask.all()]
    assert padded and all(mask[:, -1].all() for mask in padded), "generates from prompts padded on the left"

    assert together["results"] == alone["results"]
    texts = responses(together, "gka_write")
    assert texts == responses(alone, "gka_write")
    assert len({str(text) for text in texts}) > 5, "the questions are too easy"
    for one, eight in zip(responses(alone, "gka_choice"), responses(together, "gka_choice"), strict=True):
        assert [greedy for _, greedy in one] == [greedy for _, greedy in eight]
        assert [value for value, _ in eight] == pytest.approx([value for value, _ in one], rel=1e-6)


@torch.no_grad()
def test_answers_are_the_models(checkpoint: Path, tasks: TaskManager) -> None:
    run = evaluate(checkpoint, tasks, batch_size=8)
    model = GKAForCausalLM.from_pretrained(checkpoint)
    for question, answers, text in zip(
        QUESTIONS, responses(run, "gka_choice"), responses(run, "gka_write"), strict=True
    ):
        prompt = [int(word[1:]) for word in question.split()]
        for choice, (value, _) in zip(CHOICES, answers, strict=True):
            ids = torch.tensor([*prompt, *(int(word[1:]) for word in choice.split())])
            scores = model(ids.unsqueeze(0)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = scores.gather(1, ids[len(prompt) :, None]).sum().item()
            assert value == pytest.approx(expected, rel=1e-6)
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        answer = takewhile(lambda token: token not in (7, END), ids.tolist())
        assert text[0].split() == [f"w{token:02}" for token in answer if token != PAD]
