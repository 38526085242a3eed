"""Questions about long contexts: needles, LongQA and RAG, 4K to 128K tokens, for all mixers.

The models come from the experiment `lm`, which trained them on windows of 2048 tokens. Here they are trained
further on rows of 32768 tokens, with text and with examples of the tasks (questions.py). All models read the same
rows in the same order, with the same learning rate. Then they answer questions at up to four times this length,
about new names and held-out files. Answers are generated greedily, from the prompt to the end of the line, in
bfloat16 on a GPU.

    needles         11 tasks of RULER (experiments/tasks/needles.py)    fraction of the references in the answer
    long_qa, rag    facts of files (experiments/tasks/long_qa.py)       F1 of words, and exact match

From this training on, the rotary embeddings of attention use the base ROPE_THETA, in "attention" and in "hybrid"
(arXiv 2309.16039 raises the base for longer contexts). With the base of 10,000 of the first training, the slowest
pair of 64 dims turns by 0.27 radians in 2048 tokens and by 17 radians in 128K; with ROPE_THETA it turns by 0.2
radians in 128K. Beyond the length of this training, attention gets distances that it has not seen. The other
mixers have no positions.

The model is kept in OUTPUT/long-models/SIZE/MIXER for the cells with questions.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gka.cli.generate import ready_attention
from gka.cli.loading import load_checkpoint, load_model, write_checkpoint
from gka.hf import GKAForCausalLM
from gka.hf.cache_name import CACHE
from gka.training.errors import UserError

from ..tasks.examples import exact_match, f1
from ..tasks.needles import TASKS
from . import questions
from .lm import model_folder
from .lm_page import ALL, STYLE
from .picture import new_panels, save
from .questions import PLANS, Questions
from .record import Cell
from .table import markdown_table, span
from .training import SPEED, train

SUMMARY = "needles, LongQA and RAG in long contexts"
BY_MACHINE = False
ROPE_THETA = 1_000_000
Entries = list[dict[str, Any]]
_TRAINING: dict[str, dict[str, Any]] = {
    "small": dict(batch_size=2, learning_rate=1e-3, dtype="float32"),
    "full": dict(batch_size=2, learning_rate=1e-3, dtype="bfloat16"),
}
_MIXERS = {"small": ("gka", "attention"), "full": ALL}
_MORE = 8  # extra tokens of an answer beyond the longest correct one
_AT_ONCE = 1 << 18  # tokens of the windows in one batch
_RECIPE = "continued.json"

prepare = questions.prepare


def cells(size: str) -> list[Cell]:
    """For each mixer the training, then the questions, short contexts first. Small: two mixers, two tasks."""
    plan = PLANS[size]
    rest = {**_TRAINING[size], "seq_len": plan.row, "rows": plan.rows, "rope_theta": ROPE_THETA, "seed": 0}
    found: list[Cell] = []
    for mixer in _MIXERS[size]:
        found.append({"mixer": mixer, "part": "continue", **rest})
        found += [
            {"mixer": mixer, "part": "score", "task": task, "length": length, "examples": count, **rest}
            for (length, count), task in itertools.product(plan.tested, plan.tasks)
        ]
    return found


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Train a model further, or ask it questions."""
    output = folder.parents[1]
    asked = Questions.load(output, cell["size"])
    target = output / "long-models" / cell["size"] / cell["mixer"]
    if cell["part"] == "continue":
        return _continue(cell, asked, model_folder(output, cell["size"], cell["mixer"]), target, folder, device)
    model, tokenizer, ends = _trained(target, cell, device)
    tests = asked.tests(cell["task"], cell["length"])
    texts = answer(
        model, tokenizer, tests.windows, tests.longest + _MORE, ends, autocast=cell["dtype"] == "bfloat16"
    )
    return {**scored(cell["task"], texts, tests.answers), "tokens": tests.windows.shape[1]}


def _continue(
    cell: Cell, asked: Questions, source: Path, target: Path, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Train the model of the experiment `lm` further, and save it."""
    if not (source / "config.json").is_file():
        raise UserError(
            f"{source}: there is no model; train it with `python -m experiments evidence lm --size {cell['size']}`"
        )
    longest = max(length for length, _ in PLANS[cell["size"]].tested)
    model = longer(load_model(str(source), "cpu"), max(longest, cell["seq_len"]) + 256, cell["rope_theta"])
    trained = train(
        model,  # type: ignore[arg-type]
        asked.rows(),
        folder,
        learning_rate=cell["learning_rate"],
        steps=cell["rows"] // cell["batch_size"],
        batch_size=cell["batch_size"],
        seed=cell["seed"],
        device=device,
        dtype=cell["dtype"],
        log_every=10 if cell["size"] == "full" else 1,
    )
    if trained.diverged is None:
        write_checkpoint(model, source, target, overwrite=True, more={_RECIPE: json.dumps(_recipe(cell))})
    return {
        "parameters": model.num_parameters(),
        **{name: value for name, value in trained.as_dict().items() if name != SPEED},  # it may share the GPU
        "examples": asked.index["examples"],
        "counted tokens": asked.index["counted tokens"],
    }


def longer(model: GKAForCausalLM, positions: int, rope_theta: float) -> GKAForCausalLM:
    """A model with the same weights, another number of positions, and another rotary base for attention."""
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = positions
    if config.has_attention:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta)}
    made = GKAForCausalLM(config)
    made.load_state_dict(model.state_dict())
    return made


def _recipe(cell: Cell) -> Cell:
    """The fields of a cell that decide the weights of a model."""
    return {key: cell[key] for key in cell if key not in ("part", "task", "length", "examples")}


def _trained(folder: Path, cell: Cell, device: torch.device) -> tuple[Any, Any, list[int]]:
    """The trained model, its tokenizer and the tokens that end an answer. UserError if there is no model."""
    file = folder / _RECIPE
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != _recipe(cell):
        raise UserError(f"{folder}: no trained model; train it with --only part=continue mixer={cell['mixer']}")
    return _loaded(str(folder), file.stat().st_mtime_ns, "cpu" if device.type == "cpu" else "auto")


@lru_cache(maxsize=1)
def _loaded(folder: str, written: int, device: str) -> tuple[Any, Any, list[int]]:
    """Load a model once for all questions; `written` distinguishes it from an earlier one in the same folder."""
    model, tokenizer = load_checkpoint(folder, device)
    ends = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return model, tokenizer, [*ends, tokenizer.eos_token_id]


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, windows: Tensor, most: int, ends: Sequence[int], *, autocast: bool
) -> list[str]:
    """Generate the next line after each prompt, greedily.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        windows: [N, T] int64, prompts of equal length.
        most: maximum number of tokens of an answer.
        ends: tokens that end an answer.
        autocast: whether to compute in bfloat16; the dtype of the weights stays.
    """
    texts: list[str] = []
    for batch in windows.split(max(1, _AT_ONCE // windows.shape[1])):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            made = _greedy(model, batch.to(model.device), most, torch.tensor(ends, device=model.device))
        for row in made.tolist():
            last = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
            texts.append(tokenizer.decode(row[:last], skip_special_tokens=True).split("\n")[0])
    return texts


def _greedy(model: Any, windows: Tensor, most: int, ends: Tensor) -> Tensor:
    """[N, T] prompts -> [N, up to `most`] tokens. Stops when every row has one of `ends`; ignore later tokens."""
    made: list[Tensor] = []
    cache, tokens = None, windows
    done = torch.zeros(len(windows), dtype=torch.bool, device=windows.device)
    while len(made) < most and not done.all():
        with ready_attention() if made else nullcontext():  # the same for all prompts of a task and length
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = getattr(output, CACHE), output.logits.argmax(-1)
        made.append(tokens)
        done |= torch.isin(tokens[:, 0], ends)
    return torch.cat(made, 1)


def scored(task: str, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Scores of generated answers.

    Args:
        task: a name of TASKS, "long_qa" or "rag".
        texts: the generated answers.
        answers: the reference answers for each text.

    Returns:
        `each` score and the mean `score`; for questions also the mean `exact match`; first texts and references.
    """
    score = TASKS[task].score if task in TASKS else f1
    each = [score(text, wanted) for text, wanted in zip(texts, answers, strict=True)]
    found = {"score": statistics.mean(each), "each": [round(value, 4) for value in each]}
    if task not in TASKS:
        exact = [exact_match(text, wanted) for text, wanted in zip(texts, answers, strict=True)]
        found["exact match"] = statistics.mean(exact)
    found["first"] = [[text.strip(), ", ".join(wanted)] for text, wanted in zip(texts[:2], answers, strict=False)]
    return found


# The page


def section(entries: Entries, picture: Path) -> str:
    """Tables of the training, the mean of the needles, LongQA, RAG, and each needle task at the last length."""
    mixers = [mixer for mixer in ALL if any(entry["cell"]["mixer"] == mixer for entry in entries)]
    continued = {e["cell"]["mixer"]: e for e in entries if e["cell"]["part"] == "continue"}
    scores = {
        (e["cell"]["mixer"], e["cell"]["task"], e["cell"]["length"]): e["result"]
        for e in entries
        if e["cell"]["part"] == "score"
    }
    _draw(scores, mixers, entries[0]["cell"]["seq_len"], picture)
    names = [STYLE[mixer][0] for mixer in mixers]
    parts = [_described(continued)] if continued else []
    if scores:
        lengths, needles = lengths_of(scores), needle_tasks(scores)
        counts = {e["cell"]["length"]: e["cell"]["examples"] for e in entries if e["cell"]["part"] == "score"}
        asked = ", ".join(f"{counts[length]} at {length}" for length in lengths)
        parts.append(f"Number of examples of each task: {asked} tokens. All scores are in percent.")
        if needles:
            parts += [
                f"Needles, mean score over {len(needles)} task{'s' * (len(needles) > 1)}:",
                markdown_table(
                    ["tokens", *names],
                    [[str(T), *(_percent(needle_mean(scores, mixer, T)) for mixer in mixers)] for T in lengths],
                ),
            ]
        for task, title in _ASKED.items():
            if any(known == task for _, known, _ in scores):
                rows = [[str(T), *(_both(scores.get((mixer, task, T))) for mixer in mixers)] for T in lengths]
                parts += [f"{title}, F1 of the words, with exact match in brackets:"]
                parts += [markdown_table(["tokens", *names], rows)]
        if needles:
            rows = [[task, *(_score(scores, mixer, task, lengths[-1]) for mixer in mixers)] for task in needles]
            parts += [f"Each needle task at {lengths[-1]} tokens:", markdown_table(["task", *names], rows)]
        parts.append(_findings(scores, mixers, entries[0]["cell"]["seq_len"]))
    return "\n\n".join(part for part in parts if part)


_ASKED = {"long_qa": "LongQA", "rag": "RAG"}
_Scores = dict[tuple[str, str, int], dict[str, Any]]


def _described(continued: dict[str, Any]) -> str:
    """A paragraph and a table about the training."""
    some = next(iter(continued.values()))
    cell, counted = some["cell"], some["result"]["counted tokens"]
    examples = sum(some["result"]["examples"].values())
    rows = []
    for mixer in (mixer for mixer in ALL if mixer in continued):
        result = continued[mixer]["result"]
        peak = result["peak bytes"]
        rows.append(
            [
                STYLE[mixer][0],
                f"{result['train loss'][-1][1]:.3f}"
                if result["diverged"] is None
                else f"diverged at step {result['diverged']}",
                "" if peak is None else f"{peak / 1e9:.1f}",
            ]
        )
    return (
        "Can small models use a long context? The `lm` models of the first seed are trained further on "
        f"{cell['rows'] * cell['seq_len'] / 1e6:.3g} million tokens in rows of {cell['seq_len']} tokens, with "
        f"learning rate {cell['learning_rate']:g}, in {cell['dtype']}. Half of the rows contain {examples:,} "
        f"examples of all tasks, the other half contains text. The loss counts {counted['answers']:,} tokens of "
        f"answers and {counted['text']:,} tokens of text. The rotary base of softmax attention is "
        f"{cell['rope_theta']:,}."
        "\n\n" + markdown_table(["mixer", "last training loss, nats", "peak GB"], rows)
    )


def _findings(scores: _Scores, mixers: list[str], trained: int) -> str:
    """GKA's needle scores compared with each other mixer at and above the training length; the questions."""
    found = []
    for T in (T for T in lengths_of(scores) if T >= trained):
        apart = {mixer: difference(scores, mixer, T) for mixer in mixers if mixer != "gka"}
        said = [f"{each} compared with {STYLE[mixer][0]}" for mixer, each in apart.items() if each]
        if said:
            found.append(f"at {T} tokens {', '.join(said)}")
    parts = []
    if found:
        parts.append(
            "Needle score of GKA minus the score of each other mixer, in percentage points (positive: GKA is "
            f"better), with the standard error over the examples: {'; '.join(found)}. Lengths above {trained} are "
            "longer than the training rows. Softmax attention has not seen these positions in training."
        )
    exact = {round(100 * result["exact match"]) for (_, task, _), result in scores.items() if task in _ASKED}
    if exact:
        share = span(sorted(exact))
        parts.append(f"At each length, {share} percent of the questions get an exact answer.")
    if parts:
        parts.append(
            "Each small model was trained once, so the scores say nothing about large models. The models of the "
            "paper have 2.8 billion parameters. The tasks here use other words than those of RULER."
        )
    return " ".join(parts)


class Difference(NamedTuple):
    """GKA's mean score over the needle tasks minus another mixer's, and its standard error, in percent."""

    points: float
    error: float

    def __str__(self) -> str:
        return f"{self.points:+.1f} ± {self.error:.1f}"


def difference(scores: _Scores, mixer: str, length: int) -> Difference | None:
    """Paired by example; None if a result is missing."""
    means, variance = [], 0.0
    for task in needle_tasks(scores):
        ours, theirs = (scores.get((name, task, length)) for name in ("gka", mixer))
        if ours is None or theirs is None:
            return None
        each = [a - b for a, b in zip(ours["each"], theirs["each"], strict=True)]
        means.append(statistics.mean(each))
        variance += statistics.variance(each) / len(each) if len(each) > 1 else 0.0
    if not means:
        return None
    return Difference(100 * statistics.mean(means), 100 * math.sqrt(variance) / len(means))


def lengths_of(scores: _Scores) -> list[int]:
    return sorted({length for _, _, length in scores})


def needle_tasks(scores: _Scores) -> list[str]:
    """The needle tasks with results, in the order of TASKS."""
    return [task for task in TASKS if any(known == task for _, known, _ in scores)]


def needle_mean(scores: _Scores, mixer: str, length: int) -> float | None:
    """The mean over all needle tasks; None if one is missing."""
    found = [scores.get((mixer, task, length)) for task in needle_tasks(scores)]
    known = [result["score"] for result in found if result is not None]
    return statistics.mean(known) if known and len(known) == len(found) else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _score(scores: _Scores, mixer: str, task: str, length: int) -> str:
    result = scores.get((mixer, task, length))
    return _percent(None if result is None else result["score"])


def _both(result: dict[str, Any] | None) -> str:
    return "" if result is None else f"{_percent(result['score'])} ({_percent(result['exact match'])})"


def _draw(scores: _Scores, mixers: list[str], trained: int, path: Path) -> None:
    figure, panels = new_panels(1, 3, (13, 4.0), 120, sharey=True)
    highest = 10.0
    titles = ("needles, mean of the tasks", *(f"{name}, F1" for name in _ASKED.values()))
    for axes, task, title in zip(panels, (None, *_ASKED), titles, strict=True):
        for mixer in mixers:
            name, colour, marker = STYLE[mixer]
            points = []
            for T in lengths_of(scores):
                known = scores.get((mixer, task, T)) if task else None
                share = known["score"] if known else None if task else needle_mean(scores, mixer, T)
                if share is not None:
                    points.append((T, 100 * share))
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name) if points else None
            highest = max([highest, *(value for _, value in points)])
        axes.axvline(trained, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens; dotted: trained at")
        axes.set_title(title, loc="left", fontsize=11)
    panels[0].set_ylabel("percent")
    panels[0].set_ylim(-2, 1.08 * highest)
    if scores:
        panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
