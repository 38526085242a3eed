"""Variants of the layer on recall: what differs, the training, what need not run, and the answers of the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from pages import assert_drawn, rows_of
from torch.utils.data import SequentialSampler

from experiments import __main__ as command_line
from experiments.evidence import mqar, parts, parts_page
from experiments.evidence.changes import BASE, LINEAR, NO_SOLVE, PAPER, SINGLE, VARIANTS
from experiments.evidence.parts import RATES
from experiments.evidence.record import Record
from experiments.evidence.starts import Start, start_from
from experiments.tasks.asked import accuracy, asked
from experiments.tasks.gates import gates_of, has_diverged
from experiments.tasks.mqar import IGNORE, make_mqar
from experiments.tasks.mqar_replay import logits_of, rate_factor, training
from experiments.tasks.mqar_train import RecallTrainer
from experiments.tasks.stepwise import finish
from gka import GKAConfig, GKAForCausalLM
from gka.nn.layer import GatedKalmaNet

CPU = torch.device("cpu")
Cell = dict[str, Any]


def cell(variant: str = BASE, **changes: Any) -> Cell:
    (some,) = (c for c in parts.cells("small") if c["variant"] == BASE and c.get("learning_rate") == RATES[0])
    return {**some, "variant": variant, "size": "small", **changes}


def layers_of(model: torch.nn.Module) -> list[GatedKalmaNet]:
    return [module for module in model.modules() if isinstance(module, GatedKalmaNet)]


# The variants


@pytest.fixture(scope="module")
def models() -> dict[str, GKAForCausalLM]:
    return {name: parts.build(cell(name)) for name in VARIANTS}


def test_every_variant_differs_from_the_default_in_what_its_name_says(models: dict[str, GKAForCausalLM]) -> None:
    layer = {name: layers_of(model)[1] for name, model in models.items()}
    base = layer[BASE]
    gates = {"forget gate": "a_proj", "beta gate": "b_proj", "alpha connection": "alpha_proj"}
    for name, part in gates.items():
        assert getattr(layer[f"no {name}"], part) is None and getattr(base, part) is not None, name
    assert layer[NO_SOLVE].alpha_proj is None and layer[NO_SOLVE].b_proj is not None
    assert not layer[NO_SOLVE].solves and not layer[LINEAR].solves and layer[PAPER].solves
    for name in (PAPER, LINEAR):
        assert layer[name].a_proj is layer[name].b_proj is layer[name].alpha_proj is None
    for name, bias in (("alpha starts at 0.88", 0.88), ("alpha starts at 0.12", 0.12)):
        assert torch.allclose(layer[name].alpha_proj.bias.sigmoid(), torch.tensor(bias), atol=5e-3)  # type: ignore[union-attr]
    assert torch.allclose(layer["A starts 10 times smaller"].A_log.exp() * 10, base.A_log.exp())
    softplus = torch.nn.functional.softplus
    assert torch.allclose(softplus(layer["dt starts 10 times smaller"].dt_bias) * 10, softplus(base.dt_bias))
    assert [name for name, part in VARIANTS.items() if part.dtype != "bfloat16"] == ["float32"]
    assert [layer[f"a = {a:g}"].ridge_ratio for a in (0.01, 0.05, 0.1)] == [0.01, 0.05, 0.1]
    assert layer["steps (31,)"].solver_steps == (31,) and layer["conjugate gradient"].solver == "cg"
    wide = layer["first weights 1 / sqrt(dim)"].q_proj.weight
    assert relative_error(wide * 0.02 * 32**0.5, base.q_proj.weight) < 1e-5, "the same random numbers"


def test_what_variants_share_starts_alike(models: dict[str, GKAForCausalLM]) -> None:
    """Also where a missing part would shift the random numbers; the changed values are the only ones."""
    base = models[BASE].state_dict()
    changed = {
        "alpha starts at 0.88": {"alpha_proj.bias"}, "alpha starts at 0.12": {"alpha_proj.bias"},
        "A starts 10 times smaller": {"A_log"}, "dt starts 10 times smaller": {"dt_bias"},
    }  # fmt: skip
    for name, model in models.items():
        if name == "first weights 1 / sqrt(dim)":
            continue
        state = model.state_dict()
        assert state.keys() <= base.keys()
        other = {key.split("gka.")[-1] for key, value in state.items() if not torch.equal(value, base[key])}
        assert other == changed.get(name, set()), name


def test_a_start_that_no_layer_has_is_an_error() -> None:
    sizes: dict[str, Any] = dict(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = GKAForCausalLM(GKAConfig(**sizes, use_forget_gate=False, use_alpha_connection=False))
    with pytest.raises(ValueError, match=r"alpha_bias is 2.0; expected None"):
        start_from(model, Start(alpha_bias=2.0))
    with pytest.raises(ValueError, match=r"rate is 0.1, step 1.0; expected 1"):
        start_from(model, Start(rate=0.1))


# The training


def test_padded_queries_change_neither_loss_nor_accuracy() -> None:
    examples = make_mqar(6, seq_len=24, num_pairs=3, vocab_size=64)
    model = parts.build(cell(vocab_size=64)).eval()
    exact, padded = asked(examples, 3, CPU), asked(examples, 6, CPU)
    assert padded.queries.shape == (6, 6) and (padded.values[:, 3:] == IGNORE).all()
    assert accuracy(model, logits_of, exact, 4, "float32") == accuracy(model, logits_of, padded, 6, "float32")
    states = {name: x.clone() for name, x in model.state_dict().items()}
    outcomes = []
    for batch in (exact, padded):
        model.load_state_dict(states)
        found = finish(
            training(model, [batch] * 2, steps=2, learning_rate=0.1, dtype="float32", device=CPU, name="it"), CPU
        )
        outcomes.append((found["loss"], torch.cat([p.detach().flatten() for p in model.parameters()])))
    (losses, weights), (ref_losses, ref_weights) = outcomes
    assert losses == ref_losses and len(losses) == 2
    assert relative_error(weights, ref_weights) < 1e-6


def test_accuracy_counts_the_right_answers() -> None:
    examples = asked(make_mqar(5, seq_len=16, num_pairs=2, vocab_size=32), 4, CPU)
    model = parts.build(cell(vocab_size=32)).eval()
    hidden = model.model(examples.inputs, use_cache=False).last_hidden_state
    said = model.lm_head(hidden).argmax(-1)
    values = said.gather(1, examples.queries).masked_fill(examples.values == IGNORE, IGNORE)
    assert accuracy(model, logits_of, examples._replace(values=values), 2, "float32") == 1.0
    values[0, 0] += 1
    assert accuracy(model, logits_of, examples._replace(values=values), 2, "float32") == 0.9


def test_the_default_trains_as_in_the_mqar_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one order: the same batches, first weights, schedule, decay and clipping give the same losses."""
    in_order = staticmethod(lambda dataset: SequentialSampler(dataset))
    monkeypatch.setattr(RecallTrainer, "_get_train_sampler", in_order)
    (theirs,) = (c for c in mqar.cells("small") if c["mixer"] == "gka" and c.get("learning_rate") == RATES[0])
    ref = mqar.run({**theirs, "size": "small"}, tmp_path / "mqar" / "it", CPU)
    found = parts.run(cell("float32", dtype="float32"), tmp_path / "parts" / "it", CPU)
    losses, ref_losses = (torch.tensor([loss for _, loss in x["loss"]]) for x in (found, ref))
    assert len(losses) == 8 and relative_error(losses, ref_losses) < 1e-4
    assert found["accuracy"] == ref["accuracy"] and not found["graph"]


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100) for step in range(101)]
    assert factors[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and factors[100] == pytest.approx(0)
    assert rate_factor(0, 8) == 1.0 and factors[5:] == sorted(factors[5:], reverse=True)


def test_a_training_that_diverges_ends(tmp_path: Path) -> None:
    found = parts.run(cell(learning_rate=1e30), tmp_path / "parts" / "it", CPU)
    assert found["diverged"] is not None and found["gates"]["trained"] is None
    assert all(accuracy == 0 for _, _, accuracy in found["accuracy"])
    json.dumps(found, allow_nan=False)


def test_an_error_that_is_no_divergence_is_raised() -> None:
    """Also after the first step."""
    model = parts.build(cell(vocab_size=64))
    batch = asked(make_mqar(6, seq_len=24, num_pairs=3, vocab_size=64), 6, CPU)
    bad = batch._replace(values=batch.values[:, :5])
    with pytest.raises(ValueError, match="batch_size"):
        finish(
            training(model, [batch, bad], steps=2, learning_rate=1e-3, dtype="float32", device=CPU, name="it"), CPU
        )


def test_a_model_has_diverged_where_weights_or_gates_are_not_finite() -> None:
    model, inputs = parts.build(cell()), torch.randint(256, (2, 8))

    def forward() -> None:
        model.model(inputs, use_cache=False)

    def mistake() -> None:
        raise ValueError

    assert not has_diverged(model, forward) and not has_diverged(model, mistake)
    first, second = layers_of(model)
    first.A_log.data.fill_(1000.0)  # finite, but the gates are -inf * 0
    first.dt_bias.data.fill_(-1e30)
    with pytest.raises(ValueError, match="log-decays of at most 0"):
        forward()
    assert has_diverged(model, forward) and not has_diverged(model, mistake) and not first._forward_pre_hooks
    second.o_proj.weight.data[0, 0] = float("nan")
    assert has_diverged(model, mistake)


def test_gates_are_the_means_of_the_layers() -> None:
    model = parts.build(cell())
    inputs = torch.randint(256, (3, 20))
    first, second = gates_of(model, inputs)
    assert all(len(values) == 2 for values in first.values()) and first.keys() == {"decay", "alpha", "beta"}
    block = model.model.layers[0]
    g, alpha, beta = block.gka._gates(block.input_layernorm(model.model.embed_tokens(inputs)), None)  # type: ignore[operator]
    assert first["decay"] == pytest.approx(g.mean((0, 1)).exp().tolist(), abs=1e-5)
    assert first["alpha"] == pytest.approx(alpha.mean((0, 1)).tolist(), abs=1e-5)
    assert first["beta"] == pytest.approx(beta.mean((0, 1)).tolist(), abs=1e-5)
    assert second != first
    assert gates_of(parts.build(cell(PAPER)), inputs) == [{}, {}]
    assert not block.gka._forward_pre_hooks


# The cells


def test_the_default_and_the_layer_without_a_solve_come_first_and_nothing_else_differs() -> None:
    cells = parts.cells("full")
    assert [(c["variant"], c["learning_rate"]) for c in cells[:4]] == [
        (name, rate) for rate in RATES for name in (BASE, NO_SOLVE)
    ]
    count = len(VARIANTS) * 4
    assert len(cells) == 2 * count and {c["dim"] for c in cells[:count]} == {128}
    rest = [{k: v for k, v in c.items() if k in mqar.FULL} for c in cells]
    assert all(each == mqar.FULL for each in rest)
    assert len({json.dumps(c, sort_keys=True) for c in cells}) == len(cells)


def entry(variant: str, accuracy: float | list[float], rate: float = RATES[0], **changes: Any) -> dict[str, Any]:
    values = accuracy if isinstance(accuracy, list) else [accuracy] * 2
    gates = [{"decay": [0.9], "alpha": [0.5], "beta": [0.4]}]
    result = {
        "learning_rate": rate, "accuracy": [[64, 4, values[0]], [128, 8, values[1]]], "loss": [[8, 2.5]],
        "diverged": None, "graph": True, "gates": {"first": gates, "trained": [{**gates[0], "alpha": [0.75]}]},
    }  # fmt: skip
    kind = {"rates": list(RATES)} if "seed" in changes else {"learning_rate": rate}
    described = {key: value for key, value in cell(variant).items() if key != "learning_rate"}
    return {"cell": {**described, **kind, **changes}, "result": result, "seconds": 60.0}


def test_second_rates_and_seeds_wait_and_are_left_out() -> None:
    first, second = (cell("a = 0.1", learning_rate=rate) for rate in RATES)
    seed = {key: value for key, value in cell("a = 0.1", seed=1).items() if key != "learning_rate"}
    rivals = [entry(BASE, 0.5), entry(BASE, 0.6, RATES[1]), entry(NO_SOLVE, 0.7), entry(NO_SOLVE, 0.4, RATES[1])]
    assert parts.ready(first, []) is True
    assert parts.ready(second, rivals) is False, "its first rate comes first"
    assert parts.ready(second, [*rivals[:3], entry("a = 0.1", 0.6)]) is False, (
        "the layer without a solve has one rate"
    )
    assert parts.ready(second, [*rivals, entry("a = 0.1", 0.69)]) is True
    assert parts.ready(second, [*rivals, entry("a = 0.1", 0.7)]) is None
    assert parts.ready(cell(learning_rate=RATES[1]), [entry(BASE, 0.9)]) is True
    assert parts.ready(seed, rivals) is False
    assert parts.ready(seed, [*rivals, entry("a = 0.1", 0.6)]) is False
    assert parts.ready(seed, [*rivals, entry("a = 0.1", 0.7)]) is True
    assert parts.ready(seed, [*rivals, entry("a = 0.1", 0.6), entry("a = 0.1", 0.1, RATES[1])]) is True
    nothing = [entry(name, 0.0, rate) for name in (BASE, NO_SOLVE) for rate in RATES]
    assert parts.ready(second, [*nothing, entry("a = 0.1", 0.0)]) is True


def test_a_small_run_by_the_command(tmp_path: Path) -> None:
    """The other seed has the better rate; one page has the answer, one all settings."""
    arguments = ["evidence", "parts", "--output", str(tmp_path / "out"), "--device", "cpu", "--only"]
    for name in (BASE, NO_SOLVE):
        assert command_line.main([*arguments, f"variant={name}"]) == 0
    entries = Record(tmp_path / "out/parts.json", "parts").entries
    by_cell = [(e["cell"]["variant"], e["cell"]["seed"], e["result"]["learning_rate"]) for e in entries]
    assert len(by_cell) == len(set(by_cell)) == 6
    for name in (BASE, NO_SOLVE):
        tried = {
            e["result"]["learning_rate"]: parts_page._mean(e["result"])
            for e in entries
            if (e["cell"]["seed"], e["cell"]["variant"]) == (0, name)
        }
        assert next(rate for variant, seed, rate in by_cell if (variant, seed) == (name, 1)) == max(
            tried, key=tried.__getitem__
        )
    assert command_line.main(["evidence", "page", "--output", str(tmp_path / "out")]) == 0
    page, more = ((tmp_path / name).read_text() for name in ("out.md", "out/parts.md"))
    assert "128 tokens, 32 pairs and dim 32 the default has" in page and "## Dim 32" in more
    gates = {tuple(row[:2]): row[2:] for row in rows_of(more) if len(row) == 5}
    assert len(gates[BASE, "0"]) == 3 and gates[NO_SOLVE, "1"][1] == ""
    assert_drawn(tmp_path / "out/parts.png")


def test_trainings_beside_each_other_do_not_mix(tmp_path: Path) -> None:
    """The same weights and losses as one after the other."""
    found = []
    for name, more in (("alone", []), ("beside", ["--streams", "3"])):
        arguments = ["evidence", "parts", "--output", str(tmp_path / name), "--device", "cpu", *more]
        assert (
            command_line.main([*arguments, "--only", "learning_rate=0.001", f"variant={BASE}|{PAPER}|float32"])
            == 0
        )
        entries = Record(tmp_path / name / "parts.json", "parts").entries
        found.append({e["cell"]["variant"]: e["result"] for e in entries})
    alone, beside = found
    assert alone.keys() == beside.keys() == {"float32", BASE, PAPER}
    for variant, result in alone.items():
        assert beside[variant]["gates"]["first"] == result["gates"]["first"]
        losses = [torch.tensor(x["loss"]) for x in (beside[variant], result)]
        assert relative_error(*losses) < 1e-3


# The page


def seeds(variant: str, *accuracies: float, **changes: Any) -> list[dict[str, Any]]:
    first, *others = accuracies
    return [
        entry(variant, first, **changes),
        *(entry(variant, x, seed=n, **changes) for n, x in enumerate(others, 1)),
    ]


def said(*entries: dict[str, Any]) -> str:
    return parts_page.answer(parts_page.best(list(entries)))


LOW, HIGH = seeds(BASE, 0.4, 0.42, 0.41), seeds(NO_SOLVE, 0.7, 0.72, 0.71)


def test_clearly_better_is_more_than_the_margin_and_than_the_seeds_differ() -> None:
    compare = parts_page.compare
    assert compare([0.5, 0.52], [0.4, 0.41]) == 1 and compare([0.4, 0.41], [0.5, 0.52]) == -1
    assert compare([0.5, 0.65], [0.4, 0.41]) == 0 == compare([0.4, 0.41], [0.5, 0.65]), "within its own seeds"
    assert compare([0.5, 0.51], [0.3, 0.45]) == 0 == compare([0.3, 0.45], [0.5, 0.51]), "within the other's seeds"
    assert compare([0.404, 0.404], [0.4, 0.4]) == 0 and compare([0.406, 0.406], [0.4, 0.4]) == 1
    assert compare([0.9], [0.1, 0.1]) is compare([0.1, 0.1], [0.9]) is None


@pytest.mark.parametrize("number", [2, 3])
def test_how_often_the_rule_errs(number: int) -> None:
    """Normal accuracies without any effect, as the page states; APART is small beside them."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(100_000, 1, number, generator=random)
    changed = torch.randn(100_000, len(SINGLE), number, generator=random)
    least = torch.maximum(*(x.amax(-1) - x.amin(-1) for x in (base, changed)))
    better = changed.amin(-1) > base.amax(-1) + least
    assert better.any(1).float().mean().item() == pytest.approx(parts_page.NOISE[number], abs=0.008)
    assert f"{parts_page.NOISE[number]:.0%} of all cases with {number} seeds" in parts_page._RULE
    assert len(SINGLE) == 14


def test_the_answer_compares_the_default_with_the_layer_without_a_solve() -> None:
    assert "has not been trained yet" in said(*LOW)
    text = said(*LOW, *HIGH)
    assert "41.0 (40.0 to 42.0)" in text and ": clearly worse." in text
    assert "No change can be compared with the default yet. 0 of 14 changes have a verdict; not trained:" in text
    assert "no clear difference" in said(*LOW, *seeds(NO_SOLVE, 0.5, 0.4))
    assert ": clearly better." in said(*LOW, *seeds(NO_SOLVE, 0.1, 0.12))
    text = said(*LOW[:1], *HIGH, *seeds("a = 0.1", 0.9, 0.91))
    assert "no verdict, as not both have two seeds. No change can be compared" in text
    assert '; no verdict, as they or the default have one seed alone: "a = 0.1";' in text
    assert "no verdict, as not both" in said(*LOW, *HIGH[:1])


def test_the_answer_names_changes_that_make_up_for_the_difference() -> None:
    helps, enough = seeds("a = 0.1", 0.55, 0.56), seeds("no beta gate", 0.71, 0.70)
    assert 'none makes up for the difference alone: "a = 0.1"' in said(*LOW, *HIGH, *helps)
    text = said(*LOW, *HIGH, *helps, *enough, *seeds("a = 0.01", 0.2, 0.22))
    assert 'One change makes up for the difference: "no beta gate" (' in text
    assert '; clearly worse: "a = 0.01".' in text and "default: all of them;" in text
    assert "; none is clearly worse." in said(*LOW, *HIGH, *enough)
    wide = seeds("a = 0.1", 0.60, 0.69)  # not clearly worse than without the solve, but its median is lower
    assert parts_page.compare([0.60, 0.69], [0.7, 0.72, 0.71]) == 0
    assert 'none makes up for the difference alone: "a = 0.1"' in said(*LOW, *HIGH, *wide)
    near = seeds("a = 0.1", 0.706, 0.706)
    assert 'One change makes up for the difference: "a = 0.1"' in said(*LOW, *HIGH, *near), "within the margin"
    equal = seeds(NO_SOLVE, 0.42, 0.4)
    assert 'Clearly better than the default with one change: "a = 0.1"' in said(*LOW, *equal, *helps)
    text = said(*LOW, *HIGH, *seeds("a = 0.1", 0.42, 0.4))
    assert "No change with a verdict is clearly better than the default there; none is clearly worse." in text
    text = said(*LOW, *HIGH, *seeds(PAPER, 0.9, 0.91), *seeds(LINEAR, 0.9, 0.91))
    assert "figure 3a" not in text, "more than one change"


def test_the_answer_names_changes_that_are_nowhere_worse() -> None:
    helps = seeds("a = 0.1", 0.55, 0.56)
    hard = [entry("no beta gate", [0.1, 0.7]), entry("no beta gate", [0.1, 0.7], seed=1)]
    assert "clearly worse than the default: all of them;" in said(*LOW, *HIGH, *helps)
    assert "clearly worse than the default: none;" in said(*LOW, *HIGH, *hard), "worse at the easy setting"
    assert 'clearly worse than the default: "a = 0.1";' in said(*LOW, *HIGH, *hard, *helps)
    other = seeds(BASE, 0.9, 0.9, dim=16)
    assert "default: none;" in said(*LOW, *HIGH, *helps, *other), "not trained at the other dim"
    assert "default: none;" in said(*LOW, *HIGH, *helps, *other, *seeds("a = 0.1", 0.9, dim=16)), "one seed there"
    assert "default: all of them;" in said(*LOW, *HIGH, *helps, *other, *seeds("a = 0.1", 0.9, 0.9, dim=16))


def test_the_answer_says_what_has_no_verdict() -> None:
    text = said(*LOW, *HIGH, *seeds("a = 0.1", 0.5, 0.51), *seeds("a = 0.05", 0.9))
    assert (
        '1 of 14 changes have a verdict; no verdict, as they or the default have one seed alone: "a = 0.05"'
        in text
    )
    missing = text.split("not trained: ")[1]
    assert missing.count('"') == 2 * 12 and '"float32"' in missing and '"a = 0.05"' not in missing
    every = [e for name in SINGLE for e in seeds(name, 0.41, 0.42)]
    assert said(*LOW, *HIGH, *every).endswith("14 of 14 changes have a verdict.")


def test_the_table_has_the_best_rate_and_at_most_ten_rows(tmp_path: Path) -> None:
    entries = [*seeds(BASE, 0.4, 0.5), entry(BASE, 0.3, RATES[1]), *seeds(NO_SOLVE, 0.7, 0.6)]
    entries += [entry(name, 0.41 + 0.02 * n) for n, name in enumerate(list(VARIANTS)[2:])]
    entries += seeds(BASE, 0.9, 0.8, dim=16)
    text = parts_page.overview(entries)
    assert text.startswith("Does the default layer recall less") and f'Exceptions: "{NO_SOLVE}"' in text
    table = rows_of(text)
    assert len(table) == 12 and table[2][0] == BASE and table[3][0] == NO_SOLVE
    assert table[2][1:] == ["45.0 (40.0 to 50.0)"] * 2 + ["85.0 (80.0 to 90.0)"] * 2
    assert table[4][0] == list(VARIANTS)[-1], "the best of the others first"
    more = parts_page.section(entries, tmp_path / "parts.png")
    assert "## Dim 32" in more and "## Dim 16" in more
    assert [BASE, "0", "9.5 to 9.5", "0.50 to 0.75", "0.40 to 0.40"] in rows_of(more)
    assert_drawn(tmp_path / "parts.png")
    alone = [entry(BASE, 0.4, seed=1)]
    assert parts_page.section(alone, tmp_path / "it.png") == parts_page.overview(alone) == parts_page._NOTHING
