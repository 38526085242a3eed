"""`gka distill` and `gka rank-layers`: the losses, the runs and their reports, interruptions, mistakes."""

from __future__ import annotations

import json
import math
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked, run_ranks
from model_helpers import assert_near, random_tokens
from tiny_run import SETTINGS, command, logged, train, write_texts
from transformer_helpers import small
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from gka import GKAForCausalLM, convert
from gka.cli import main as cli
from gka.cli.distill import kl_sum, recovered
from gka.hf.cache_size import cache_bytes
from gka.training.data import Manifest, TokenBlocks
from gka.training.matching import LayerMatching, block_loss, matching_errors

# The teacher of the tests, and how it is read: as the runs of gka train in tiny_run.py.
TEACHER: dict[str, Any] = {**SETTINGS, "family": "qwen3", "layers": 4, "learning_rate": 1e-2, "max_steps": 30}
del TEACHER["solver_steps"]
RUN: dict[str, Any] = {
    **{name: SETTINGS[name] for name in ("seq_len", "batch_size", "eval_bytes", "validation_fraction", "device")},
    "layer_steps": 8,
    "layer_learning_rate": 1e-2,
    "log_every": 1,
    "save_every": 4,
}
TUNE: dict[str, Any] = {"tune_steps": 8, "learning_rate": 1e-3, "eval_every": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts`, a `teacher` trained on them, a `hybrid` of it and a `distilled` run."""
    place = tmp_path_factory.mktemp("distill")
    data = write_texts(place / "texts")
    assert cli.main(command("train", output=place / "teacher", data=[data], **TEACHER)) == 0
    assert cli.main(["convert", str(place / "teacher"), "--layers", "1,3", str(place / "hybrid")]) == 0
    assert distill(place, place / "distilled") == 0
    return place


def arguments(place: Path, output: Path, **changes: Any) -> list[str]:
    options = {"teacher": place / "teacher", "data": [place / "texts"], "output": output, **RUN, **TUNE, **changes}
    return command("distill", str(place / "hybrid"), **options)


def distill(place: Path, output: Path, **changes: Any) -> int:
    return cli.main(arguments(place, output, **changes))


def report(output: Path, name: str = "report.json") -> dict[str, Any]:
    return json.loads((output / name).read_text())


# Layers that match


def pair() -> tuple[Any, GKAForCausalLM]:
    model = small("qwen3", torch.float64)
    torch.manual_seed(1)
    return model, convert(model, [1, 3])


def test_every_layer_meets_the_input_and_the_output_of_its_attention() -> None:
    teacher, student = pair()
    tokens, seen = random_tokens(2, 11), {}
    for index in (1, 3):
        teacher.model.layers[index].self_attn.register_forward_hook(
            lambda _, __, named, output, index=index: seen.update({index: (named["hidden_states"], output[0])}),
            with_kwargs=True,
        )
    passes = []
    teacher.model.register_forward_hook(lambda *_: passes.append(1))
    before = teacher(tokens).logits
    matching = LayerMatching(teacher, {i: student.model.layers[i].gka for i in (1, 3)})
    loss = matching(tokens)["loss"]
    assert len(passes) == 2, "one of ours: teacher and student in one forward pass"
    shares = []
    for index, (x, target) in seen.items():
        error = (student.model.layers[index].gka(x) - target).square().mean()
        assert_near(matching.errors[index], error, 1e-6)
        shares.append(error / target.square().mean())
    assert_near(loss, torch.stack(shares).mean(), 1e-6)
    assert torch.equal(teacher(tokens).logits, before), "the teacher goes on with its own output"
    matching.close()
    matching.errors = {}
    teacher(tokens)
    assert matching.errors == {}


def test_only_the_layers_are_trained_and_saved() -> None:
    teacher, student = pair()
    matching = LayerMatching(teacher, {1: student.model.layers[1].gka})
    assert all(name.startswith("layers.1.") for name in matching.state_dict())
    matching(random_tokens(2, 11))["loss"].backward()
    assert all(value.grad is not None for value in matching.parameters())
    assert all(value.grad is None and not value.requires_grad for value in teacher.parameters())
    others = [value for name, value in student.named_parameters() if ".1.gka." not in name]
    assert all(value.grad is None for value in others)


def test_a_hybrid_can_be_the_teacher() -> None:
    _, hybrid = pair()
    student = convert(hybrid, [0])
    matching = LayerMatching(hybrid, {0: student.model.layers[0].gka})
    assert matching(random_tokens(2, 11))["loss"] > 0


# The divergence


def test_the_divergence_is_that_of_the_definition() -> None:
    student, teacher = random_logits(1), random_logits(2)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert_near(kl_sum(student, teacher).double(), (p * (p / q).log()).sum(), 1e-6)
    assert kl_sum(teacher, teacher) == 0


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_recovered_is_a_share_of_the_gap() -> None:
    losses = {"random": 5.0, "teacher": 1.0, "finetuned": 2.0}
    assert recovered(losses, "finetuned") == 0.75
    assert recovered({**losses, "teacher": 5.0}, "finetuned") is None


# The run


def test_the_report(place: Path) -> None:
    output = place / "distilled"
    found, text = report(output), (output / "report.txt").read_text()
    assert found["layers"] == [1, 3] and list(found["matching"]) == ["1", "3"]
    for errors in found["matching"].values():
        assert 0 < errors["after"]["mse"] < errors["before"]["mse"]
    losses = {name: entry["nats_per_token"] for name, entry in found["loss"].items()}
    assert list(losses) == ["teacher", "random", "converted", "distilled", "finetuned"]
    assert losses["finetuned"] < losses["converted"]
    assert found["recovered"]["finetuned"] == recovered(losses, "finetuned")
    for name, entry in found["loss"].items():
        assert f"{entry['nats_per_token']:.4f}" in text, name
    assert "cache of 32,768 tokens in float32" in text
    assert found["versions"]["torch"] == torch.__version__ and found["options"]["layer_steps"] == 8


def test_the_figures_are_those_of_the_models(place: Path) -> None:
    output = place / "distilled"
    found = report(output)
    manifest = Manifest.load(output / "data")
    sequences, tokens = found["measured_on"]["sequences"], found["measured_on"]["tokens_each"]
    blocks = TokenBlocks(output / "data" / "validation.bin", manifest.dtype, tokens, max_blocks=sequences)
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher" / "model")
    models = {
        "teacher": teacher,
        "converted": GKAForCausalLM.from_pretrained(place / "hybrid"),
        "finetuned": GKAForCausalLM.from_pretrained(output / "model"),
    }
    for name, model in models.items():
        total = 0.0
        for block in blocks:
            logits = model.eval()(block["input_ids"][None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, block["labels"][1:]).detach())
        entry = found["loss"][name]
        assert entry["nats_per_token"] == pytest.approx(total / sequences, rel=1e-4)
        assert block_loss(model, blocks, 3) == pytest.approx(entry["nats_per_token"], rel=1e-5), "any batch size"
        bits = entry["nats_per_token"] / math.log(2) * manifest.tokens_per_byte
        assert entry["bits_per_byte"] == pytest.approx(bits)
    assert found["cache"]["teacher_bytes"] == cache_bytes(teacher, 32768)
    assert found["cache"]["student_bytes"] == cache_bytes(models["finetuned"], 32768)
    layers = {index: models["converted"].model.layers[index].gka for index in (1, 3)}
    errors = matching_errors(LayerMatching(teacher, layers), blocks, 3, torch.device("cpu"))
    for index, entry in errors.items():
        assert entry["mse"] == pytest.approx(found["matching"][str(index)]["before"]["mse"], rel=1e-4)


def test_the_first_stage_trains_the_new_layers_alone(place: Path, tmp_path: Path) -> None:
    assert distill(place, tmp_path / "run", tune_steps=0) == 0
    hybrid = GKAForCausalLM.from_pretrained(place / "hybrid").state_dict()
    model = GKAForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(value, hybrid[name]) == (".gka." not in name), name
    losses = report(tmp_path / "run")["loss"]
    assert losses["finetuned"] == losses["distilled"] == report(place / "distilled")["loss"]["distilled"]


def test_without_the_first_stage(place: Path, tmp_path: Path) -> None:
    assert distill(place, tmp_path / "run", layer_steps=0, tune_steps=4) == 0
    found = report(tmp_path / "run")
    assert found["loss"]["distilled"] == found["loss"]["converted"]
    assert all(errors["before"] == errors["after"] for errors in found["matching"].values())


@pytest.mark.parametrize(
    ("changed", "bound"), [({"gradient_checkpointing": True}, 1e-5), ({"dtype": "bfloat16"}, 1e-2)]
)
def test_how_it_is_computed_changes_little(
    place: Path, tmp_path: Path, changed: dict[str, Any], bound: float
) -> None:
    assert distill(place, tmp_path / "run", **changed) == 0
    ours, theirs = report(tmp_path / "run")["loss"], report(place / "distilled")["loss"]
    for name, entry in theirs.items():
        assert ours[name]["nats_per_token"] == pytest.approx(entry["nats_per_token"], rel=bound), name


@pytest.mark.parametrize("kl_weight", [0.0, 2.0])
def test_accumulated_batches_give_the_same_losses(place: Path, tmp_path: Path, kl_weight: float) -> None:
    for name, batch in (("one", (4, 1)), ("two", (2, 2))):
        changed = {"batch_size": batch[0], "accumulation": batch[1], "kl_weight": kl_weight, "layer_steps": 0}
        assert distill(place, tmp_path / name, tune_steps=4, **changed) == 0
    one, two = (list(logged(tmp_path / name / "tune" / "checkpoint-4").values()) for name in ("one", "two"))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-5)


def test_the_divergence_is_part_of_the_loss(place: Path, tmp_path: Path) -> None:
    """At a learning rate of nearly nothing the two losses differ by the divergence from the teacher."""
    losses = {}
    for weight in (0.0, 1.0):
        output = tmp_path / str(weight)
        changed = {"layer_steps": 0, "tune_steps": 1, "learning_rate": 1e-12, "save_every": 1}
        assert distill(place, output, kl_weight=weight, **changed) == 0
        losses[weight] = logged(output / "tune" / "checkpoint-1")[1]
    assert losses[1.0] > losses[0.0] + 1e-4


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("target", "call"),
    [
        pytest.param("gka.training.trainer:ScheduleCallback.on_step_end", 6, id="while-layers-match"),
        pytest.param("gka.hf.folders:to_disk", 4, id="before-a-checkpoint-of-the-fine-tune-is-renamed"),
        pytest.param("gka.training.trainer:ScheduleCallback.on_step_end", 14, id="in-the-fine-tune"),
        pytest.param("gka.cli.distill:as_text", 1, id="before-the-report"),
    ],
)
def test_killed_and_resumed_gives_the_same_report(place: Path, tmp_path: Path, target: str, call: int) -> None:
    output = tmp_path / "run"
    killed = run_forked("-m", "kill_at", target, str(call), *arguments(place, output), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (output / "report.json").exists()
    assert cli.main(command("distill", output=output, resume=True)) == 0
    mine, theirs = report(output), report(place / "distilled")
    for part in ("matching", "loss", "recovered", "cache", "measured_on"):
        assert mine[part] == theirs[part], "bit for bit"


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_the_double_batch(place: Path, tmp_path: Path) -> None:
    done = run_ranks("-m", "gka", *arguments(place, tmp_path / "run", batch_size=2))
    assert done.stdout.count("held-out text") == 1, "one process reports"
    two, one = (report(output)["loss"] for output in (tmp_path / "run", place / "distilled"))
    for name, entry in one.items():
        assert two[name]["nats_per_token"] == pytest.approx(entry["nats_per_token"], rel=2e-3), name


# The ranking


def test_the_ranking(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ranked"
    line = command("rank-layers", str(place / "teacher"), data=[place / "texts"], output=output, **RUN)
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    found = report(output, "ranking.json")
    costs = [found["layers"][str(index)]["cost_nats_per_token"] for index in found["order"]]
    assert sorted(found["order"]) == [0, 1, 2, 3] and costs == sorted(costs)
    assert all(entry["after"]["mse"] < entry["before"]["mse"] for entry in found["layers"].values())
    assert f"--layers {','.join(map(str, sorted(found['order'][:2])))} OUT" in shown
    assert found["teacher_loss"] == report(place / "distilled")["loss"]["teacher"]
    assert cli.main(command("rank-layers", output=output, resume=True)) == 0
    assert report(output, "ranking.json")["layers"] == found["layers"], "nothing is trained twice"


# A teacher of transformers' own class


def test_a_qwen3_is_trained_and_saved_as_one(place: Path) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(place / "teacher" / "model", output_loading_info=True)
    assert type(model) is Qwen3ForCausalLM and not loading["missing_keys"] and not loading["unexpected_keys"]
    assert (model.config.num_hidden_layers, model.config.head_dim, model.config.vocab_size) == (4, 8, 259)
    losses = logged(place / "teacher")
    assert losses[max(losses)] < losses[1] - 0.5


@pytest.mark.parametrize("option", [{"mixer": "gla"}, {"attention_layers": "1"}, {"solver_steps": "8"}])
def test_a_qwen3_has_no_gka_layers_to_set(
    option: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path / "texts")
    options = {**SETTINGS, "family": "qwen3"}
    del options["solver_steps"]
    assert cli.main(command("train", output=tmp_path / "run", data=[data], **{**options, **option})) == 2
    assert "needs GKA layers; --family qwen3 has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Mistakes


def test_mistakes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**SETTINGS, "hidden_size": 8, "max_steps": 2}
    assert train(tmp_path / "other", place / "texts", **{**other, "save_every": 2}) == 0
    cases = [
        (command("distill", str(place / "hybrid")), "--teacher is missing"),
        (arguments(place, tmp_path / "run", teacher="/none"), "/none: no such checkpoint folder"),
        (arguments(place, tmp_path / "run", save_every=3, log_every=2), "--save-every 3"),
        (arguments(place, tmp_path / "run", teacher=tmp_path / "other"), "must be the original"),
        (arguments(place, tmp_path / "run", teacher=place / "hybrid"), "no attention layer of"),
        (arguments(place, place / "distilled"), "already contains a run"),
        (command("distill", output=place / "distilled", resume=True, kl_weight=3), "--kl-weight 1.0, not 3.0"),
        (command("distill", str(place / "teacher"), teacher=place / "teacher"), "needs type 'gka'"),
        (command("rank-layers", str(tmp_path / "other"), output=tmp_path / "run"), "has no attention layer"),
    ]
    capsys.readouterr()
    for line, words in cases:
        assert cli.main(line) == 2, words
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
        assert not (tmp_path / "run").exists(), words


def test_a_run_that_has_not_ended_says_how_to_go_on(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "options.yaml").write_bytes((place / "distilled" / "options.yaml").read_bytes())
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "gka distill --resume --output" in capsys.readouterr().err


# The whole way, in small


@pytest.mark.slow
def test_half_of_the_layers_replaced_recover_the_teacher(tmp_path: Path) -> None:
    library = sysconfig.get_paths()["stdlib"]
    shared = {
        "data": [f"{library}/{name}" for name in ("email", "json", "html")],
        "seq_len": 64,
        "validation_fraction": 0.1,
        "device": "cpu",
        "eval_every": 1000,
        "save_every": 1000,
    }
    size = {"hidden_size": 64, "intermediate_size": 128, "layers": 4, "heads": 4, "kv_heads": 2}
    lessons = {"max_steps": 200, "learning_rate": 5e-3, "batch_size": 8, "eval_bytes": 1000, "sample_tokens": 0}
    teacher, hybrid, output = (tmp_path / name for name in ("teacher", "hybrid", "run"))
    assert cli.main(command("train", output=teacher, family="qwen3", **size, **lessons, **shared)) == 0
    assert cli.main(["convert", str(teacher), "--layers", "1,3", str(hybrid)]) == 0
    rates = {"layer_steps": 100, "layer_learning_rate": 5e-3, "tune_steps": 40, "learning_rate": 1e-3}
    more = {"teacher": teacher, "output": output, "eval_bytes": 10_000, "batch_size": 8, **rates, **shared}
    assert cli.main(command("distill", str(hybrid), **more)) == 0
    found = report(output)
    assert all(errors["after"]["share"] < 0.25 < 0.9 < errors["before"]["share"] for errors in
               found["matching"].values())  # fmt: skip
    assert found["recovered"]["distilled"] > 0.5
    assert found["recovered"]["finetuned"] > 0.9
