"""`solver_steps` of a model that is there: changed when it is loaded, or later, for all layers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from model_helpers import new_cache, random_inputs, random_tokens, tiny_layer, tiny_model
from tiny_run import command, write_texts
from transformers import AutoModelForCausalLM

from gka import GKAForCausalLM
from gka.cli import main as cli
from gka.nn.layer import GatedKalmaNet
from gka.training.data import load_tokenizer, vocabulary_size


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(random_tokens(2, 24), use_cache=False).logits


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
@pytest.mark.parametrize("solver_steps", [[7], (9, 4), None])
def test_set_steps_is_a_model_made_with_them(kind: str, solver_steps: Any) -> None:
    model, made = tiny_model(kind, solver_steps=[3]), tiny_model(kind, solver_steps=solver_steps)
    assert relative_error(logits(model), logits(made)) > 1e-3
    model.set_solver_steps(solver_steps)
    assert torch.equal(logits(model), logits(made))
    assert model.config.solver_steps == made.config.solver_steps


@pytest.mark.parametrize("loader", [GKAForCausalLM, AutoModelForCausalLM])
def test_steps_when_loading(loader: Any, tmp_path: Path) -> None:
    tiny_model("hybrid").save_pretrained(tmp_path / "first")
    loaded = loader.from_pretrained(tmp_path / "first", solver_steps=[5])
    assert torch.equal(logits(loaded), logits(tiny_model("hybrid", solver_steps=[5])))
    loaded.set_solver_steps((4, 4))
    loaded.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(loader.from_pretrained(tmp_path / "second")), logits(loaded))


CG: dict[str, Any] = {"solver": "cg", "solver_steps": [40], "tolerance": 1e-3}


def test_set_solver_is_a_model_made_with_it(tmp_path: Path) -> None:
    """In memory, saved and loaded; `set_solver_steps` keeps solver and tolerance."""
    model, made = tiny_model("hybrid"), tiny_model("hybrid", **CG)
    assert relative_error(logits(model), logits(made)) > 1e-6
    model.set_solver(**CG)
    assert torch.equal(logits(model), logits(made))
    model.save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(made))
    model.set_solver_steps([2])
    assert torch.equal(logits(model), logits(tiny_model("hybrid", **{**CG, "solver_steps": [2]})))
    model.set_solver("chebyshev")
    assert torch.equal(logits(model), logits(tiny_model("hybrid")))
    with pytest.raises(ValueError, match=r"tolerance is 0\.1; expected None with solver"):
        model.set_solver("chebyshev", tolerance=0.1)
    assert (model.config.solver, model.config.tolerance) == ("chebyshev", None)


@torch.no_grad()
def test_decoding_by_conjugate_gradient_is_the_whole_pass() -> None:
    model, tokens = tiny_model("gka", solver="cg"), random_tokens(2, 12)
    cache = new_cache(model.config)
    model(tokens[:, :9], past_key_values=cache)
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
    assert relative_error(torch.cat(steps, 1), model(tokens).logits[:, 9:]) < 1e-6


@torch.no_grad()
def test_steps_change_in_the_middle_of_a_text() -> None:
    """The states do not depend on them: with one layer, what a cache holds is the same whatever read the text."""
    model, tokens = tiny_model("gka without groups"), random_tokens(2, 12)
    cache = new_cache(model.config)
    model.set_solver_steps([2])
    model(tokens[:, :11], past_key_values=cache)
    model.set_solver_steps(None)
    after = model(tokens[:, 11:], past_key_values=cache).logits
    assert relative_error(after, model(tokens).logits[:, -1:]) < 1e-6


@pytest.mark.parametrize("solver_steps", [[], [0], [2.0], [True]])
def test_a_layer_refuses_what_its_configuration_would(solver_steps: Any) -> None:
    layer = tiny_layer(solver_steps=[3])
    with pytest.raises(ValueError, match="expected None or integers"):
        layer.set_solver_steps(solver_steps)
    assert list(layer.solver_steps) == [3]


def test_steps_of_a_model_without_gka_layers() -> None:
    model = tiny_model("hybrid", layer_types=["full_attention"])
    with pytest.raises(ValueError, match="no layer of the model is a GKA layer"):
        model.set_solver_steps([4])


def test_set_steps_under_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model, expected = peft.get_peft_model(tiny_model(), adapter).eval(), tiny_model(solver_steps=[6])
    model.set_solver_steps([6])
    assert relative_error(logits(model), logits(expected)) < 1e-6


@torch.no_grad()
def test_set_steps_of_a_compiled_layer() -> None:
    torch._dynamo.reset()
    layer, x = tiny_layer(solver_steps=[3]), random_inputs(2, 12, 36)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    compiled.set_solver_steps([6])
    assert relative_error(compiled(x), tiny_layer(solver_steps=[6])(x)) < 1e-10


@pytest.mark.parametrize("solver_steps", [[], [0], [2.5], 8, "8", [True]])
def test_refuses_what_are_no_steps(solver_steps: Any) -> None:
    model = tiny_model(solver_steps=[9])
    with pytest.raises(ValueError, match="solver_steps is"):
        model.set_solver_steps(solver_steps)
    assert model.config.solver_steps == [9]
    assert [module.solver_steps for module in model.modules() if isinstance(module, GatedKalmaNet)] == [(9,), (9,)]


def test_refuses_steps_where_nothing_is_solved() -> None:
    with pytest.raises(ValueError, match="mixer='gla'"):
        tiny_model("gla").set_solver_steps([9])


def test_of_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = str(write_texts(tmp_path / "texts", files=3, lines=2))
    tokenizer = load_tokenizer(None)
    for mixer in ("gka", "gla"):
        model = tiny_model(mixer, torch.float32, vocab_size=vocabulary_size(tokenizer), eos_token_id=1)
        model.save_pretrained(tmp_path / mixer)
        tokenizer.save_pretrained(tmp_path / mixer)
    capsys.readouterr()
    printed = []
    for solver_steps in ("31", "1"):
        assert cli.main(command("eval", str(tmp_path / "gka"), data=texts, solver_steps=solver_steps)) == 0
        printed.append(capsys.readouterr().out)
    assert cli.main(command("eval", str(tmp_path / "gka"), data=texts)) == 0
    assert capsys.readouterr().out == printed[0] != printed[1]
    assert cli.main(command("generate", str(tmp_path / "gka"), solver_steps="4,4", max_new_tokens=3)) == 0
    assert cli.main(command("generate", str(tmp_path / "gla"), solver_steps="4", max_new_tokens=3)) == 2
    assert "--solver-steps: solver_steps is [4]; expected None with mixer='gla'" in capsys.readouterr().err
    assert cli.main(command("eval", str(tmp_path / "gka"), data=texts, solver="cg", tolerance="0.5")) == 0
    assert capsys.readouterr().out != printed[0]
    assert cli.main(command("eval", str(tmp_path / "gka"), data=texts, tolerance="0.5")) == 2
    assert "--tolerance: tolerance is 0.5; expected None with solver='chebyshev'" in capsys.readouterr().err
