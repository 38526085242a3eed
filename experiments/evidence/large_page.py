"""The pages of `large`: the answer by rule, tables, and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gka.training.errors import UserError

from .lm_page import STYLE as MIXER_STYLE
from .picture import new_panels, save
from .table import markdown_table, paired

STYLE = {**MIXER_STYLE, "gdn_fla": MIXER_STYLE["gdn"]}
_ERRORS = 2.0  # standard errors that a difference must exceed
_POINTS, _LATE = 150, 10  # of a curve; from the later points the height of the panel follows
_HEAD = [
    "mixer", "million parameters", "held-out loss", "recall tokens", "other tokens", "tokens/s", "MFU",
    "peak GB of a GPU", "largest gradient norm", "spikes", "resumed at step",
]  # fmt: skip
_Models = dict[str, dict[str, Any]]  # entries by mixer


def overview(entries: list[dict[str, Any]]) -> str:
    """Question, short table and answer for the evidence page."""
    plan, models = latest(entries)
    rows = [[row[0], row[2], row[3], row[5], row[6]] for row in (_row(*each) for each in models.items())]
    head = [_HEAD[0], _HEAD[2], f"loss of {_HEAD[3]}", _HEAD[5], _HEAD[6]]
    tokens = f"{plan['result']['tokens'] / 1e6:,.3g} million tokens"
    question = (
        "Does the 440M recipe train, and how does GKA compare with equal tokens? Models of equal size read the "
        f"same {tokens} in the same order, in windows of {plan['cell']['seq_len']:,}. Losses are in nats per "
        "held-out token."
    )
    parts = [question, markdown_table(head, rows) if rows else "", _left_out(plan).strip(), _answer(models)]
    return "\n\n".join(part for part in parts if part)


def latest(entries: list[dict[str, Any]]) -> tuple[dict[str, Any], _Models]:
    """The latest plan and the trainings with its budget.

    Raises:
        UserError: there is no plan.
    """
    plans = [entry for entry in entries if entry["cell"]["part"] == "plan"]
    if not plans:
        raise UserError("large.json has no plan")
    same = {name: plans[-1]["cell"][name] for name in ("budget", "corpus") if name in plans[-1]["cell"]}
    models = [e for e in entries if e["cell"]["part"] == "model" and same.items() <= e["cell"].items()]
    return plans[-1], {entry["cell"]["mixer"]: entry for entry in models}


def page_text(plan: dict[str, Any], models: _Models) -> str:
    """All tables and the text about them."""
    return "\n\n".join(part for part in (_described(plan, models), _answer(models), _table(models)) if part)


def _described(plan: dict[str, Any], models: _Models) -> str:
    cell, result = plan["cell"], plan["result"]
    tokens = f"{result['tokens'] / 1e6:,.3g} million tokens"
    text = (
        "Does the 440M recipe train, and how does GKA compare with equal tokens? Models: "
        f"{cell['num_hidden_layers']} blocks, hidden size {cell['hidden_size']}, {cell['num_attention_heads']} "
        f"heads of {cell['head_dim']} dims. A step has {cell['sequences']} windows of {cell['seq_len']:,} tokens, "
        f"in {cell['dtype']}. The learning rate is {cell['learning_rate']:g} for all. A budget of "
        f"{cell['budget']:g} minutes gave each mixer {result['steps']:,} steps, {tokens}, the same in the same "
        "order. Losses are in nats per token. MFU counts the products of linear maps and of each mixer's op. A "
        "spike is a step whose gradient norm, before clipping to 1, is more than 3 times the median of the 32 "
        "steps before. The table has the largest norm after the warm-up."
    )
    if models:
        counts = next(iter(models.values()))["result"]["corpus"]
        train, held = counts["train"], counts["validation"]
        text += (
            f" The text is that of installed Python packages without near copies: {train['files']:,} files, "
            f"{train['tokens'] / 1e6:,.3g} million tokens, read {result['tokens'] / train['tokens']:.2g} times; "
            f"{held['files']:,} files are held out, {cell['eval_bytes'] / 1e6:g} MB of them are read."
        )
    return text + _left_out(plan)


def _left_out(plan: dict[str, Any]) -> str:
    """The mixers that the plan has left out, each as a sentence after a space."""
    left_out = plan["result"]["left out"]
    return "".join(f" {STYLE[mixer][0]} did not run here ({why})." for mixer, why in left_out.items())


def _answer(models: _Models) -> str:
    """Two sentences: the losses compared with GKA's, and the course of the trainings."""
    finished = {mixer: entry["result"] for mixer, entry in models.items() if entry["result"]["held out"]}
    parts = []
    if "gka" in finished:
        apart = [_compared(finished, mixer) for mixer in finished if mixer != "gka"]
        loss = f"The held-out loss of GKA is {finished['gka']['held out']['loss']:.4f}"
        parts.append(f"{loss}{': ' if apart else ''}{', '.join(apart)}.")
    if models:
        parts.append(_course({STYLE[mixer][0]: entry["result"] for mixer, entry in models.items()}))
        parts.append("Each mixer was trained once, so the spread between random seeds is not known.")
    return " ".join(parts)


def _compared(finished: dict[str, Any], mixer: str) -> str:
    """GKA's loss compared with a mixer's."""
    mean, error = paired(finished["gka"]["windows"], finished[mixer]["windows"])
    name, numbers = STYLE[mixer][0], f"{abs(mean):.4f} ± {error:.4f}"
    if abs(mean) <= _ERRORS * error:
        return f"no difference from {name} beyond {_ERRORS:g} standard errors ({-mean:+.4f} ± {error:.4f})"
    return f"{numbers} {'lower' if mean > 0 else 'higher'} than with {name}"


def _course(results: dict[str, Any]) -> str:
    """Whether trainings diverged, had spikes, and were resumed."""
    diverged = [f"{name} at step {r['diverged']}" for name, r in results.items() if r["diverged"] is not None]
    spikes = {name: len(r["spikes"]) for name, r in results.items() if r["spikes"]}
    resumed = sum(len(r["starts"]) - 1 for r in results.values())
    said = f"Diverged: {', '.join(diverged)}" if diverged else "No training diverged"
    counts = ", ".join(f"{count} with {name}" for name, count in spikes.items())
    said += f"; spikes of the gradient norm: {counts or 'none'}"
    times = "once" if resumed == 1 else f"{resumed} times"
    return said + (f"; the trainings were stopped and resumed {times}." if resumed else ".")


def _table(models: _Models) -> str:
    rows = [_row(mixer, entry) for mixer, entry in models.items()]
    return markdown_table(_HEAD, rows) if rows else ""


def _row(mixer: str, entry: dict[str, Any]) -> list[str]:
    result, cell = entry["result"], entry["cell"]
    read, speed, peak = result["held out"], result["tokens per second"], result["peak flops"]
    warm = cell["warmup"] * result["tokens"] / cell["sequences"] / cell["seq_len"]
    norms = [norm for step, norm in result["gradient norms"] if step > warm]
    mfu = speed * result["flops per token"] / result["processes"] / peak if speed and peak else None
    losses = [""] * 3
    if read is None:
        losses[0] = f"diverged at step {result['diverged']}"
    else:
        losses = [_shown(read[name], ".4f") for name in ("loss", "recall_loss", "other_loss")]
    return [
        STYLE[mixer][0],
        f"{result['parameters'] / 1e6:.2f}",
        *losses,
        _shown(speed, ",.0f"),
        _shown(mfu, ".3f"),
        _shown(result["peak bytes"] and result["peak bytes"] / 1e9, ".1f"),
        _shown(max(norms, default=None), ".2f"),
        str(len(result["spikes"])),
        ", ".join(f"{step:,}" for step in result["starts"][1:]) or "never",
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def draw(models: _Models, path: Path) -> None:
    """Training loss, with the held-out loss on the way as marks, and the gradient norms."""
    figure, (curve, norms) = new_panels(1, 2, (12, 4.4), 120)
    for mixer, entry in models.items():
        (name, colour, marker), result = STYLE[mixer], entry["result"]
        per_step = entry["cell"]["sequences"] * entry["cell"]["seq_len"] / 1e6
        for axes, points in ((curve, result["train loss"]), (norms, result["gradient norms"])):
            x, y = _means(points)
            axes.plot([step * per_step for step in x], y, color=colour, linewidth=1.2, label=name)
        read = [(step * per_step, loss) for step, loss in result["evaluations"]]
        if read:
            curve.plot(*zip(*read, strict=True), color=colour, marker=marker, linestyle="none", markersize=5)
    curve.set_title("training loss, nats; marks: held-out text", loc="left", fontsize=11)
    norms.set_title("gradient norm", loc="left", fontsize=11)
    norms.set_yscale("log")
    for axes in (curve, norms):
        axes.set_xlabel("million tokens")
    if models:
        curve.legend(frameon=False, fontsize=9)
        late = [y for entry in models.values() for y in _means(entry["result"]["train loss"])[1][_LATE:]]
        if late:  # the first losses would press the curves together
            curve.set_ylim(0.97 * min(late), 1.03 * max(late))
    save(figure, path)


def _means(points: list[list[float]]) -> tuple[list[float], list[float]]:
    """Last steps and means of at most _POINTS groups of neighbouring points."""
    size = -(-len(points) // _POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]
