"""Experiments on a CUDA device: steps that are replayed, layers of flash-linear-attention, spectra."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error

from experiments.evidence import parts, workers
from experiments.evidence.changes import BASE, NO_SOLVE, PAPER, VARIANTS
from experiments.evidence.record import Record
from experiments.evidence.skeleton import skeleton
from experiments.evidence.spectra_measure import Inputs, memory_at, products_of_layer, spectrum, states_at
from experiments.tasks import mqar_replay
from experiments.tasks.asked import Asked
from experiments.tasks.recall_mixers import MIXERS
from experiments.tasks.recall_model import RecallModel
from experiments.tasks.recall_train import Steps, make_examples, training
from experiments.tasks.replay import ReplayedSteps
from experiments.tasks.stepwise import finish, own_stream
from gka import GKAForCausalLM

pytestmark = pytest.mark.gpu


def cell(mixer: str, **changes: Any) -> dict[str, Any]:
    sizes = dict(
        mixer=mixer, dim=64, seq_len=64, num_pairs=4, vocab_size=128, train_examples=512, test_examples=64
    )
    rest = dict(batch_size=64, epochs=2, learning_rate=2e-3, seed=0, dtype="bfloat16")
    return {**sizes, **rest, **changes}


@contextmanager
def may_need_another_triton() -> Iterator[None]:
    """Skip the test where flash-linear-attention refuses the backward pass of Gated DeltaNet with this Triton."""
    try:
        yield
    except RuntimeError as error:
        if "upgrade Triton" not in str(error):
            raise
        pytest.skip("flash-linear-attention needs another Triton on this GPU")


def epoch_of(steps: Steps, batches: list[Asked], device: torch.device) -> float | None:
    finish(steps.epoch(batches), device)
    return steps.loss()


@pytest.mark.parametrize("mixer", MIXERS)
def test_replayed_steps_train_as_others(mixer: str, device: torch.device) -> None:
    """The same losses and weights over two epochs; without dropout, since graphs draw other random numbers."""
    if mixer in ("gla", "gdn", "mesa", "delta") and importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    outcomes = []
    for graph in (False, True):
        this = cell(mixer)
        with own_stream(device):
            torch.manual_seed(0)
            model = RecallModel(MIXERS[mixer].build, 128, 64, 64 if mixer == "attention" else 0).to(device)
            batches = make_examples(this, "train", device).batches(64)
            steps = Steps(model, this, device, graph=graph)
            model.dropout.p = 0.0
            if mixer == "attention":
                for block in model.blocks:
                    block.mixer.dropout = 0.0
            with may_need_another_triton():
                losses = [epoch_of(steps, batches, device) for _ in range(2)]
            assert steps.step.graph == graph and None not in losses
            torch.cuda.synchronize()
        outcomes.append((torch.tensor(losses), torch.cat([p.detach().flatten() for p in model.parameters()])))
    (loss, weights), (ref_loss, ref_weights) = outcomes
    assert relative_error(loss, ref_loss) < 3e-3 and relative_error(weights, ref_weights) < 5e-2


@pytest.mark.parametrize("mixer", ["gka-paper", "attention"])
def test_a_training_learns(mixer: str, device: torch.device, tmp_path: Path) -> None:
    found = finish(training(cell(mixer, num_pairs=2, train_examples=4096, epochs=8), [], device, tmp_path), device)
    assert found["graph"] and found["history"][-1][2] < 0.7 * found["history"][0][2]


def test_trainings_in_streams_of_a_process_learn(device: torch.device, tmp_path: Path) -> None:
    record = Record(tmp_path / "recall.json", "recall")
    shared = workers.Shared("experiments.evidence.recall", "cuda", tmp_path / "recall")
    rates = {"gka-paper": 3e-4, "attention": 2e-3}  # with 2e-3 GKA solves the task in two epochs
    cells = [
        cell(mixer, num_pairs=2, train_examples=4096, epochs=8, size="test", seed=seed, learning_rate=rates[mixer])
        for mixer, seed in itertools.product(rates, range(2))
    ]
    failed = workers.run_in_processes(
        record, cells, lambda *_: True, shared, processes=1, streams=3, seconds=240, report=print
    )
    assert not failed and len(record.entries) == 4
    for number, entry in enumerate(record.entries):
        found = entry["result"]
        this = {**entry["cell"], "learning_rate": found["learning_rate"]}
        alone = finish(training(this, [], device, tmp_path / f"alone-{number}"), device)
        assert found["graph"] and found["history"][-1][2] < 0.7 * found["history"][0][2]
        same = min(len(x["history"]) for x in (found, alone))  # one may have solved the task an epoch sooner
        assert same > 2
        losses, ref_losses = (torch.tensor([loss for *_, loss in x["history"][:same]]) for x in (found, alone))
        assert relative_error(losses, ref_losses) < 1e-2, "the random numbers are those of a training alone"


@pytest.mark.parametrize("variant", [BASE, NO_SOLVE, PAPER, "conjugate gradient", "float32"])
def test_replayed_steps_of_several_shapes_train_as_others(
    variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five lengths take turns, so that graphs share their memory; losses and weights are those without graphs."""
    (small,) = (c for c in parts.cells("small") if c["variant"] == BASE and c["seed"] and "rates" in c)
    this = {**small, "variant": variant, "dtype": VARIANTS[variant].dtype, "dim": 64, "steps": 60}
    outcomes = []
    for graph in (False, True):
        if not graph:
            monkeypatch.setattr(mqar_replay, "ReplayedSteps", partial(_without_graph, ReplayedSteps))
        model = parts.build(this).to(device)
        batches = list(parts._batches(this, device))
        assert len({batch.inputs.shape for batch in batches}) == 5
        training = mqar_replay.training(
            model, batches, steps=60, learning_rate=1e-3, dtype=this["dtype"], device=device, name=variant
        )
        found = finish(training, device)
        monkeypatch.undo()
        assert found["graph"] == graph and found["diverged"] is None
        losses = torch.tensor([loss for _, loss in found["loss"]])
        outcomes.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (loss, weights), (ref_loss, ref_weights) = outcomes
    bound = 3e-3 if this["dtype"] == "bfloat16" else 1e-3
    assert relative_error(loss, ref_loss) < bound and relative_error(weights, ref_weights) < 5e-2


def _without_graph(made: Any, *arguments: Any, graph: bool, **settings: Any) -> Any:
    return made(*arguments, graph=False, **settings)


STUB = """
import time, torch
def run(cell, folder, device):
    time.sleep(2)  # so that both processes get a cell
    x = torch.ones(1, device="cuda:0")
    return [str(torch.cuda.get_device_properties(device).uuid), torch.cuda.device_count(), x.item()]
"""


def test_every_process_sees_its_own_gpu(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub_on_gpus.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    record, shared = Record(tmp_path / "it.json", "it"), workers.Shared("stub_on_gpus", "cuda", tmp_path)
    failed = workers.run_in_processes(
        record, [{"n": 0}, {"n": 1}], lambda *_: True, shared, processes=2, seconds=120, report=lambda *_: None
    )
    results = [entry["result"] for entry in record.entries]
    assert not failed and len(results) == 2 and all(found[1:] == [1, 1.0] for found in results)
    assert len({found[0] for found in results}) == min(2, torch.cuda.device_count())


def test_language_models_of_mesanet_have_gradients(device: torch.device) -> None:
    pytest.importorskip("fla")
    config = skeleton("mesa", vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    model = GKAForCausalLM(config).to(device)
    tokens = torch.randint(128, (2, 100), device=device)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match='past_key_values is given; expected None with mixer "mesa"'):
        model(tokens, use_cache=True)


def test_spectra_are_those_of_the_cpu() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 130, 2, 16, generator=draw) + 1 for _ in range(3))
    g, alpha, beta = (torch.randn(1, 130, 2, generator=draw).sigmoid() for _ in range(3))
    inputs, positions = Inputs(q, k, v, -0.1 * g, alpha, beta), [20, 64, 129]
    on_gpu = Inputs(*(x.cuda() for x in inputs))
    states = states_at(on_gpu, positions)
    assert relative_error(states.cpu(), states_at(inputs, positions)) < 1e-12
    found, ref = spectrum(states, 0.02), spectrum(states.cpu(), 0.02)
    assert all(relative_error(found[name].cpu(), ref[name]) < 1e-9 for name in ("rank", "top"))
    assert memory_at(on_gpu.g, positions).cpu().equal(memory_at(inputs.g, positions))
    products, wanted = (products_of_layer(x, positions, 0.02) for x in (on_gpu, inputs))
    for tolerance, each in products.items():
        assert each["cg"] == wanted[tolerance]["cg"] and each["chebyshev"] == wanted[tolerance]["chebyshev"]


def test_gated_delta_net_as_it_is_trains() -> None:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    torch.manual_seed(0)
    config = skeleton(
        "gdn_fla", vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, head_dim=64,
    )  # fmt: skip
    model = GKAForCausalLM(config).cuda()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    tokens = torch.randint(128, (2, 200), device="cuda")
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        with may_need_another_triton():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
