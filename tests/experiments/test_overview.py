"""The evidence page in short: tables of at most ten rows, and answers that follow from made-up results."""

from __future__ import annotations

import itertools
from typing import Any

from pages import rows_of

from experiments.evidence import ablations, cost, overview
from experiments.evidence.catalogue import EXPERIMENTS
from experiments.evidence.numerics import SOLVERS
from experiments.tasks.recall_train import RATES

Entries = list[dict[str, Any]]


def entry(result: dict[str, Any], **cell: Any) -> dict[str, Any]:
    return {"cell": cell, "result": result, "seconds": 1.0}


def test_every_experiment_has_an_overview() -> None:
    assert set(overview.OVERVIEWS) == set(EXPERIMENTS)


def test_numerics_names_the_most_exact_solvers() -> None:
    wide, narrow, of_gradients = list(SOLVERS)[1:4]
    best = {
        ("iterations", "float32"): wide,
        ("iterations", "bfloat16"): narrow,
        ("gradients", "bfloat16"): of_gradients,
    }
    entries = [
        entry(
            {
                "products": [10, 30],
                "error": [1.0, 1e-6 if best.get((part, dtype)) == solver else 0.1 * (seed + 1)],
            },
            part=part, solver=solver, dtype=dtype, seed=seed, layers=5,
        )
        for part, solver, dtype, seed in itertools.product(
            ("iterations", "gradients"), SOLVERS, ("float32", "bfloat16"), range(3)
        )
    ]  # fmt: skip
    text = overview.numerics(entries)
    places = [text.index(f"of {name} (1.0e-06)") for name in (wide, narrow, of_gradients)]
    assert places == sorted(places)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows[next(iter(SOLVERS))] == ["2.0e-01"] * 4 and len(rows) == 2 + len(SOLVERS)


def test_mqar_counts_settings_and_names_failed_trainings() -> None:
    accuracies = {"gka": (0.9, 0.5), "gla": (0.5, 0.9), "gdn": (0.9, 0.5), "attention": (0.01, 0.02)}
    entries = [
        entry(
            {"accuracy": [[64, 4, easy], [64, 16, hard]], "learning_rate": 0.1},
            mixer=mixer, dim=32, seed=0, learning_rate=0.1,
        )
        for mixer, (easy, hard) in accuracies.items()
    ]  # fmt: skip
    text = overview.mqar(entries)
    assert ["32", "70.0", "70.0", "1.5", "70.0"] in rows_of(text)
    assert "GLA (no solve): better in 1, equal in 0, worse in 1; Gated DeltaNet: better in 0, equal in 2" in text
    assert "say nothing about the mixer: softmax attention at dim 32." in text
    assert "Failed" not in overview.mqar([one for one in entries if one["cell"]["mixer"] != "attention"])


def test_recall_marks_what_has_not_run() -> None:
    def training(mixer: str, dim: int, accuracy: float, rate: float, **place: int) -> dict[str, Any]:
        ended = "solved" if accuracy > 0.99 else "all epochs"
        result = {"accuracy": accuracy, "ended": ended, "graph": True, "history": [[1, accuracy, 1.0]] * 3}
        return entry(result, mixer=mixer, dim=dim, learning_rate=rate, seed=0, **place)

    place = dict(seq_len=64, num_pairs=4)
    entries = [training("gka-paper", 64, 0.995, 1e-2, **place), training("attention", 64, 0.999, 1e-2, **place)]
    entries += [training("gla", 64, 0.4, rate, **place) for rate in RATES]
    entries += [training("gla", 128, 0.4, RATES[0], **place)]
    text = overview.recall(entries)
    assert ["64, 4", "99.5 / ?", "40.0 / 40.0?", "99.9 / ?"] in rows_of(text)
    assert "no verdict on figure 3a yet: 1 of 2 comparisons are decided" in text
    assert "at the 1 settings that these mixers all reach: GKA, no gates 3, softmax attention 3." in text


def test_lm_says_which_mixers_are_better_for_every_seed() -> None:
    losses = {
        "gka": (2.0, 2.1),
        "gla": (2.2, 2.3),
        "gdn": (1.9, 2.2),
        "attention": (1.5, 1.6),
        "mamba2": (2.3, None),
    }
    entries = [
        entry(
            {"held out": None if loss is None else {"loss": loss, "recall_loss": loss / 2}, "parameters": 1,
             "learning_rate": 0.1},
            mixer=mixer, part="model", seed=seed,
        )
        for mixer, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]  # fmt: skip
    entries.append(entry({"tokens per second": 1234.0}, mixer="gka", part="speed"))
    text = overview.lm(entries)
    assert ["GKA", "2.050 (2.000 to 2.100)", "1.025 (1.000 to 1.050)", "1,234"] in rows_of(text)
    assert "higher for every seed than with softmax attention" in text
    assert "lower for every seed than with GLA (no solve), Mamba-2" in text
    assert "lower for some seeds and higher for others than with Gated DeltaNet" in text


def test_long_separates_differences_from_chance() -> None:
    def score(mixer: str, each: list[float], length: int = 4096) -> dict[str, Any]:
        result = {"score": sum(each) / len(each), "each": each, "exact match": 0.0}
        return entry(result, mixer=mixer, part="score", task="vt", length=length, seq_len=4096, examples=4)

    ours, near, far = [0.5, 0.6, 0.5, 0.6], [0.6, 0.4, 0.6, 0.5], [0.1, 0.2, 0.2, 0.2]
    text = overview.long([score("gka", ours), score("gla", near), score("gdn", far)])
    assert "differs from that of Gated DeltaNet (+37.5" in text
    assert "is within two standard errors of that of GLA (no solve) (+2.5" in text
    assert "not seen in training" not in text
    assert "not seen in training" in overview.long([score("gka", ours), score("gka", ours, 8192)])


def test_ablations_show_the_largest_differences() -> None:
    losses = {name: 3.0 + 0.01 * number for number, name in enumerate(ablations.TRIALS)}
    losses["a = 0.1"], losses["steps (31,)"] = 2.5, 3.02
    losses |= {name: 3.0 for name in ablations._ALIKE if name != "steps (31,)"}
    entries = [
        entry({"held out": {"loss": loss + seed}, "spikes": [3] * (name == "a = 0.1")}, variant=name, seed=seed)
        for name, loss in losses.items()
        for seed in (0, 1)
    ]
    text = overview.ablations(entries)
    rows = rows_of(text)
    assert rows[2] == ["a = 0.1", "-0.500 (-0.500 to -0.500)", "2"] and len(rows) == 2 + overview.ROWS
    assert "up to 0.020 in one seed" in text and 'better by more than that: "a = 0.1".' in text
    assert '"sketch, d = 64"' in text


def test_cost_compares_the_longest_sequences() -> None:
    seconds = {"gka": 0.2, "gdn": 0.5, "attention": 2.0}
    entries = [
        entry({"seconds": [s * T / 64] * 3, "peak bytes": 1, "cache bytes": 10**6 * (1 if mixer == "gka" else T)},
              mixer=mixer, what=what, tokens=T)
        for (mixer, s), what, T in itertools.product(seconds.items(), cost.WHAT, (8, 16, 32, 64))
    ]  # fmt: skip
    text = overview.cost(entries)
    assert ["forward", "8", "25", "62.5", "250"] in rows_of(text) and len(rows_of(text)) == 2 + 9
    assert "take GKA 200 ms" in text and "Gated DeltaNet 2.5 times, softmax attention 10 times as long" in text
    assert "GKA block has 1 MB, that of softmax attention 64 MB" in text
