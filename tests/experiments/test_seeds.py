"""Seeds of language models: which trainings there are, what is watched in them, and the answers of the page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import relative_error
from pages import assert_drawn, rows_of

from experiments import __main__ as command_line
from experiments.evidence import corpus, seeds, seeds_page, watch
from experiments.evidence.record import Record
from experiments.evidence.seeds_page import NUDGED, ORDER, OURS, WEIGHTS
from experiments.tasks.recall_loss import Bin, RecallLoss

CPU = torch.device("cpu")
Cell = dict[str, Any]


def cell(**changes: Any) -> Cell:
    return {**seeds.cells("small")[0], "size": "small", **changes}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus."""
    folder = tmp_path_factory.mktemp("seeds")
    random = torch.Generator().manual_seed(0)
    words = [f"word{n}" for n in torch.randint(40, (3000,), generator=random).tolist()]
    (folder / "text.py").write_text(" ".join(words) + "\n")
    corpus.prepare(folder / "out", "small", [str(folder / "text.py")])
    return folder / "out"


# The trainings


def test_the_trainings_and_their_controls() -> None:
    cells = seeds.cells("full")
    assert Counter(c["kind"] for c in cells) == {
        "GKA": 9, "Gated DeltaNet": 5, "softmax attention": 3, "GLA (no solve)": 3, "GKA, no forget gate": 3,
        "GKA, no alpha connection": 3,
    }  # fmt: skip
    ours = [(c["weights"], c["order"], c["nudge"]) for c in cells if c["kind"] == "GKA"]
    assert sorted(ours) == [
        (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 2, 0),
    ]  # fmt: skip
    rest = [{k: v for k, v in c.items() if k not in ("kind", "weights", "order", "nudge")} for c in cells]
    assert all(each == rest[0] for each in rest)
    groups = seeds_page.groups_of([{"cell": c} for c in cells])
    assert len(groups) == 10 and all(len(group) == 3 for group in groups.values())


def test_weights_follow_their_seed_and_a_nudge_is_small() -> None:
    first, same, other, nudged = (
        torch.cat([p.detach().flatten() for p in seeds.build(cell(**changes), 50, 0).parameters()])
        for changes in ({}, {"order": 1}, {"weights": 1}, {"nudge": 1})
    )
    assert torch.equal(first, same) and relative_error(other, first) > 0.5
    assert 5e-7 < relative_error(nudged, first) < 2e-6
    without = seeds.build(cell(kind="GKA, no forget gate"), 50, 0)
    assert all(block.gka.a_proj is None for block in without.model.layers)  # type: ignore[union-attr]


def test_the_loss_of_the_first_tokens_stands_apart() -> None:
    bins = (Bin(0, 1, 4, 8.0), Bin(2, 3, 4, 4.0), Bin(4, 7, 2, 1.0))
    found = seeds.losses(RecallLoss(13.0, 10, 30, bins, (), 13.0, 10), first_tokens=4)
    assert found == {"loss": 1.3, "first tokens": 1.5, "later tokens": 0.5}
    assert seeds.losses(RecallLoss(8.0, 4, 9, bins[:1], (), 8.0, 4), first_tokens=4)["later tokens"] is None


# What is watched


def test_groups_hold_every_parameter_once() -> None:
    model = seeds.build(cell(), 50, 0)
    groups = watch.groups_of(model)
    assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
    gka = model.model.layers[1].gka
    assert groups["1", "alpha"] == [gka.alpha_proj.weight, gka.alpha_proj.bias]  # type: ignore[union-attr]
    assert groups["1", "decay"] == [gka.a_proj.weight] and groups["1", "A_log"] == [gka.A_log]  # type: ignore[union-attr]
    assert groups["outside", "rest"][0] is model.model.embed_tokens.weight
    gdn = watch.groups_of(seeds.build(cell(kind="Gated DeltaNet"), 50, 0))
    assert {name for block, name in gdn if block == "0"} == {"A_log", "dt_bias", "beta and decay", "rest"}


def test_norms_are_those_before_clipping() -> None:
    model = seeds.build(cell(), 50, 0)
    model(torch.randint(50, (2, 20)), labels=torch.randint(50, (2, 20)), use_cache=False).loss.backward()
    exact = [
        torch.cat([p.grad.double().flatten() for p in group]).norm().item()  # type: ignore[union-attr]
        for group in watch.groups_of(model).values()
    ]
    for limit in (0.01, 1e6):
        seen = watch.Watch(model, lambda: 0.0, [])
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        state = SimpleNamespace(global_step=3, max_steps=9, logging_steps=2, log_history=[{"step": 4}])
        seen.on_pre_optimizer_step(None, state, None)
        seen.on_log(SimpleNamespace(max_grad_norm=limit), state, None, logs={"grad_norm": total})
        assert relative_error(torch.tensor(state.log_history[0][watch.NORMS]), torch.tensor(exact)) < 1e-4
        model.zero_grad()
        model(torch.randint(50, (2, 20)), labels=torch.randint(50, (2, 20)), use_cache=False).loss.backward()
        exact = [
            torch.cat([p.grad.double().flatten() for p in group]).norm().item()  # type: ignore[union-attr]
            for group in watch.groups_of(model).values()
        ]


def test_a_training_that_was_stopped_has_the_same_record(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seeds.run(cell(), output / "seeds" / "whole", CPU)
    assert [step for step, _ in whole["group norms"]] == [1, 2, 4, 6]
    assert [step for step, _ in whole["held out"]] == [1, 2, 3, 6]
    for (_, norms), (_, total) in zip(whole["group norms"], whole["gradient norms"], strict=True):
        assert len(norms) == len(whole["groups"])
        assert torch.tensor(norms).norm().item() == pytest.approx(total, rel=5e-3) and total > 1, "clipped"
    evaluate, calls = corpus.evaluate, list[int]()

    def stop(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments, **named)

    monkeypatch.setattr(corpus, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        seeds.run(cell(), output / "seeds" / "part", CPU)
    resumed = seeds.run(cell(), output / "seeds" / "part", CPU)
    assert len(calls) == 3 + 2
    for name in ("group norms", "held out", "loss", "first tokens", "train loss"):
        assert resumed[name] == whole[name], name


def test_the_order_of_the_text_follows_its_seed(output: Path) -> None:
    """Other order: the same weights read other text; by the command, with the page."""
    arguments = [
        "evidence",
        "seeds",
        "--output",
        str(output),
        "--device",
        "cpu",
        "--only",
        "kind=GKA",
        "weights=0",
    ]
    assert command_line.main(arguments) == 0
    entries = Record(output / "seeds.json", "seeds").entries
    found = {(e["cell"]["order"], e["cell"]["nudge"]): e["result"] for e in entries}
    assert set(found) == {(0, 0), (1, 0), (0, 1)}
    first, other, nudged = (found[key]["train loss"][0][1] for key in ((0, 0), (1, 0), (0, 1)))
    assert abs(first - nudged) < 1e-3 < abs(first - other)
    assert command_line.main(["evidence", "page", "--output", str(output)]) == 0
    page, more = output.with_suffix(".md").read_text(), (output / "seeds.md").read_text()
    row = next(row for row in rows_of(page) if row[0] == ORDER)
    ends = [found[key]["loss"] for key in ((0, 0), (1, 0))]
    assert row[1] == "2" and row[3] == f"{max(ends) - min(ends):.4f}"
    assert len([row for row in rows_of(more) if row[0] == "GKA"]) == 2 * 3
    assert_drawn(output / "seeds.png")


# The page


def entry(kind: str, loss: float | None, norm: float = 1.0, **changes: Any) -> dict[str, Any]:
    described = {"weights": 0, "order": 0, "nudge": 0, **changes}
    ends = {} if loss is None else {"loss": loss, "first tokens": loss, "later tokens": loss}
    result = {
        "diverged": 5 if loss is None else None, "groups": [["0", "A_log"], ["1", "A_log"], ["0", "rest"]],
        "group norms": [[1, [3 * norm, 4 * norm, 9.0]], [2, [None, norm, 9.0]]], "held out": [[2, loss]], **ends,
    }  # fmt: skip
    return {"cell": cell(kind=kind, **described), "result": result, "seconds": 60.0}


def own(kind: str, *losses: float | None, norms: tuple[float, ...] = (1.0, 1.0, 1.0)) -> list[dict[str, Any]]:
    return [entry(kind, x, norms[n], weights=n, order=n) for n, x in enumerate(losses)]


def control(changed: str, *losses: float | None, kind: str = "GKA") -> list[dict[str, Any]]:
    """Two trainings beside seed 0 of GKA, which has 2.00 in these tests."""
    return [entry(kind, loss, **{changed: n}) for n, loss in enumerate(losses, 1)]


def said(*entries: dict[str, Any]) -> str:
    return seeds_page.answer(seeds_page.groups_of(list(entries)), 64)


OWN = own("GKA", 2.00, 2.02, 2.06)


def test_spreads_are_compared_between_equal_groups_of_three() -> None:
    whole = [2.0, 2.1, 2.05]
    assert seeds_page.compare([1.0, 1.05, 1.0], whole) == "comparable" == seeds_page.compare([1.0] * 3, [2.0] * 3)
    assert seeds_page.compare([1.0, 1.019, 1.0], whole) == "clearly smaller"
    assert seeds_page.compare([1.0, 1.021, 1.0], whole) == seeds_page.compare([1.0, 1.0, 1.049], whole)
    assert seeds_page.compare([1.0, 1.021, 1.0], whole) == "not told apart"
    assert seeds_page.compare([1.0, 1.0], whole) is seeds_page.compare([1.0] * 2, [2.0] * 2) is None
    assert seeds_page.compare([1.0] * 4, whole) is None, "more trainings spread more"


def test_how_often_the_rule_errs() -> None:
    """Normal losses without any difference, as the page states; seed 0 is in four groups."""
    random = torch.Generator().manual_seed(0)

    def spreads(shared: torch.Tensor | None = None) -> torch.Tensor:
        losses = torch.randn(200_000, 3, generator=random)
        if shared is not None:
            losses[:, 0] = shared
        return losses.amax(1) - losses.amin(1)

    seed_0 = torch.randn(200_000, generator=random)
    whole, nudged, weights, order = (spreads(seed_0) for _ in range(4))
    others = [(spreads(), whole) for _ in range(4)]  # two linear layers, two parts
    pairs = [*others, (nudged, whole), (weights, order), (order, weights), (spreads(), spreads())]
    smaller = torch.stack([ours <= seeds_page.CLEARLY * theirs for ours, theirs in pairs])
    assert len(pairs) == 8 and smaller[-1].float().mean().item() == pytest.approx(seeds_page.NOISE[0], abs=0.005)
    assert smaller.any(0).float().mean().item() == pytest.approx(seeds_page.NOISE[1], abs=0.01)
    assert f"in {seeds_page.NOISE[0]:.0%} of all cases" in seeds_page.overview(OWN)


def test_the_answer_compares_other_layers() -> None:
    gdn, attention = own("Gated DeltaNet", 2.0, 2.005, 2.01), own("softmax attention", 1.9, 1.9)
    assert "no answer" in said(*OWN[:1]) and "no answer" in said(*gdn)
    text = said(*OWN, *gdn, *attention)
    assert "spread by 0.0600 nats (0.0100 with Gated DeltaNet, 0.0000 with softmax attention)" in text
    assert "That is clearly more than with Gated DeltaNet." in text and "than with GLA" not in text
    assert "not clearly more than with Gated DeltaNet" in said(*OWN, *own("Gated DeltaNet", 2.0, 2.02, 2.01))
    assert "That is not more than with GLA" in said(*OWN, *own("GLA (no solve)", 2.0, 2.2, 2.1))
    assert "more than with" not in said(*OWN, *gdn[:2]), "two seeds beside three"
    assert "more than with" not in said(*OWN, *own("softmax attention", 2.0, 2.0, 2.0)), "no linear layer"
    text = said(*OWN[:2], *gdn[:2], *control("weights", 2.1), *control("nudge", 2.1))
    assert "two seeds" in text and "Consistent" not in text


def test_the_answer_names_the_source_of_the_spread() -> None:
    weights, order = control("weights", 2.05, 2.03), control("order", 2.01, 2.005)
    quiet, loud, between = (control("nudge", *x) for x in ((2.001, 2.002), (2.05, 2.0), (2.02, 2.0)))
    text = said(*OWN)
    assert "weights and order have not as many trainings" in text and "1e-6 has not as many trainings" in text
    text = said(*OWN, *weights, *order, *quiet)
    assert "Consistent with the first weights as the source, and not the order of the text: other weights" in text
    assert "alone spreads the loss by 0.0020, clearly less: consistent with no amplified rounding" in text
    text = said(*OWN, *weights, *order, *between)
    assert (
        "by 0.0200, less than half as much, but not clearly less." in text
        and "first weights as the source" in text
    )
    text = said(*OWN, *weights, *order, *loud)
    assert "amplifies small differences" in text and "source" not in text and "Neither" not in text
    late = control("order", 2.2, 2.3)
    assert "order of the text as the source, and not the first weights" in said(
        *OWN, *control("weights", 2.04, 2.05), *late
    )
    assert "and the order of the text alone each make half" in said(*OWN, *weights, *control("order", 2.04, 2.0))
    assert "Only the first weights alone makes half of the spread, but the two are not clearly apart" in said(
        *OWN, *weights, *control("order", 2.02, 2.0)
    )
    assert "Only the order of the text alone" in said(
        *OWN, *control("weights", 2.02, 2.0), *control("order", 2.05, 2.0)
    )
    text = said(*OWN, *control("weights", 2.02, 2.0), *control("order", 2.001, 2.0))
    assert "Neither the first weights nor the order of the text alone makes half" in text and "source" not in text
    assert "have not as many trainings" in said(*OWN, *weights, *control("order", 2.05)), "two beside three"


def test_the_answer_names_parts_of_the_scatter() -> None:
    quiet, loud = own("GKA, no forget gate", 2.0, 2.01, 2.0), own("GKA, no alpha connection", 2.0, 2.05, 2.0)
    text = said(*OWN, *quiet, *loud)
    part, none = text.split("These may have a part in the spread:")[1].split("These need no part in it:")
    assert "the forget gate (spread without it 0.0100)" in part
    assert "the alpha connection (spread without it 0.0500)" in none
    assert "a long past (0.0600 in the first 64 tokens" in none
    text = said(*OWN, *own("GKA, no forget gate", 2.0, 2.02, 2.0), *loud[:2])
    assert "No answer for: the forget gate (spread without it 0.0200)." in text
    assert "Not compared, for too few or not equally many trainings: the alpha connection" in text
    late = own("GKA", 2.00, 2.02, 2.06)
    for each in late:
        each["result"]["first tokens"] = 3.0
    assert "part in the spread: the use of a long past (0.0000 in the first 64" in said(*late)


def test_gradient_norms_are_told_and_not_judged() -> None:
    norms = own("GKA", 2.00, 2.02, 2.06, None, norms=(1.0, 1.0, 2.5, 9.0))
    text = said(*norms)
    assert "The median gradient norms of the seeds differ by a factor of 2.50 for A_log." in text
    assert "A_log" not in said(*OWN[:1], entry("GKA", 2.0, weights=1, order=1, norm=0.0)), "one norm alone"


def test_a_training_that_diverged_counts_once() -> None:
    """Seed 0 of GKA is in four groups."""
    first = own("GKA", None, 2.02, 2.06)
    controls = control("weights", 2.05) + control("order", 2.03) + control("nudge", 2.04)
    assert "One training has diverged and is left out." in said(*first, *controls)
    assert "2 trainings have diverged" in said(*first, *controls, *own("GLA (no solve)", 2.0, 2.1, None))
    assert "diverged" not in said(*OWN)
    first[0]["result"]["held out"] = [[2, 9.0]]
    assert seeds_page.at_steps(first) == {2: [2.02, 2.06]}


def test_when_the_seeds_part() -> None:
    """At the first of the steps from which on the spread is at least half of the last."""
    ours = own("GKA", 2.0, 2.06)
    for each, ends in zip(ours, ((5.0, 4.0, 3.0, 2.0), (5.3, 4.01, 3.04, 2.06)), strict=True):
        each["result"]["held out"] = [[step, loss] for step, loss in zip((10, 20, 40, 80), ends, strict=True)]
    assert seeds_page.parting_step(ours) == 40 and "From step 40 on" in said(*ours)
    ours[1]["result"]["held out"][1] = [20, 4.2]
    assert seeds_page.parting_step(ours) == 10
    assert seeds_page.parting_step(ours[:1]) is None


def test_norms_are_summed_over_blocks_and_lost_ones_left_out() -> None:
    assert seeds_page.norms_of(entry("GKA", 2.0), "A_log") == [[1, 5.0]]
    assert seeds_page.norms_of(entry("GKA", 2.0), "rest") == [[1, 9.0], [2, 9.0]]
    assert seeds_page.norms_of(entry("GKA", 2.0), "alpha") == []


def test_the_table_has_the_spreads(tmp_path: Path) -> None:
    entries = [*own("GKA", 2.0, 2.06), entry("GKA", 2.01, weights=1), entry("GKA", 2.05, nudge=1)]
    entries += own("GLA (no solve)", 2.1, None)
    entries[0]["result"]["first tokens"] = 2.5
    text = seeds_page.overview(entries)
    assert "and of all tokens after 2 of 2 steps, there on the first quarter of the text" in text
    table = {row[0]: row[1:] for row in rows_of(text)}
    assert table[OURS] == ["2", "2.0300 (2.0000 to 2.0600)", "0.0600", "0.4400", "0.0600", "0.0600"]
    assert table[WEIGHTS][2] == "0.0100" and table[NUDGED][2] == "0.0500"
    assert table["GLA (no solve)"] == ["2", "2.1000", "", "", "", ""] and ORDER in table
    rows = rows_of(seeds_page.section(entries, tmp_path / "seeds.png"))
    assert ["GKA", "0", "0", "0", "2.0000", "2.5000", "2.0000", "2.0000"] in rows
    assert ["GKA", "0", "0", "0", "5", "", "", "", "", "", "9"] in rows
    assert_drawn(tmp_path / "seeds.png")
