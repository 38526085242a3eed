"""The recipes of the paper's three sizes: what they build, for `gka train` and for GKAConfig alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from gka import GKAConfig, GKAForCausalLM
from gka.cli.commands import TrainOptions
from gka.cli.options import read_yaml
from gka.cli.train import model_config, training_arguments

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = 32000
# Arxiv 2511.21016: blocks, heads, width; then our feed-forward width, and the size in the paper's words.
SIZES = {
    "440m": (28, 8, 1024, 2816, 440e6),
    "1b": (28, 12, 1536, 4096, 1e9),
    "2.8b": (32, 20, 2560, 6912, 2.8e9),
}


def parameters(blocks: int, heads: int, width: int, inner: int, vocabulary: int) -> int:
    """Counted by hand: head dim 128, as many key/value heads, all gates and convolutions, embeddings not tied."""
    projections = 5 * width * heads * 128  # q, k, v, output gate, out
    convolutions = 3 * heads * 128 * 4
    gates = 3 * width * heads + 2 * heads  # decay, write strength, alpha; the latter two with a bias
    decay = 2 * heads  # A_log, dt_bias
    layer = projections + convolutions + gates + decay + 128  # the norm of a head
    block = layer + 3 * width * inner + 2 * width  # SwiGLU, two norms
    return blocks * block + width + 2 * vocabulary * width


@pytest.mark.parametrize("name", SIZES)
def test_recipe_has_the_size_of_the_paper(name: str) -> None:
    *sizes, in_the_paper = SIZES[name]
    config = GKAConfig.from_recipe(CONFIGS / f"{name}.yaml", vocab_size=VOCABULARY)
    assert config.head_dim == 128 and not config.has_attention
    with torch.device("meta"):
        model = GKAForCausalLM(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == parameters(*sizes, VOCABULARY)
    assert counted == pytest.approx(in_the_paper, rel=0.05)


@pytest.mark.parametrize("name", SIZES)
def test_gka_train_builds_the_same_model_and_trains_as_the_paper(name: str, tmp_path: Path) -> None:
    options = TrainOptions(**{**read_yaml(CONFIGS / f"{name}.yaml", TrainOptions), "device": "cpu"})
    tokenizer = ByT5Tokenizer()
    config = model_config(options, tokenizer)
    own = GKAConfig.from_recipe(
        CONFIGS / f"{name}.yaml",
        vocab_size=config.vocab_size,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    assert own.to_dict() == config.to_dict()
    arguments = training_arguments(
        options, tmp_path, learning_rate=options.learning_rate, eval_every=options.eval_every
    )
    assert (options.warmup, arguments.learning_rate, arguments.max_grad_norm) == (0.05, 1e-3, 1.0)
    assert arguments.optim.startswith("adamw")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_size: 64\nlayers: 2", "heads is missing"),
        ("hidden_size: 64\nlayers: 2\nheads: 2\nhead_dims: 8", "head_dims is no option; expected head_dim"),
        ("hidden_size: 64\nlayers: 2\nheads: 2\nfamily: qwen3", "family is 'qwen3'; expected gka"),
        ("hidden_size: 64\nlayers: 2\nheads: 2\nattention_layers: [2]", "expected blocks from 0 to 1"),
        ("hidden_size: 64\nlayers: 2\nheads: 3", "expected a multiple of num_attention_heads"),
        ("- a", "contains a list"),
        ("a: [", "not a YAML file"),
    ],
)
def test_a_recipe_that_describes_no_model_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        GKAConfig.from_recipe(tmp_path / "bad.yaml")


def test_a_recipe_may_hold_attention_layers_and_dashes(tmp_path: Path) -> None:
    (tmp_path / "hybrid.yaml").write_text("hidden-size: 64\nlayers: 2\nheads: 2\nattention-layers: [1]\nseed: 3")
    config = GKAConfig.from_recipe(tmp_path / "hybrid.yaml", vocab_size=300, use_cache=False)
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert (config.vocab_size, config.use_cache, config.intermediate_size) == (300, False, 176)
