"""The experiment spectra: its numbers against direct computations, a whole small run, the rules of its page."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error
from pages import assert_drawn, rows_of
from torch import Tensor

from experiments import __main__ as command_line
from experiments.evidence import command, spectra, spectra_measure, spectra_page
from experiments.evidence.corpus import Corpus, prepare
from experiments.evidence.lm import language_model, model_folder
from experiments.evidence.page import write_page
from experiments.evidence.record import Record
from experiments.evidence.spectra_measure import MOST_PRODUCTS, TOLERANCES, Inputs
from experiments.evidence.table import paired
from gka import GKAForCausalLM
from gka.ops import reference
from gka.ops.solvers import ConjugateGradient
from gka.training.data import write_tokens
from gka.training.errors import UserError

A = 0.02
POSITIONS = (0, 3, 4, 16, 22)


def inputs(T: int = 23, H: int = 4, Hk: int = 2, D: int = 7, gates: bool = True) -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, T, *shape, generator=draw, dtype=torch.float64)

    g = torch.nn.functional.logsigmoid(normal(H) + 2)
    alpha, beta = (normal(H).sigmoid(), normal(H).sigmoid()) if gates else (None, None)
    return Inputs(normal(H, D) + 1, normal(Hk, D) + 1, normal(Hk, D), g, alpha, beta)


# The numbers


@pytest.mark.parametrize("gates", [True, False])
def test_states_are_those_of_the_recursion(gates: bool) -> None:
    x = inputs(gates=gates)
    found = spectra_measure.states_at(x, POSITIONS)
    for number, position in enumerate(POSITIONS):
        prefix = [None if tensor is None else tensor[:, : position + 1] for tensor in x]
        _, S_kk, *_ = flat(
            reference.gated_kalmanet(
                *prefix, ridge_ratio=A, solver_steps=None, scale=1.0, initial_state=None, output_final_state=True,
                cu_seqlens=None, normalize_qk=True,
            )  # type: ignore[arg-type]
        )  # fmt: skip
        assert relative_error(found[number], S_kk[0]) < 1e-12


def flat(result: Any) -> list[Tensor]:
    """o and the states, however they are nested."""
    return [x for part in result for x in (part if isinstance(part, tuple) else (part,))]


def test_spectra_are_those_of_the_definition() -> None:
    S = spectra_measure.states_at(inputs(), POSITIONS)
    found = spectra_measure.spectrum(S, A)
    for place in itertools.product(range(S.shape[0]), range(S.shape[1])):
        values = np.sort(np.linalg.svd(S[place].numpy(), compute_uv=False))[::-1]  # symmetric, at least 0
        share = values[values > 1e-14] / values.sum()
        assert found["rank"][place] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)
        norm = np.linalg.norm(S[place].numpy())
        assert found["top"][place] == pytest.approx(values[0] / norm, rel=1e-12)
        assert found["below"][place].tolist() == (norm * A > values).tolist()
    one = torch.eye(5, dtype=torch.float64)
    whole = spectra_measure.spectrum(torch.stack([one, torch.outer(one[0], one[0]), 0 * one]), A)
    assert whole["rank"][:2].tolist() == pytest.approx([5.0, 1.0]) and whole["top"][1] == 1.0
    assert whole["below"].sum(-1).tolist()[:2] == [0, 4] and whole["rank"].isfinite().all()


def test_memory_is_counted_token_by_token() -> None:
    g = inputs(T=60).g
    g[..., 0] = -1e-3  # forgets nothing within the sequence
    g[0, 30, 1] = -5.0
    positions = (0, 7, 30, 31, 59)
    found = spectra_measure.memory_at(g, positions)
    for (row, t), h in itertools.product(enumerate(positions), range(g.shape[2])):
        passed, n = 0.0, 0
        while n <= t and passed > -1:
            passed += g[0, t - n, h].item()
            n += 1
        assert found[row, h] == (n if passed <= -1 and n <= t else t + 1), (t, h)
    assert found[:, 0].tolist() == [t + 1 for t in positions] and found[2, 1] == 1


def systems() -> tuple[Tensor, Tensor]:
    x = inputs(T=40, Hk=4, D=16)
    S = spectra_measure.states_at(x, (9, 39)).flatten(0, 1)
    q = spectra_measure.unit(x.q[0, [9, 39]]).flatten(0, 1)
    return S / S.flatten(1).norm(dim=1)[:, None, None], q


def test_chebyshev_products_are_those_of_the_polynomial() -> None:
    """The residual of n products is T(2 e - 1) / T(-1 - 2 a), of degree n + 1, in the basis of eigenvectors."""
    S, q = systems()
    found = spectra_measure.chebyshev_products(S, q, A)
    values, vectors = torch.linalg.eigh(S)
    parts = (vectors.transpose(1, 2) @ q[..., None])[..., 0]

    def residual(products: int) -> Tensor:
        T = np.polynomial.Chebyshev.basis(products + 1)
        return (torch.from_numpy(T(2 * values.numpy() - 1) / T(-1 - 2 * A)) * parts).norm(dim=1) / q.norm(dim=1)

    for number, tolerance in enumerate(TOLERANCES):
        for system, count in enumerate(found[number].tolist()):
            assert count <= MOST_PRODUCTS and residual(count)[system] <= tolerance * (1 + 1e-6)
            assert all(residual(fewer)[system] > tolerance * (1 - 1e-6) for fewer in range(count))


def test_conjugate_gradient_products_are_enough_and_no_more() -> None:
    S, q = systems()
    for tolerance in TOLERANCES:
        found = spectra_measure.conjugate_gradient_products(S, q, A, tolerance)
        for system, count in enumerate(found.int().tolist()):
            one = S[system : system + 1], q[system : system + 1]
            for products, reached in ((count, True), (count - 1, False)):
                x = ConjugateGradient((products,)).solve(*one, A) if products else 0 * one[1]
                residual = ((one[0] @ x[..., None])[..., 0] + A * x - one[1]).norm() / one[1].norm()
                assert (residual <= tolerance) == reached


def test_chunks_need_the_most_of_their_tokens() -> None:
    x = inputs(T=64, Hk=4, D=16)
    found = spectra_measure.products_of_layer(x, range(64), A)
    for tolerance in TOLERANCES:
        products = found[f"{tolerance:g}"]
        by_head = torch.tensor(products["cg"]).view(64, 4).amax(0)
        apart = torch.tensor(products["chunks"]) - by_head
        assert apart.abs().max() <= (1 if tolerance >= 1e-2 else 3)  # float32 loses directions
        assert np.median(products["chebyshev"]) >= np.median(products["cg"])


# A whole run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and an untrained model in the place of that of `lm`."""
    folder = tmp_path_factory.mktemp("evidence")
    texts = folder / "texts"
    texts.mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        words = (f"name_{draw.integers(50)}" for _ in range(700))
        (texts / f"{number}.py").write_text(" ".join(words))
    prepare(folder, "small", [str(texts)])
    return folder


def save_model(folder: Path, output: Path, mixer: str = "gka") -> None:
    tokenizer = Corpus.load(output, "small").tokenizer
    torch.manual_seed(0)
    model = GKAForCausalLM(language_model(mixer, "small", len(tokenizer), tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_whole_run(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["evidence", "spectra", "--output", str(output), "--device", "cpu"]
    assert command_line.main(run) == 2
    assert "lm --size small --only mixer=gka" in capsys.readouterr().err
    save_model(model_folder(output, "small", "gka"), output)
    assert command_line.main(run) == 0
    entries = Record(output / "spectra.json", "spectra").entries
    layers, products, *losses = (entry["result"] for entry in entries)
    assert (
        [layer["layer"] for layer in layers["layers"]]
        == [layer["layer"] for layer in products["layers"]]
        == [0, 1]
    )
    for layer in layers["layers"]:
        assert len(layer["below"]) == layers["D"] == 32 and len(layer["rank"]) == len(layer["memory"]) == 2
        assert all(1 <= rank <= 32 for rank in layer["rank"]) and 0 < layer["beta"][0] < layer["beta"][2] < 1
    exact, eight = losses[0], losses[2]
    assert len(exact["windows"]) == 4 and 0 < abs(paired(exact["windows"], eight["windows"])[0]) < 0.1
    texts = write_page(output).read_text(), (output / "spectra.md").read_text()
    assert len(spectra.SETTINGS) == len(losses) <= spectra_page.MOST_ROWS
    for text in texts:
        assert f"{exact['loss']:.5f}" in text and "The median head of a layer remembers" in text
    assert len(rows_of(texts[0])) == 2 + len(losses)
    assert_drawn(output / "spectra.png")


def test_the_loss_is_that_of_the_model(output: Path) -> None:
    folder = output / "other"
    save_model(folder, output)
    model = GKAForCausalLM.from_pretrained(folder)
    tokens = torch.arange(2 * 65).view(2, 65) % 60
    found = spectra._loss({"solver": "chebyshev", "steps": [2], "dtype": "float32"}, model, tokens)
    assert model.config.solver_steps is None
    model.set_solver("chebyshev", [2])
    with torch.no_grad():
        whole = model(tokens, labels=tokens).loss.item()
    assert found["loss"] == pytest.approx(whole, rel=1e-5) and [count for _, count in found["windows"]] == [64, 64]


def test_other_models_bring_their_text(output: Path, tmp_path: Path) -> None:
    run, texts = tmp_path / "run", output / "texts"
    save_model(run / "model", output)
    with pytest.raises(UserError, match="has no held-out text; expected text files in --data"):
        spectra.prepare(output, "small", None, str(run))
    fields = spectra.prepare(output, "small", [str(texts / "0.py")], str(run))
    tokenizer = Corpus.load(output, "small").tokenizer
    cell = {**spectra.cells("small")[-1], "size": "small", **fields}
    named = spectra._held_out(cell, output, tokenizer)
    assert tokenizer.decode(named[:-1]) == (texts / "0.py").read_text() and named[-1] == tokenizer.eos_token_id
    write_tokens(run / "data", [str(texts)], tokenizer, 0.2)
    cell |= spectra.prepare(output, "small", None, str(run))
    assert (
        spectra._held_out(cell, output, tokenizer).tolist()
        == np.fromfile(run / "data/validation.bin", "uint16").tolist()
    )
    with pytest.raises(UserError, match="expected at least 1000001 for one window"):
        spectra._windows({**cell, "tokens": 1_000_000}, output, tokenizer)
    save_model(tmp_path / "gla", output, "gla")
    with pytest.raises(UserError, match="its mixer is gla; expected a model with GKA layers"):
        spectra.prepare(output, "small", [str(texts)], str(tmp_path / "gla"))
    with pytest.raises(UserError, match="--model x: numerics has no such option"):
        command.measure("numerics", "small", tmp_path, [], "cpu", given={"model": "x"})


# The page


def made_up(
    memory: list[float], rank: float, shifts: dict[int, list[float]], layers: int = 12, cut: float = 0.0
) -> list[dict[str, Any]]:
    """Results whose loss, with the setting of each number, differs by `shifts` in each window of ten tokens."""
    cells = [{**cell, "model": "it", "weights": "w", "size": "full"} for cell in spectra.cells("full")]
    each = [
        {"layer": n, "below": [0.0] * 16 + [0.5] * 16, "memory": [m, 2 * m, 3 * m], "memory cut": cut,
         "rank": [rank] * 3, "top": [0.5] * 3, "beta": [0.1, 0.5, 0.9]}
        for n, m in enumerate(memory * layers)
    ][:layers]  # fmt: skip
    counts = {
        f"{t:g}": {name: [n + 1.0, n + 2.0, n + 3.0] for name in ("cg", "chebyshev", "chunks")}
        for n, t in enumerate(TOLERANCES)
    }
    shared = {"D": 32, "trained length": 2048, "ridge ratio": 0.02}
    results: list[dict[str, Any]] = [{"layers": each, **shared}, {"layers": [{"layer": 0, **counts}], **shared}]
    for number in range(len(spectra.SETTINGS)):
        shift = shifts.get(number, [0.0, 0.0, 0.0])
        windows = [[20.0 + 10 * x, 10] for x in shift]
        results.append({"windows": windows, "loss": 2.0 + sum(shift) / 3})
    return [{"cell": cell, "result": result} for cell, result in zip(cells, results, strict=True)]


def test_retention_is_said_by_rule(tmp_path: Path) -> None:
    even = spectra_page.page_text(made_up([50.0], 5.0, {}))
    assert "The median head of a layer remembers about 100 tokens, and S_kk has few directions" in even
    assert "5.0 of 32, and 25% of its eigenvalues are less than the ridge" in even
    assert "longer than the text" not in even
    uneven = spectra.section(made_up([50.0, 500.0], 20.0, {}, cut=0.25), tmp_path / "x.png")
    assert "At 25% of the positions and heads the memory is longer than the text before them." in uneven
    assert "100 tokens (layer 0) to 1,000 tokens (layer 1), and S_kk has many directions" in uneven
    assert_drawn(tmp_path / "x.png")


def test_layers_are_at_most_ten_rows() -> None:
    rows = rows_of(spectra_page.page_text(made_up([50.0], 5.0, {}, layers=28)))
    numbers = [int(row[0]) for row in rows if len(row) == 7 and row[0].isdigit()]
    assert numbers == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert [row[5:] for row in rows if row[0] == "0"] == [
        ["1", "0.50 (0.10 to 0.90)"]
    ]  # without an alpha connection


def test_solvers_are_said_by_rule() -> None:
    def text(**shifts: list[float]) -> str:
        return spectra_page.page_text(made_up([50.0], 5.0, {int(k[1:]): v for k, v in shifts.items()}))

    same = text()
    assert "90% of the solves of a median layer need 3 products of conjugate gradient or 3 of Chebyshev" in same
    assert "down to 5 products (conjugate gradient (5,) in bfloat16)." in same
    worse = text(_9=[0.01, 0.02, 0.03], _6=[0.002, 0.002, 0.0021])
    assert "down to 7 products (Chebyshev (8,) in float32)" in worse
    assert (
        "it rises by 0.0020 with Chebyshev (8,) in bfloat16, 0.0200 with conjugate gradient (5,) in bfloat16."
        in worse
    )
    row = next(row for row in rows_of(worse) if row[0] == "conjugate gradient (5,) in bfloat16")
    assert row[1:] == ["5", "2.02000", "+0.02000 ± 0.00577"]
    noisy = text(_9=[0.5, -0.4, 0.1])
    assert "down to 7 products" in noisy and "rises" not in noisy  # nothing is known about 5 products
    lower = text(**{f"_{n}": [-0.1, -0.1, -0.1] for n in range(1, 10)})
    assert "the loss falls with all other settings." in lower
    part = spectra_page.page_text(made_up([50.0], 5.0, {})[3:])  # without the reference
    assert part.startswith("How does a trained model use the solve? The model is it. It reads windows of 32,768")
    assert not rows_of(part)
