"""Recall in Zoology's setting: model, training, the rules that save trainings, processes, and the page."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from pages import assert_drawn, rows_of
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from experiments import __main__ as command_line
from experiments.evidence import recall, recall_page, workers
from experiments.evidence.record import Record
from experiments.tasks import one_configuration, recall_model, recall_train
from experiments.tasks.recall_mixers import MIXERS, Mamba2, heads, state_size
from experiments.tasks.recall_model import RecallModel
from experiments.tasks.recall_train import RATES, Steps, hopeless, make_examples, training
from experiments.tasks.stepwise import Stepwise, finish
from gka.training.errors import UserError

CPU = torch.device("cpu")
HERE = ("gka-paper", "gka", "linear", "mamba2", "attention")  # those that run on a CPU
Cell = dict[str, Any]


def cell(**changes: Any) -> Cell:
    tiny = dict(mixer="attention", dim=16, seq_len=16, num_pairs=2, vocab_size=16, train_examples=100)
    rest = dict(test_examples=30, batch_size=32, epochs=4, learning_rate=1e-2, seed=0, dtype="float32")
    return {**tiny, **rest, **changes}


def model(mixer: str, dim: int = 16, T: int = 11) -> RecallModel:
    torch.manual_seed(0)
    return RecallModel(MIXERS[mixer].build, 16, dim, T if mixer == "attention" else 0).eval()


# The model


@pytest.mark.parametrize("mixer", HERE)
def test_models_are_causal_and_every_parameter_has_a_gradient(mixer: str) -> None:
    made, inputs = model(mixer), torch.randint(16, (2, 11))
    made.tokens.weight.data.mul_(20)  # so that the solve has something to do
    logits = made(inputs, torch.tensor([[3, 7], [3, 7]]))
    assert logits.shape == (2, 2, 16)
    changed = inputs.clone()
    changed[:, 5:] = 0
    other = made(changed, torch.tensor([[3, 7], [3, 7]]))
    assert torch.allclose(logits[:, 0], other[:, 0], atol=1e-5) and not torch.allclose(logits[:, 1], other[:, 1])
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())


def test_a_block_adds_the_mixer_and_then_its_own_norm() -> None:
    made, inputs = model("attention"), torch.randint(16, (1, 11))
    norm, queries = torch.nn.functional.layer_norm, torch.arange(11)[None]
    r = made.tokens.weight[inputs] + made.positions.weight  # type: ignore[union-attr]
    for block in made.blocks:
        r = r + block.mixer(norm(r, (16,)))  # type: ignore[operator]
        r = r + norm(r, (16,))
    assert relative_error(made(inputs, queries), norm(r, (16,)) @ made.tokens.weight.T) < 1e-5


def test_first_weights_are_zoologys() -> None:
    for mixer in HERE:
        made = model(mixer, 64, 64)
        linear = {
            name: x for name, x in made.named_modules() if isinstance(x, torch.nn.Linear) and len(x.weight) > 2
        }
        assert made.tokens.weight.std().item() == pytest.approx(0.02, rel=0.15)
        for name, module in linear.items():
            out = name.endswith(("o_proj", "out_proj"))
            assert module.weight.std().item() == pytest.approx(0.01 if out else 0.02, rel=0.1), (mixer, name)
            assert module.bias is None or not module.bias.any()
        assert (made.positions is None) == (mixer != "attention")


def test_mamba2_equals_transformers() -> None:
    """Outputs and all gradients, at a length that is no multiple of a chunk."""
    ours = MIXERS["mamba2"].build(12, 0)
    assert isinstance(ours, Mamba2)
    x = torch.randn(2, 21, 12, requires_grad=True)
    outcomes = []
    for out in (ours(x), Mamba2Mixer.forward(ours, x)):
        w = torch.linspace(-1, 1, out.numel()).view_as(out)
        leaves = [x, *ours.parameters()]
        outcomes.append([out, *torch.autograd.grad((out * w).sum(), leaves)])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*outcomes, strict=True))


def test_the_paper_layer_has_no_gates_and_linear_attention_no_solve() -> None:
    paper, plain, ours = (MIXERS[mixer].build(16, 0) for mixer in ("gka-paper", "linear", "gka"))
    for gate in ("a_proj", "b_proj", "alpha_proj"):
        assert getattr(paper, gate) is getattr(plain, gate) is None and getattr(ours, gate) is not None
    assert paper.solves and not plain.solves
    assert [heads(dim) for dim in (64, 128, 256)] == [1, 1, 2]
    assert state_size("gka", 256, 9) == 2 * 2 * 128**2 and state_size("attention", 64, 9) == 2 * 64 * 9


def test_layers_of_other_packages_are_named_when_missing() -> None:
    pytest.importorskip("triton")
    try:
        import fla  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="MesaNet is a layer of flash-linear-attention"):
            MIXERS["mesa"].build(16, 0)


@pytest.mark.parametrize("too_large, runs", [((), [0]), ((0,), [0, 1]), ((0, 1), [0, 1, 2])])
def test_one_configuration_that_fits_is_taken(
    too_large: tuple[int, ...], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those with four warps, the default. Others are not tried, and what was taken is not kept on disk."""
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner, OutOfResources

    for name in ("prune_configs", "_bench", "do_bench"):
        monkeypatch.setattr(Autotuner, name, getattr(Autotuner, name))  # restores it after the test
    one_configuration.take_one_configuration.__wrapped__()
    tried, config = list[int](), lambda n: triton.Config({"n": n})

    class Kernel:
        fn = staticmethod(lambda x, n: None)

        def run(self, x: int, n: int, **_: Any) -> int:
            tried.append(n)
            if n in too_large:
                raise OutOfResources(2, 1, "shared memory")
            return n

    configs = [triton.Config({"n": 3}, num_warps=1), *map(config, range(3)), triton.Config({"n": 4}, num_warps=8)]
    tuned = Autotuner(Kernel(), ["x"], configs, ["x"], None, None, cache_results=True)
    for key in range(2):  # a new key is a new search
        tried.clear()
        assert [tuned.run(key), tuned.run(key)] == [runs[-1]] * 2 and tried == [*runs, runs[-1], runs[-1]]
    assert not tuned.cache_results


# The training


def test_examples_are_the_same_for_every_mixer_and_rate() -> None:
    first, other = (make_examples(c, "train", CPU) for c in (cell(), cell(mixer="gka", dim=64, learning_rate=1)))
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    inputs, queries, values = first
    assert queries.shape == values.shape == (100, 2) and inputs.dtype == torch.int32
    for row, at, answer in zip(inputs.tolist(), queries.tolist(), values.tolist(), strict=True):
        pairs = dict(zip(row[0:4:2], row[1:4:2], strict=True))
        assert [pairs[row[position]] for position in at] == answer
        assert {row[t] for t in range(4, 16) if t not in at} == {0}
    assert not torch.equal(inputs[:30], make_examples(cell(), "test", CPU).inputs)
    assert not torch.equal(inputs, make_examples(cell(seed=1), "train", CPU).inputs)


@pytest.mark.parametrize("mixer", ["linear", "mamba2"])
def test_a_training_that_solves_the_task_ends(mixer: str, tmp_path: Path) -> None:
    easy = cell(mixer=mixer, dim=32, seq_len=8, num_pairs=2, vocab_size=12, train_examples=960, epochs=40)
    found = finish(training(easy, [], CPU, tmp_path), CPU)
    assert found["ended"] == "solved" and found["accuracy"] > 0.99 and len(found["history"]) < 40
    assert all(accuracy <= 0.99 for _, accuracy, _ in found["history"][:-1])
    assert found["history"][-1][2] < found["history"][0][2]
    json.dumps(found, allow_nan=False)


def test_the_rate_falls_by_epoch_and_what_layers_exclude_is_not_decayed() -> None:
    made = model("gka")
    steps = Steps(made, cell(), CPU, graph=False)
    rates = []
    for _ in range(4):
        rates.append(steps.optimiser.param_groups[0]["lr"])
        steps.optimiser.step()
        steps.schedule.step()
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])
    decayed, kept = steps.optimiser.param_groups
    names = {id(p): name.split(".")[-1] for name, p in made.named_parameters()}
    assert {names[id(p)] for p in kept["params"]} == {"A_log", "dt_bias"} and kept["weight_decay"] == 0
    assert decayed["weight_decay"] == 0.1 and len(decayed["params"]) + len(kept["params"]) == len(names)


def test_numbers_that_are_not_finite_end_a_training(tmp_path: Path) -> None:
    for mixer in ("attention", "gka"):
        found = finish(training(cell(mixer=mixer, learning_rate=1e30), [], CPU, tmp_path), CPU)
        assert found["ended"] == "not finite" and len(found["history"]) < 4
        json.dumps(found, allow_nan=False)


def test_an_error_that_is_no_divergence_is_raised() -> None:
    """Also after the first step."""
    steps, batch = (
        Steps(model("gka"), cell(), CPU, graph=False),
        make_examples(cell(), "train", CPU).batches(32)[0],
    )
    with pytest.raises(ValueError, match="batch_size"):
        finish(steps.epoch([batch, batch._replace(values=batch.values[:, :1])]), CPU)


def test_a_stopped_training_resumes_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, which draws other random numbers."""
    monkeypatch.setattr(recall_train, "hopeless", lambda *_: None)
    monkeypatch.setattr(recall_model, "DROPOUT", 0.0)
    monkeypatch.setattr(recall_train, "SAVE_EVERY", 0.0)
    whole = finish(training(cell(mixer="linear"), [], CPU, tmp_path / "whole"), CPU)
    epoch, calls = Steps.epoch, []

    def stop(self: Steps, batches: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(self, batches)

    monkeypatch.setattr(Steps, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        finish(training(cell(mixer="linear"), [], CPU, tmp_path / "part"), CPU)
    monkeypatch.setattr(Steps, "epoch", epoch)
    resumed = finish(training(cell(mixer="linear"), [], CPU, tmp_path / "part"), CPU)
    assert len(whole["history"]) == 4 and resumed["history"] == whole["history"]
    assert resumed["accuracy"] == whole["accuracy"] and resumed["ended"] == whole["ended"]


def test_a_training_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recall_train, "TELL_EVERY", 0.0)
    finish(training(cell(epochs=2), [], CPU, tmp_path), CPU)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.endswith("epoch 1 of 2, step 1 of 3") and "epoch 2 of 2, step 3 of 3; accuracy 0." in last


def curve(*accuracies: float, fall: float = 0.0) -> list[list[Any]]:
    return [[epoch, accuracy, 1.0 - fall * epoch] for epoch, accuracy in enumerate(accuracies, 1)]


def test_hopeless_trainings() -> None:
    def reason(ours: list[Any], *rivals: list[Any]) -> str | None:
        return hopeless(ours, rivals, num_pairs=4, epochs=64)

    rising = [0.012 * epoch for epoch in range(1, 65)]
    assert reason(curve(*[0.0] * 15)) is None and reason(curve(*[0.0] * 16)) == "learnt nothing"
    assert reason(curve(*[0.0] * 31, fall=0.001)) is None, "its loss still falls"
    assert reason(curve(*[0.0] * 32, fall=0.001)) == "stays at guessing"
    assert reason(curve(*[0.0] * 32, fall=0.004)) is None
    assert reason(curve(*[0.25] * 31)) is None and reason(curve(*[0.25] * 32)) == "stays at guessing"
    assert reason(curve(*[0.25] * 32, fall=0.004)) is None, "its loss still falls"
    assert reason(curve(*rising[:32])) is None and reason(curve(*[0.4] * 60)) is None
    quick = curve(*[0.6] * 40)
    assert (
        reason(curve(*[0.31] * 16), quick) is None and reason(curve(*[0.29] * 16), quick) == "behind another rate"
    )
    assert (
        reason(curve(*[0.49] * 31), quick) is None and reason(curve(*[0.49] * 32), quick) == "behind another rate"
    )
    assert reason(curve(*[0.4] * 50), quick) is None, "the other rate ended before"


# The cells


def test_the_order_brings_the_verdict_first() -> None:
    cells = recall.cells("full")
    rates = [c for c in cells if "learning_rate" in c]
    assert len(rates) == 9 * 3 * 5 * 4 and len(cells) - len(rates) == 9 * 3 * 5 * 2
    assert {c["learning_rate"] for c in rates} == set(RATES)
    first = cells[: 5 * 2 * 5 * 6]
    assert {c["mixer"] for c in first} == set(recall.VERDICT) and {c["dim"] for c in first} == {64, 128}
    likeliest = {(c["mixer"] in recall.SLOWER, c["learning_rate"]) for c in cells[:50]}
    assert likeliest == {(False, RATES[0]), (True, RATES[1])}
    by_mixer = [[{**c, "mixer": ""} for c in rates if c["mixer"] == mixer] for mixer in MIXERS]
    grids = [sorted(json.dumps(c, sort_keys=True) for c in grid) for grid in by_mixer]
    assert all(grid == grids[0] for grid in grids)
    assert all(c["seq_len"] >= 4 * c["num_pairs"] for c in cells)


def test_rates_and_seeds_that_are_needless_do_not_run() -> None:
    small = [{**c, "size": "small"} for c in recall.cells("small") if c["mixer"] == "gka"]
    rates, seeds = small[:4], small[4:]

    def entries(*accuracies: float) -> list[Any]:
        return [{"cell": c, "result": {"accuracy": x}} for c, x in zip(rates, accuracies, strict=False)]

    assert recall.ready(rates[1], entries(0.5)) and recall.ready(rates[1], entries(0.995)) is None
    assert recall.ready(seeds[0], entries(0.5, 0.4, 0.3)) is False
    assert recall.ready(seeds[0], entries(0.5, 0.4, 0.3, 0.2)) is True
    assert recall.ready(seeds[0], entries(0.04, 0.04, 0.01, 0.0)) is None
    assert recall.ready(seeds[0], entries(0.04, 0.992)) is None
    other = [{"cell": {**rates[0], "mixer": "linear"}, "result": {"accuracy": 1.0}}]
    assert recall.ready(rates[1], other) is True
    pending = [seeds[0], rates[3], rates[2]]
    assert workers.take(pending, entries(0.5, 0.4), recall.ready) is rates[3] and pending == [seeds[0], rates[2]]


def test_processes_run_all_cells_once_and_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["evidence", "recall", "--output", str(tmp_path), "--device", "cpu", "--only", "mixer=attention"]
    assert command_line.main([*arguments, "--processes", "2", "--minutes", "1e-9"]) == 0
    assert "6 cells have no result" in capfd.readouterr().err and not (tmp_path / "recall.json").exists()
    assert command_line.main([*arguments, "learning_rate=0.01"]) == 0
    assert command_line.main([*arguments, "--streams", "2"]) == 0
    entries = Record(tmp_path / "recall.json", "recall").entries
    assert len(entries) >= 4 and {e["cell"].get("learning_rate") for e in entries} >= set(RATES)
    best = max(e["result"]["accuracy"] for e in entries if "learning_rate" in e["cell"])
    assert len(entries) == (6 if best > recall.LEARNT else 4)
    content = (tmp_path / "recall.json").read_text()
    assert command_line.main([*arguments, "--processes", "1"]) == 0
    assert (tmp_path / "recall.json").read_text() == content


STUB = """
import os, time
def run(cell, folder, device):
    if cell["n"] == 0:
        raise RuntimeError("no kernel")
    if cell["n"] == 1:
        os._exit(7)
    time.sleep(600 * (cell["n"] == 3))
    return cell["n"]
"""


def test_processes_survive_errors_and_stop_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub_experiment.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    cells, said = [{"n": n} for n in (3, 0, 1, 2)], list[Any]()
    monkeypatch.setattr(workers, "monotonic", lambda: 60.0 * (len(said) == 3))
    record = Record(tmp_path / "it.json", "it")
    shared = workers.Shared("stub_experiment", "cpu", tmp_path)
    always: Any = lambda *_: True  # noqa: E731
    failed = workers.run_in_processes(
        record, cells, always, shared, processes=2, seconds=50, report=lambda *what: said.append(what)
    )
    assert failed == cells[1:3] and [entry["result"] for entry in record.entries] == [2]
    outcomes = [outcome for _, outcome in said]
    assert outcomes[0] == "RuntimeError: no kernel" and outcomes[1] == "its process ended with exit code 7"
    assert len(said) == 3


SIDE_BY_SIDE = """
import os, time
from pathlib import Path
started = []
def stepwise(cell, folder, device):
    first = Path(cell["folder"], "first")
    if first.exists():
        time.sleep(0.3)
    else:
        started.append(cell["n"])
        while len(started) < 2:
            yield
        first.touch()
        while cell["n"] == 1:
            yield
    if cell["n"] == 0:
        if cell["how"] == "raises":
            raise RuntimeError("no kernel")
        if cell["how"] == "dies":
            os._exit(7)
        return lambda: None  # no other process can have it
    return os.getpid()
"""


@pytest.mark.parametrize(
    "how, told",
    [("raises", "RuntimeError: no kernel"), ("dies", "exit code 7"), ("has no answer", "exit code 1")],
)
def test_after_an_error_the_cells_of_a_process_run_alone(
    how: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell 0 fails while cell 1 runs; then it fails alone, and the other cells succeed."""
    (tmp_path / "stub_side_by_side.py").write_text(SIDE_BY_SIDE)
    monkeypatch.syspath_prepend(tmp_path)
    cells = [{"n": n, "how": how, "folder": str(tmp_path)} for n in (1, 0, 2, 3)]
    said, record = list[Any](), Record(tmp_path / "it.json", "it")
    shared = workers.Shared("stub_side_by_side", "cpu", tmp_path)
    failed = workers.run_in_processes(
        record, cells, lambda *_: True, shared, processes=1, streams=2, seconds=100,
        report=lambda *what: said.append(what),
    )  # fmt: skip
    assert failed == [cells[1]] and len(said) == 4
    (outcome,) = (text for which, text in said if which["n"] == 0)
    assert outcome.endswith(told)
    assert f"{told}; its unfinished cells start again" in capsys.readouterr().err
    pids = {entry["cell"]["n"]: entry["result"] for entry in record.entries}
    assert pids.keys() == {1, 2, 3} and pids[2] == pids[3] != pids[1]


def test_processes_start_before_one_gets_a_second_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub_two_processes.py").write_text(
        "import os, time\n"
        "def stepwise(cell, folder, device):\n    time.sleep(3)\n    yield\n    return os.getpid()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    record, shared = Record(tmp_path / "it.json", "it"), workers.Shared("stub_two_processes", "cpu", tmp_path)
    assert not workers.run_in_processes(
        record, [{"n": 0}, {"n": 1}], lambda *_: True, shared, processes=2, streams=2, seconds=100,
        report=lambda *_: None,
    )  # fmt: skip
    assert len({entry["result"] for entry in record.entries}) == 2


def test_trainings_beside_each_other_draw_their_own_masks(tmp_path: Path) -> None:
    """These models have dropout; the results are those of one training after the other."""
    found = []
    for name, more in (("alone", []), ("beside", ["--streams", "3"])):
        arguments = ["evidence", "recall", "--output", str(tmp_path / name), "--device", "cpu", *more]
        only = ["--only", "mixer=attention|gka|gka-paper", "learning_rate=0.01"]
        assert command_line.main([*arguments, *only]) == 0
        entries = Record(tmp_path / name / "recall.json", "recall").entries
        found.append({e["cell"]["mixer"]: torch.tensor(e["result"]["history"]) for e in entries})
    alone, beside = found
    assert alone.keys() == beside.keys() == {"attention", "gka", "gka-paper"}
    for mixer, history in alone.items():
        assert relative_error(beside[mixer], history) < 1e-3


def test_streams_are_for_experiments_that_allow_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["evidence", "numerics", "--streams", "2", "--output", str(tmp_path)]) == 2
    assert "--streams 2: the cells of numerics run one at a time" in capsys.readouterr().err


WAITING = """
order = []
class Over:
    def __init__(self, at):
        self.at = at
    def query(self):
        if self.at == "error":
            raise RuntimeError("a kernel failed")
        return len(order) >= self.at
def stepwise(cell, folder, device):
    order.append(cell["name"])
    both = folder.parent / "both"
    while not both.exists():
        if len(order) > 1:
            both.touch()
        yield
    for at in cell["waits"]:
        yield Over(at)
        order.append(cell["name"])
    return list(order)
"""


def run_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **waits: Any) -> tuple[Any, list[Any]]:
    """The order of the steps when the last training ends, by name, and errors."""
    (tmp_path / "stub_waiting.py").write_text(WAITING)
    monkeypatch.syspath_prepend(tmp_path)
    record, shared = Record(tmp_path / "it.json", "it"), workers.Shared("stub_waiting", "cpu", tmp_path)
    cells, said = [{"name": name, "waits": events} for name, events in waits.items()], list[Any]()
    workers.run_in_processes(
        record, cells, lambda *_: True, shared, processes=1, streams=2, seconds=100,
        report=lambda cell, text: said.append((cell["name"], text)),
    )  # fmt: skip
    return {entry["cell"]["name"]: entry["result"] for entry in record.entries}, said


def test_while_a_training_waits_the_other_advances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a waits for its second step until five steps are over."""
    orders, _ = run_waiting(tmp_path, monkeypatch, a=[5, 0], b=[0, 0, 0, 0])
    assert max(orders.values(), key=len)[2:6] in (["b", "b", "b", "a"], ["b", "b", "b", "b"])


def test_an_error_of_the_gpu_that_comes_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders, said = run_waiting(tmp_path, monkeypatch, a=["error"], b=[])
    assert orders.keys() == {"b"} and ("a", "RuntimeError: a kernel failed") in said


def test_what_a_training_raises_or_returns_after_its_last_turn() -> None:
    def steps(end: Any) -> Stepwise:
        yield None
        if isinstance(end, Exception):
            raise end
        return end

    assert finish(steps(3), CPU) == 3
    with pytest.raises(RuntimeError, match="no kernel"):
        finish(steps(RuntimeError("no kernel")), CPU)


def test_a_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    seen = []
    for number in range(3):
        with workers._one_gpu(number, "cuda"):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["3", "5", "3"] and os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    with workers._one_gpu(1, "cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with workers._one_gpu(3, "cuda"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


# The page


def entry(mixer: str, dim: int, accuracy: float, rate: float = RATES[0], seed: int = 0) -> dict[str, Any]:
    kind = {"learning_rate": rate} if seed == 0 else {"rates": list(RATES)}
    result = {
        "accuracy": accuracy,
        "ended": "all epochs",
        "graph": True,
        "learning_rate": rate,
        "history": [[1, accuracy, 0.5]],
    }
    return {"cell": {**cell(mixer=mixer, dim=dim), **kind, "seed": seed}, "result": result, "seconds": 60.0}


def all_rates(mixer: str, dim: int, *accuracies: float) -> list[dict[str, Any]]:
    return [entry(mixer, dim, x, rate) for x, rate in itertools.zip_longest(accuracies, RATES, fillvalue=0.1)]


def test_the_page_has_the_best_accuracy_and_marks_what_is_missing(tmp_path: Path) -> None:
    entries = [entry("attention", 64, 0.995), *all_rates("gka-paper", 64, 0.5, 0.7), entry("gla", 64, 0.6)]
    entries += [entry("gka-paper", 64, 0.75, seed=1), entry("gka-paper", 64, 0.8, seed=2), entry("gla", 128, 0.3)]
    text = recall_page.section(entries, tmp_path / "picture.png")
    rows = rows_of(text)
    assert rows[0][3:] == ["GKA, no gates", "GLA", "softmax attention"]
    assert ["16", "2", "64", "75.0 (70.0 to 80.0)", "60.0 *", "99.5"] in rows
    assert ["16", "2", "128", "", "30.0 *", ""] in rows
    assert "9 trainings took 9 minutes" in text and "9 of them replayed" in text
    assert_drawn(tmp_path / "picture.png")


def test_the_page_says_how_soon_mixers_solve_the_task(tmp_path: Path) -> None:
    """At the settings that all reach, with the one rate that did."""

    def solved(mixer: str, dim: int, rate: float, epochs: int) -> dict[str, Any]:
        made = entry(mixer, dim, 0.995, rate)
        made["result"] |= {"ended": "solved", "history": [[0, 0.0, 1.0]] * epochs}
        return made

    ours = [solved("gka-paper", 64, 1e-2, 9), solved("gka-paper", 64, 1e-4, 3), solved("gka-paper", 128, 1e-2, 6)]
    text = recall_page.section([*ours, entry("gla", 64, 0.6)], tmp_path / "picture.png")
    assert "at the 2 settings that these mixers all reach: GKA, no gates 7.5." in text
    text = recall_page.section([*ours, solved("gla", 64, 1e-2, 20)], tmp_path / "picture.png")
    assert "at the 1 settings that these mixers all reach: GKA, no gates 9, GLA 20." in text
    assert "Median epochs" not in recall_page.section([entry("gla", 64, 0.6)], tmp_path / "picture.png")


def test_the_verdict_on_figure_3a(tmp_path: Path) -> None:
    right = [entry("attention", dim, 0.995) for dim in (64, 128)]
    ours = [*all_rates("gka-paper", 64, 0.7), entry("gka-paper", 128, 0.995)]

    def said(*more: dict[str, Any]) -> str:
        return recall_page.section([*right, *ours, *more], tmp_path / "picture.png")

    worse, equal = all_rates("gla", 64, 0.5), [entry("gla", 128, 0.998)]
    assert "Figure 3a holds" in said(*worse, *equal) and "at 1 of 2 settings" in said(*worse, *equal)
    assert "GLA: better in 1, equal in 1, worse in 0" in said(*worse, *equal)
    unfinished = said(*worse[:1], *equal)
    assert "no verdict on figure 3a yet: 1 of 2 comparisons are decided" in unfinished
    assert "Figure 3a holds" not in unfinished and "above 99 percent at all 2 settings" in unfinished
    assert "another mixer recalls more in 1 of 2" in said(*all_rates("gla", 64, 0.8), *equal)
    spread = [*all_rates("gla", 64, 0.8), entry("gla", 64, 0.6, seed=1)]
    assert "neither confirmed nor refuted" in said(*spread, *equal), "one seed is better, one is worse"
    assert "GKA: " not in said(*all_rates("gka", 64, 0.9)), "the layer with gates is not a rival"
    gone = ours.pop()
    assert "no verdict" in said(*worse, *equal), "the layer of the figure has not run at dim 128"
    ours.append(gone)
    right[0] = entry("attention", 64, 0.5)
    text = said(*all_rates("gla", 64, 0.8), *equal)
    assert "attention are missing at 16 tokens, 2 pairs, dim 64." in text and "fails at" not in text
    assert "no verdict" in text and "worse in 0" in text
    right[:1] = all_rates("attention", 64, 0.5)
    text = said(*all_rates("gla", 64, 0.8), *equal)
    assert "fails at 16 tokens, 2 pairs, dim 64:" in text and "neither confirmed nor refuted" in text


def test_the_verdict_waits_only_for_what_can_change_it(tmp_path: Path) -> None:
    right = [entry("attention", dim, 0.995) for dim in (64, 128)]
    worse, solved_there = all_rates("gla", 64, 0.5), entry("gka-paper", 128, 0.995)
    some_rates = all_rates("gka-paper", 64, 0.7)[:2]
    pending = all_rates("gla", 128, 0.5)[:1]

    def said(*more: dict[str, Any]) -> str:
        return recall_page.section([*right, *more], tmp_path / "picture.png")

    text = said(*some_rates, solved_there, *worse, *pending)
    assert "Figure 3a holds" in text and "1 of 2 comparisons are not decided. They cannot change this" in text
    unsolved = said(*some_rates, *all_rates("gka-paper", 128, 0.6), *worse, *pending)
    assert "no verdict" in unsolved, "the other layer may get above 0.6"
    assert "no verdict" in said(*some_rates, solved_there, *all_rates("gla", 64, 0.8)), "ours may still rise"
    nowhere = said(*all_rates("gka-paper", 64, 0.5), solved_there, *worse, *pending)
    assert "no verdict" in nowhere, "it may be better at the other setting"
    both = [entry(mixer, dim, 0.995) for mixer in ("gka-paper", "gdn") for dim in (64, 128)]
    decided = said(*both, entry("gla", 64, 0.995), *pending)
    assert "neither confirmed nor refuted" in decided and "1 of 4 comparisons are not decided" in decided


def test_the_full_experiment_waits_for_all_of_the_verdict() -> None:
    """Settings and rivals that have not run at all are missing, too."""
    full = entry("gka-paper", 64, 0.995)
    full["cell"]["size"] = "full"
    settings, rivals = recall_page.wanted([full])
    assert len(settings) == 5 * 2 and rivals == ["gla", "mesa", "gdn"]
    assert "0 of 30 comparisons" in recall_page.verdict(recall_page.best([full]), settings, rivals)[1]
