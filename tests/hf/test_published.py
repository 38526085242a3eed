"""Checkpoints in the published format: they load, compute what the format means, and go back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from model_helpers import assert_near
from published_helpers import (
    HIDDEN,
    RANK,
    VOCAB,
    D,
    H,
    layer_shapes,
    published_config,
    published_shapes,
    published_tensors,
    restated_layer,
    write_folder,
)
from safetensors.torch import load_file
from tiny_run import train, write_texts
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import gka
from gka import GatedKalmaNet, GKAConfig, GKAForCausalLM, GKAForSequenceClassification, GKAModel
from gka.cli.main import main
from gka.nn.decay import with_rests

EXACT = 100  # iterations after which only rounding is left
LAYERS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "low rank": {"kv_proj_rank": RANK},
    "low rank, learned residual": {"kv_proj_rank": RANK, "kv_learnable_residual": True},
    "no convolution of v": {"use_v_conv": False},
    "no alpha": {"use_alpha_connection": False},
    "no beta": {"use_beta_gate": False},
    "no output gate": {"use_gate": False},
    "another ridge": {"ridge_strength": 0.1},
}
PATTERN = "*-GKA-SWA-GKA"
FULL = {"kv_proj_rank": RANK, "kv_learnable_residual": True}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def folder_of(tmp_path: Path, pattern: str = PATTERN, **changes: Any) -> Path:
    return write_folder(tmp_path / "published", published_config(pattern, **changes))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


# What the format means


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_computes_what_the_format_means(name: str, tmp_path: Path) -> None:
    changes = {**LAYERS[name], "num_iter": EXACT}
    config = published_config("GKA", changes)
    folder = write_folder(tmp_path, config)
    model = GKAForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layer = model.model.layers[0].gka
    x = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = {
        n.removeprefix("model.layers.0.gka."): v for n, v in published_tensors(config).items() if ".gka." in n
    }
    assert tensors.keys() == layer_shapes(config["gka_config"]).keys()
    expected = restated_layer(x, tensors, config["gka_config"])
    assert_near(layer(x[None])[0], expected, 1e-6)


@torch.no_grad()
def test_attention_layers_are_those_of_qwen3(tmp_path: Path) -> None:
    config = published_config("*-*", rope_theta=5e5, rms_norm_eps=1e-6)
    folder = write_folder(tmp_path, config)
    keys = {k: v for k, v in config.items() if k not in ("layer_types", "gka_config", "hybrid_override_pattern")}
    for attention in ("eager", "sdpa"):
        ours = GKAForCausalLM.from_pretrained(folder, attn_implementation=attention)
        theirs = Qwen3ForCausalLM(Qwen3Config(**keys, attn_implementation=attention)).eval().bfloat16()
        theirs.load_state_dict(published_tensors(config))
        theirs.model.rotary_emb = ours.model.rotary_emb.__class__(theirs.config)
        assert torch.equal(ours(tokens(2, 17)).logits, theirs(tokens(2, 17)).logits)


@torch.no_grad()
def test_a_sliding_layer_sees_its_window_alone(tmp_path: Path) -> None:
    model = GKAForCausalLM.from_pretrained(folder_of(tmp_path, "SWA"), dtype=torch.float64)
    one, other = tokens(1, 12), tokens(1, 12)
    other[0, 2] = 3 + (other[0, 2] - 2) % (VOCAB - 3)
    moved = (model(one).logits != model(other).logits).any(dim=2)[0]
    assert moved.tolist() == [False] * 2 + [True] * 5 + [False] * 5
    old = published_config("SWA", swa_config=None, sliding_window=3)
    assert GKAConfig.from_dict(old).sliding_window == 3


@pytest.mark.parametrize("gka_changes", [{}, FULL], ids=["repeated heads", "expanded heads"])
@torch.no_grad()
def test_cached_and_parallel_forms_agree(gka_changes: dict[str, Any], tmp_path: Path) -> None:
    model = GKAForCausalLM.from_pretrained(folder_of(tmp_path, gka=gka_changes), dtype=torch.float64)
    ids = tokens(2, 21)
    parallel = model(ids, use_cache=False).logits
    cache, parts = None, []
    for part in ids.split([9, 1, 1, 4, 6], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_near(torch.cat(parts, dim=1), parallel, 1e-9)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for at in range(ids.shape[1], generated.shape[1]):
        assert torch.equal(model(generated[:, :at]).logits[:, -1].argmax(-1), generated[:, at])
    mask = torch.ones(2, 21)
    mask[0, :6] = 0
    assert_near(model(ids, attention_mask=mask).logits[0, 6:], model(ids[:1, 6:]).logits[0], 1e-9)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    model = GKAForCausalLM.from_pretrained(folder_of(tmp_path, gka=FULL), dtype=torch.float64)
    one, other = tokens(1, 6), tokens(1, 9, seed=1)
    edges = torch.tensor([0, 6, 15], dtype=torch.int32)
    packed = model(
        torch.cat([one, other], dim=1), cu_seq_lens_q=edges, cu_seq_lens_k=edges, use_cache=False
    ).logits
    assert_near(packed, torch.cat([model(one).logits, model(other).logits], dim=1), 1e-9)


def test_gradients_reach_every_tensor(tmp_path: Path) -> None:
    model = GKAForCausalLM.from_pretrained(folder_of(tmp_path, "GKA", gka=FULL), dtype=torch.float64).train()
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())


def test_fresh_expansion_repeats_the_heads() -> None:
    sizes = dict(vocab_size=9, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=H, head_dim=D)
    torch.manual_seed(0)
    config = GKAConfig(**sizes, num_key_value_heads=2, kv_proj_rank=RANK, kv_learnable_residual=True)
    layer = GKAModel(config).layers[0].gka.double()
    plain = GatedKalmaNet.from_config(GKAConfig(**sizes, num_key_value_heads=2)).double()
    report = plain.load_state_dict(layer.state_dict(), strict=False)
    assert not report.missing_keys and len(report.unexpected_keys) == 6
    x = torch.randn(1, 11, HIDDEN, dtype=torch.float64)
    assert_near(layer(x), plain(x), 1e-9)


# Loading


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_loads_in_bfloat16_and_generates(shards: int, tied: bool, tmp_path: Path) -> None:
    config = published_config(PATTERN, FULL, tie_word_embeddings=tied)
    folder = write_folder(tmp_path, config, shards=shards)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is GKAForCausalLM and not model.training and model.dtype == torch.bfloat16
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors, loaded = published_tensors(config), model.state_dict()
    assert set(loaded) - set(tensors) == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert model.generate(tokens(2, 7), max_new_tokens=5, eos_token_id=None).shape == (2, 12)


def test_auto_classes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is GKAConfig and config.model_type == "gka"
    assert config.layer_types == ["full_attention", "linear_attention", "sliding_attention", "linear_attention"]
    assert (config.solver_steps, config.ridge_ratio, config.sliding_window) == ([31], 0.02, 5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000}
    assert GKAConfig.from_pretrained(folder).to_dict() == {**config.to_dict(), "_name_or_path": ""}
    assert type(AutoModel.from_pretrained(folder)) is GKAModel
    assert type(GKAForSequenceClassification.from_pretrained(folder)) is GKAForSequenceClassification
    assert type(AutoModelForCausalLM.from_config(config)) is GKAForCausalLM


@pytest.mark.parametrize("load", [GKAForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_steps_and_ridge_can_be_replaced(load: Any, tmp_path: Path) -> None:
    model = load(folder_of(tmp_path), solver_steps=(8, 8), ridge_ratio=0.05)
    layer = model.model.layers[1].gka
    assert (list(layer.solver_steps), layer.ridge_ratio) == ([8, 8], 0.05)
    assert (model.config.solver_steps, model.config.ridge_ratio) == ([8, 8], 0.05)
    with pytest.raises(ValueError, match="ridge_ratio is -1"):
        load(folder_of(tmp_path), ridge_ratio=-1)


@torch.no_grad()
def test_float32_of_the_decay_is_kept(tmp_path: Path) -> None:
    config = published_config("GKA-GKA")
    tensors = published_tensors(config)
    for name in tensors:
        if name.endswith(("A_log", "dt_bias")):
            tensors[name] = torch.randn(H)
    model = GKAForCausalLM.from_pretrained(write_folder(tmp_path / "a", config, tensors))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}, "one dtype, which FSDP can shard"
    held = with_rests(model.state_dict(), model)
    assert held.keys() == tensors.keys() and all(torch.equal(held[n], value) for n, value in tensors.items())
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    written = stored(tmp_path / "b")
    assert {n: v.dtype for n, v in written.items()} == {n: v.dtype for n, v in tensors.items()}
    assert all(torch.equal(written[n], value) for n, value in tensors.items())


def test_keys_of_before_and_of_today(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 1024}
    today = published_config(rope_parameters=rope, dtype="bfloat16")
    del today["rope_theta"], today["rope_scaling"], today["torch_dtype"]
    before = published_config(
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    )
    assert GKAConfig.from_dict(today).to_dict() == GKAConfig.from_dict(before).to_dict()
    least = {k: v for k, v in published_config("GKA").items() if k not in ("gka_config", "layer_types")}
    assert GKAConfig.from_dict(least).to_dict() == GKAConfig.from_dict(published_config("GKA")).to_dict()


def test_a_repository_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", True
    )  # else it asks for what may be there, too
    place = tmp_path / "models--someone--hybrid"
    commit = "0123456789" * 4
    config = published_config(PATTERN)
    folder = write_folder(place / "snapshots" / commit, config)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    options = dict(cache_dir=tmp_path, local_files_only=True)
    for load in (GKAForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load("someone/hybrid", **options).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in published_tensors(config).items())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for load in (GKAForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"extra \(1\): lm_head.weight"):
            load("someone/hybrid", **options)


# Export


@pytest.mark.parametrize("name", ["plain", "expanded", "tied, switches off"])
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    off = {"use_v_conv": False, "use_alpha_connection": False, "use_beta_gate": False, "use_gate": False}
    changes = {"plain": {}, "expanded": FULL, "tied, switches off": off}[name]
    config = published_config(PATTERN, {**changes, "num_iter": 12}, tie_word_embeddings=name.startswith("tied"))
    first = write_folder(tmp_path / "first", config)
    (first / "tokenizer.json").write_text("{}")
    (first / "evil.py").write_text("raise SystemExit")
    assert main(["export", str(first), str(tmp_path / "ours"), "--format", "gka"]) == 0
    own = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert own["model_type"] == "gka" and own["solver_steps"] == [13]
    second = tmp_path / "second"
    assert (
        main(["export", str(tmp_path / "ours"), str(second), "--format", "hybrid_qwen3", "--shard-mb", "0.02"])
        == 0
    )
    assert len(list(second.glob("model-*.safetensors"))) > 1
    assert (second / "tokenizer.json").exists() and not (second / "evil.py").exists()
    before, after = stored(first), stored(second)
    assert before.keys() == after.keys() == published_shapes(config).keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype == torch.bfloat16
        assert torch.equal(value.view(torch.int16), after[key].view(torch.int16)), key
    written = json.loads((second / "config.json").read_text())
    assert {**written["gka_config"]} == config["gka_config"]
    same = config.keys() - {"rope_theta", "rope_scaling", "torch_dtype", "transformers_version"}
    assert {key: written[key] for key in same} == {key: config[key] for key in same}
    assert GKAConfig.from_dict(written).to_dict() == GKAConfig.from_dict(config).to_dict()


def test_export_refuses_what_the_format_cannot_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    for number, (changes, words) in enumerate(
        [
            ({"mixer": "gla"}, "mixer is 'gla'"),
            ({"use_forget_gate": False}, "use_forget_gate is False"),
            ({"solver_steps": [16, 16]}, "--num-iter"),
            ({"solver": "cg"}, "--num-iter"),
            ({"layer_types": ["full_attention"], "use_qk_norm": False}, "use_qk_norm is False"),
            ({"mlp_bias": True}, "mlp_bias is True"),
            ({"attention_output_bias": True}, "attention_output_bias is True"),
        ]
    ):
        GKAForCausalLM(GKAConfig(**sizes, **changes)).save_pretrained(tmp_path / str(number))
        assert main(["export", str(tmp_path / str(number)), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "2"), str(tmp_path / "out"), "--num-iter", "20"]) == 0
    assert GKAConfig.from_pretrained(tmp_path / "out").solver_steps == [21]
    assert main(["export", str(tmp_path / "2"), str(tmp_path / "out"), "--num-iter", "20"]) == 2
    assert "out: is not empty" in capsys.readouterr().err


def test_a_model_of_ours_goes_out_and_back(tmp_path: Path) -> None:
    config = GKAConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        rms_norm_eps=1e-5,
        chunk_size=16,
        solver_steps=[31],
    )
    model = GKAForCausalLM(config).eval()
    gka.export_published(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["gka_config"]["chunk_size"] == 16
    assert torch.equal(loaded(tokens(1, 8)).logits, model(tokens(1, 8)).logits)


def test_the_commands_take_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert train(run, write_texts(tmp_path / "texts"), max_steps=2, save_every=2, sample_tokens=0) == 0
    assert main(["export", str(run), str(out)]) == 0
    texts = []
    for folder in (run, out):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "the", "--max-new-tokens", "9", "--seed", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert GKAConfig.from_pretrained(out).solver_steps == [8]


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GKAForCausalLM.from_pretrained(folder_of(tmp_path))

    def stop(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(OSError, match="disk full"):
        gka.export_published(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    gka.export_published(model, tmp_path / "out")  # what was left half-made is in nobody's way
    assert {path.name for path in tmp_path.iterdir()} == {"published", "out"}
