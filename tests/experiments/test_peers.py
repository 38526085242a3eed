"""Other mixers in the model's skeleton: Gated DeltaNet and Mamba-2 of transformers, softmax attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from helpers import relative_error
from model_helpers import random_tokens
from transformers import TrainingArguments

import gka
from experiments.peers import MIXERS, mixer_config
from experiments.tasks.mqar_train import RecallTrainer

PEERS = ("gdn", "mamba2")


def config(mixer: str, **changes: Any) -> gka.GKAConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=12,
    )
    return mixer_config(mixer, **{**sizes, **changes})


def model(mixer: str, **changes: Any) -> gka.GKAForCausalLM:
    torch.manual_seed(0)
    return gka.GKAForCausalLM(config(mixer, initializer_range=0.2, **changes)).eval()


@pytest.mark.parametrize("mixer", PEERS)
def test_decoding_equals_the_whole(mixer: str) -> None:
    made, tokens = model(mixer), random_tokens(2, 9)
    with torch.no_grad():
        ref = made(tokens, use_cache=False).logits
        out = made(tokens[:, :5], use_cache=True)
        parts = [out.logits]
        for t in range(5, 9):
            out = made(tokens[:, t : t + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    assert relative_error(torch.cat(parts, dim=1), ref) < 1e-5
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made.generate(tokens, **options), made.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("mixer", PEERS)
def test_pads_on_the_left_change_nothing(mixer: str) -> None:
    made, tokens = model(mixer), random_tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), tokens], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    with torch.no_grad():
        assert relative_error(made(padded, attention_mask=mask).logits[:, 4:], made(tokens).logits) < 1e-5


@pytest.mark.parametrize("mixer", PEERS)
def test_other_pads_are_refused(mixer: str) -> None:
    """Behind a token they would change the state."""
    for mask in ([1, 1, 0, 1], [1, 1, 1, 0]):
        with pytest.raises(ValueError, match=f'mixer "{mixer}" would let it change the state'):
            model(mixer)(random_tokens(1, 4), attention_mask=torch.tensor([mask]))


@pytest.mark.parametrize("mixer", PEERS)
def test_causal_and_differentiable(mixer: str) -> None:
    """A gradient for every parameter, and none from the future."""
    made, tokens = model(mixer), random_tokens(1, 70)
    embedded = made.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = made(inputs_embeds=embedded).logits
    (before,) = torch.autograd.grad(logits[0, 40].sum(), embedded, retain_graph=True)
    assert not before[0, 41:].any() and before[0, :41].abs().amax(1).gt(0).all()
    logits.square().sum().backward()
    grads = {name: x.grad for name, x in made.named_parameters() if "embed" not in name}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values()), grads.keys()


@pytest.mark.parametrize("mixer", PEERS)
def test_packed_batches_are_refused(mixer: str) -> None:
    with pytest.raises(ValueError, match=rf'"{mixer}" cannot keep packed sequences apart'):
        model(mixer)(random_tokens(1, 7), cu_seq_lens_q=torch.tensor([0, 3, 7]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_saved_and_loaded(mixer: str, tmp_path: Path) -> None:
    made, tokens = model(mixer), random_tokens(1, 7)
    made.save_pretrained(tmp_path)
    loaded = gka.GKAForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made(tokens).logits)
    assert loaded.config.mixer == made.config.mixer and loaded.config.layer_types == made.config.layer_types


def test_starts_like_a_gka_layer() -> None:
    """Convolutions, decays and matrices; Mamba-2's decays are its own paper's."""
    ours, gdn, mamba = (model(m, num_hidden_layers=1).model.layers[0] for m in ("gka", "gdn", "mamba2"))
    bound = 4**-0.5
    for weight in (ours.gka.q_conv1d.weight, gdn.peer.inner.conv1d.weight, mamba.peer.inner.conv1d.weight):
        assert bound * 0.9 < weight.abs().max() <= bound
    assert gdn.peer.inner.dt_bias.max() < -2 and ours.gka.dt_bias.max() < -2
    assert torch.equal(mamba.peer.inner.A_log.exp().round(), torch.arange(1.0, 7.0))
    for linear in (ours.gka.q_proj, gdn.peer.inner.in_proj_qkvz, mamba.peer.inner.in_proj):
        assert linear.weight.std().item() == pytest.approx(0.2, rel=0.1)


def test_states_have_the_same_size() -> None:
    """A GKA layer's two states and Mamba-2's one; Gated DeltaNet's has half as many numbers."""
    numbers = {}
    for mixer in ("gka", *PEERS):
        cache = model(mixer)(random_tokens(1, 5), use_cache=True).past_key_values
        numbers[mixer] = sum(x.numel() for x in cache.layers[0].recurrent_states.values() if x is not None)
    assert numbers["gka"] == numbers["mamba2"] == 2 * numbers["gdn"] == 2 * 36 * 12


@pytest.mark.parametrize(
    ("mixer", "changes", "message"),
    [
        ("gdn", {"ridge_ratio": 0.1}, "ridge_ratio is 0.1; expected 0.02 with mixer='gdn'"),
        ("mamba2", {"solver_steps": [31]}, "expected None with mixer='mamba2'"),
        ("gdn", {"use_beta_gate": False}, "use_beta_gate is False; expected True"),
        ("gdn", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ("mamba2", {"head_dim": 10}, "head_dim is 10; expected hidden_size / num_attention_heads"),
    ],
)
def test_fields_of_a_gka_layer_are_refused(mixer: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(mixer, **changes)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weight_decay_is_of_matrices_alone(mixer: str, tmp_path: Path) -> None:
    """Every mixer's gates, decays, biases and skips are left alone, and every matrix is not."""
    made = model(mixer)
    trainer = RecallTrainer(
        model=made, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    )
    names = set(trainer.get_decay_parameter_names(made))
    assert names == {name for name, x in made.named_parameters() if x.ndim > 1}


def test_steps_cannot_be_set() -> None:
    with pytest.raises(ValueError, match="no layer of the model is a GKA layer"):
        model("gdn").set_solver_steps([8])


def test_loads_after_the_import_of_the_experiments(tmp_path: Path) -> None:
    """The library alone knows gka and gla, and says so."""
    model("gdn").save_pretrained(tmp_path)
    load = f"from gka import GKAForCausalLM; GKAForCausalLM.from_pretrained({str(tmp_path)!r})"
    failed = run_forked("-c", load, check=False)
    assert failed.returncode == 1
    assert "mixer is 'gdn'; expected one of ('gka', 'gla'), or a layer given to register_mixer" in failed.stderr
    run_forked("-c", f"import experiments; {load}")
