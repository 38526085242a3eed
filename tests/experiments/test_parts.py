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
from experiments.evidence import command, mqar, parts, parts_page
from experiments.evidence.parts import BASE, NO_SOLVE, RATES, VARIANTS
from experiments.evidence.record import Record
from experiments.evidence.starts import Start, start_from
from experiments.tasks.mqar import IGNORE, make_mqar
from experiments.tasks.mqar_replay import accuracy, asked, gates_of, rate_factor, train
from experiments.tasks.mqar_train import RecallTrainer
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
    assert not layer[NO_SOLVE].solves and not layer[parts.LINEAR].solves and layer[parts.PAPER].solves
    for name in (parts.PAPER, parts.LINEAR):
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
    assert accuracy(model, exact, 4, "float32") == accuracy(model, padded, 6, "float32")
    states = {name: x.clone() for name, x in model.state_dict().items()}
    outcomes = []
    for batch in (exact, padded):
        model.load_state_dict(states)
        found = train(model, [batch] * 2, steps=2, learning_rate=0.1, dtype="float32", device=CPU, name="it")
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
    assert accuracy(model, examples._replace(values=values), 2, "float32") == 1.0
    values[0, 0] += 1
    assert accuracy(model, examples._replace(values=values), 2, "float32") == 0.9


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
    assert gates_of(parts.build(cell(parts.PAPER)), inputs) == [{}, {}]
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


# The page


def seeds(variant: str, *accuracies: float, **changes: Any) -> list[dict[str, Any]]:
    first, *others = accuracies
    return [
        entry(variant, first, **changes),
        *(entry(variant, x, seed=n, **changes) for n, x in enumerate(others, 1)),
    ]


def test_the_answer(tmp_path: Path) -> None:
    base, none = seeds(BASE, 0.4, 0.5, 0.45), seeds(NO_SOLVE, 0.7, 0.72, 0.71)

    def said(*entries: dict[str, Any]) -> str:
        return parts_page.answer(parts_page.best(list(entries)))

    assert "has not been trained yet" in said(*base)
    text = said(*base, *none)
    assert "45.0 (40.0 to 50.0)" in text and ": clearly worse." in text
    assert "No single change is clearly better" in text and "no change is clearly worse" in text
    helps, enough = seeds("a = 0.1", 0.55, 0.6), seeds("no beta gate", 0.71, 0.69)
    assert 'none makes up for the difference alone: "a = 0.1"' in said(*base, *none, *helps)
    text = said(*base, *none, *helps, *enough, *seeds("a = 0.01", 0.2, 0.3))
    assert 'One change makes up for the difference: "no beta gate"' in text and 'clearly worse: "a = 0.01"' in text
    assert "worse than the default: all of them" in text
    hard = [entry("no beta gate", [0.1, 0.7]), entry("no beta gate", [0.1, 0.7], seed=1)]
    assert "clearly worse than the default: none" in said(*base, *none, *hard), "worse at the easy setting"
    assert 'clearly worse than the default: "a = 0.1";' in said(*base, *none, *hard, *helps)
    equal = seeds(NO_SOLVE, 0.5, 0.4)
    assert "no clear difference" in said(*base, *equal)
    assert 'Clearly better than the default with one change: "a = 0.1"' in said(*base, *equal, *helps)
    assert ": clearly better." in said(*base, *seeds(NO_SOLVE, 0.1, 0.2))
    assert 'one seed alone, so no verdict: "a = 0.05"' in said(*base, *none, *seeds("a = 0.05", 0.9))
    figure = said(*base, *none, *seeds(parts.PAPER, 0.9, 0.95))
    assert parts.PAPER not in figure, "more than one change"


def test_the_table_has_the_best_rate_and_at_most_ten_rows(tmp_path: Path) -> None:
    entries = [*seeds(BASE, 0.4, 0.5), entry(BASE, 0.3, RATES[1]), *seeds(NO_SOLVE, 0.7, 0.6)]
    entries += [entry(name, 0.41 + 0.02 * n) for n, name in enumerate(list(VARIANTS)[2:])]
    entries += seeds(BASE, 0.9, 0.8, dim=16)
    table = rows_of(parts_page.overview(entries))
    assert len(table) == 12 and table[2][0] == BASE and table[3][0] == NO_SOLVE
    assert table[2][1:] == ["45.0 (40.0 to 50.0)"] * 2 + ["85.0 (80.0 to 90.0)"] * 2
    assert table[4][0] == list(VARIANTS)[-1], "the best of the others first"
    more = parts_page.section(entries, tmp_path / "parts.png")
    assert "## Dim 32" in more and "## Dim 16" in more
    assert [BASE, "0", "9.5 to 9.5", "0.50 to 0.75", "0.40 to 0.40"] in rows_of(more)
    assert_drawn(tmp_path / "parts.png")
    alone = [entry(BASE, 0.4, seed=1)]
    assert parts_page.section(alone, tmp_path / "it.png") == parts_page.overview(alone) == parts_page._NOTHING


def test_the_experiment_runs_in_processes() -> None:
    assert command.EXPERIMENTS["parts"] == parts.__name__ and callable(parts.ready)
