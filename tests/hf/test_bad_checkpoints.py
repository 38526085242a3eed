"""Checkpoints that are damaged or contradict themselves: an error that says what, or a model that works."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_helpers import RANK, VOCAB, published_config, published_shapes, published_tensors, write_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from gka import GKAConfig, GKAForCausalLM
from gka.cli.main import main
from gka.hf.checkpoint import BadCheckpoint

GKA = "model.layers.1.gka."
FULL = {"kv_proj_rank": RANK, "kv_learnable_residual": True}
LOADERS = [GKAForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained]


def refused(folder: Path, *words: str, **options: Any) -> str:
    """Every way of loading raises one error with all the words; its message."""
    for load in LOADERS:
        with pytest.raises(BadCheckpoint) as caught:
            load(folder, **options)
        message = str(caught.value)
        assert all(word in message for word in (str(folder), *words)), message
    return message


def folder_with(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], shards: int = 3, **keys: Any) -> Path:
    config = published_config("*-GKA", FULL, **keys)
    tensors = published_tensors(config)
    change(tensors)
    return write_folder(tmp_path / "model", config, tensors, shards)


# Tensors


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    names = [GKA + "k_rep", GKA + "q_proj.weight", "model.norm.weight"]
    folder = folder_with(tmp_path, lambda tensors: [tensors.pop(name) for name in names])
    message = refused(folder, "missing (3)", *names)
    assert "extra" not in message and "shape" not in message


def test_extra_tensors_are_listed(tmp_path: Path) -> None:
    names = [GKA + "k_proj.bias", "model.layers.2.mlp.up_proj.weight"]
    folder = folder_with(tmp_path, lambda tensors: tensors.update(dict.fromkeys(names, torch.ones(3).bfloat16())))
    refused(folder, "extra (2)", *names)


@pytest.mark.parametrize("shards", [1, 3])
def test_misshapen_tensors_are_listed_with_both_shapes(shards: int, tmp_path: Path) -> None:
    name = GKA + "A_log"
    folder = folder_with(tmp_path, lambda tensors: tensors.update({name: torch.ones(5).bfloat16()}), shards)
    refused(folder, "of another shape (1)", f"{name} [5], expected [4]")


def test_all_kinds_are_listed_at_once_and_long_lists_cut(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop("lm_head.weight")
        tensors.update({f"extra{number:02}": torch.ones(1).bfloat16() for number in range(30)})
        tensors["model.norm.weight"] = torch.ones(2).bfloat16()

    folder = folder_with(tmp_path, change)
    message = refused(folder, "missing (1)", "extra (30)", "extra19 and 10 more", "of another shape (1)")
    assert "extra20" not in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64, torch.float8_e4m3fn])
def test_a_tensor_of_another_dtype_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    name = GKA + "o_proj.weight"
    folder = folder_with(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, "of another dtype (1)", name)


def test_integers_everywhere_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda t: t.update({name: value.to(torch.int16) for name, value in t.items()}))
    refused(folder, "of another dtype", "I16")


def test_a_dtype_in_the_configuration_that_the_tensors_do_not_have(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: None, torch_dtype="float32")
    refused(folder, "dtype torch.float32", "BF16", "dtype=...")
    assert GKAForCausalLM.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    names = [GKA + "v_conv1d.weight", "model.embed_tokens.weight"]
    folder = folder_with(tmp_path, lambda tensors: [tensors[name].view(-1)[-1:].fill_(value) for name in names])
    refused(folder, "NaN or infinite values in (2)", *names)


@pytest.mark.parametrize(
    "key", ["hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim"]
)
@pytest.mark.parametrize("scale", [2, 10**10])
def test_a_size_that_the_tensors_do_not_have(key: str, scale: int, tmp_path: Path) -> None:
    config = published_config("*-GKA")
    folder = write_folder(tmp_path, config)
    (folder / "config.json").write_text(json.dumps({**config, "gka_config": None, key: config[key] * scale}))
    for load in LOADERS:
        with pytest.raises(ValueError, match=f"of another shape|no model has the sizes|{key} is"):
            load(folder)


def test_tied_embeddings_contradict_a_head(tmp_path: Path) -> None:
    config = published_config("*-GKA")
    folder = write_folder(tmp_path, config)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refused(folder, "extra (1): lm_head.weight")


# Files


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_named(shards: int, kept: float, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: None, shards)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    refused(folder, file.name, "damaged or cut short")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: None)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "not there: model-00002-of-00003.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_bad_index_is_named(text: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: None)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json" if text != "{}" else "index")


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    there = {**index["weight_map"], "model.norm.weight": "../other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": there}))
    refused(folder, "no safetensors file beside it: ../other.safetensors")
    there["model.norm.weight"] = "model-00001-of-00003.safetensors"
    there["lm_head.weight"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": there}))
    refused(folder, "says something else of")


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, published_config())
    for file in folder.glob("model*"):
        file.unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_pickle_files_are_refused_unless_asked_for(tmp_path: Path) -> None:
    config = published_config("*-GKA", FULL)
    folder = write_folder(tmp_path, config)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(published_tensors(config), folder / "pytorch_model.bin")
    refused(folder, "pickle files (pytorch_model.bin)", "use_safetensors=False")
    model = GKAForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert all(torch.equal(model.state_dict()[n].bfloat16(), v) for n, v in published_tensors(config).items())
    less = published_tensors(config)
    less.pop("model.norm.weight")
    torch.save(less, folder / "pytorch_model.bin")
    refused(folder, "missing (1): model.norm.weight", use_safetensors=False)
    torch.save({**less, "model.norm.weight": torch.ones(3).bfloat16()}, folder / "pytorch_model.bin")
    refused(folder, "misshapen (1): model.norm.weight", use_safetensors=False)


class Bomb:
    """Unpickling it runs code."""

    def __reduce__(self) -> Any:
        return (exec, ("import sys; sys.modules['gka_bomb'] = sys",))


def test_code_in_a_pickle_is_not_run_even_then(tmp_path: Path) -> None:
    config = published_config()
    folder = write_folder(tmp_path, config)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({**published_tensors(config), "bomb": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|pickle"):
        GKAForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert "gka_bomb" not in sys.modules


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_of_a_checkpoint_is_never_run(trust: bool | None, tmp_path: Path) -> None:
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = write_folder(tmp_path, published_config(auto_map=classes))
    (folder / "evil.py").write_text("import sys\nsys.modules['gka_bomb'] = sys\nraise SystemExit\n")
    model = AutoModelForCausalLM.from_pretrained(folder, **({} if trust is None else {"trust_remote_code": trust}))
    assert type(model) is GKAForCausalLM and "gka_bomb" not in sys.modules
    assert model.config.auto_map == {}


def test_a_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    for arguments in (["export", str(folder), str(tmp_path / "out")], ["generate", str(folder)]):
        assert main(arguments) == 2
        assert "missing (1): model.norm.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ours_with_nan_is_refused_by_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GKAForCausalLM.from_pretrained(write_folder(tmp_path / "a", published_config()))
    model.lm_head.weight.data[3, 3] = math.nan
    model.save_pretrained(tmp_path / "b")
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "out")]) == 2
    assert "NaN or infinite values in (1): lm_head.weight" in capsys.readouterr().err


# Configurations

REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (dict(hybrid_override_pattern="*-GDN-M2-BMF", layer_types=None, num_hidden_layers=4), {}, [
        "layer 1 is 'GDN' (Gated DeltaNet)", "layer 2 is 'M2' (Mamba-2)", "layer 3 is 'BMF' (B'MOJO-F)",
        "it has *, GKA and SWA"]),
    (dict(hybrid_override_pattern="*-GKA*"), {}, ["layer 1 is 'GKA*'"]),
    (dict(hybrid_override_pattern="GKA-GKA"), {}, ["layer_types is ['*', 'GKA']", "hybrid_override_pattern"]),
    (dict(hybrid_override_pattern="*"), {}, ["num_hidden_layers = 2"]),
    (dict(hybrid_override_pattern=None, layer_types=None), {}, ["hybrid_override_pattern is None"]),
    (dict(layer_types=["*", "SWA"], hybrid_override_pattern=None), {}, ["swa_config.window_size is None"]),
    (dict(layer_types=["*", "SWA"], hybrid_override_pattern=None, swa_config={"window_size": 0}), {}, [
        "swa_config.window_size is 0"]),
    (dict(swa_config={"sink": 4}), {}, ["swa_config.sink is 4", "does not know"]),
    (dict(use_sliding_window=True), {}, ["use_sliding_window is True"]),
    (dict(quantization_config={"bits": 4}), {}, ["quantization_config is {'bits': 4}"]),
    (dict(partial_rotary_factor=0.5), {}, ["partial_rotary_factor is 0.5"]),
    (dict(rope_theta=-1.0), {}, ["rope_theta is -1.0"]),
    (dict(rope_parameters={"rope_theta": 5.0}), {}, ["rope_theta is 1000000"]),
    (dict(rope_scaling={"rope_type": "spiral"}), {}, ["rope_type is 'spiral'"]),
    (dict(rope_theta=math.nan), {}, ["rope_theta is nan"]),
    (dict(hidden_act=["silu"]), {}, ["hidden_act is ['silu']"]),
    (dict(torch_dtype="float4"), {}, ["torch_dtype is 'float4'"]),
    (dict(eos_token_id=[2, VOCAB]), {}, [f"eos_token_id is [2, {VOCAB}]"]),
    (dict(gka_config=7), {}, ["gka_config is 7"]),
    (dict(rms_norm_eps=1e-5), {}, ["gka_config.norm_eps is 1e-06", "rms_norm_eps, 1e-05"]),
    ({}, {"gla_rescale": False}, ["gka_config.gla_rescale is False", "expected True"]),
    ({}, {"solver_type": "cg"}, ["gka_config.solver_type is 'cg'", "'chebyshev'"]),
    ({}, {"bp_lambda": False}, ["gka_config.bp_lambda is False"]),
    ({}, {"use_forgetting_gate": False}, ["gka_config.use_forgetting_gate is False"]),
    ({}, {"use_forgetting_gate_kk": False}, ["gka_config.use_forgetting_gate_kk is False"]),
    ({}, {"num_k_heads": 4}, ["gka_config.num_k_heads is 4", "num_key_value_heads, 2"]),
    ({}, {"num_v_heads": 1}, ["gka_config.num_v_heads is 1"]),
    ({}, {"head_dim": 16}, ["gka_config.head_dim is 16"]),
    ({}, {"num_iter": 0}, ["gka_config.num_iter is 0"]),
    ({}, {"num_iter": 10**9}, ["gka_config.num_iter is 1000000000", "1 to 1000"]),
    ({}, {"ridge_strength": 0}, ["gka_config.ridge_strength is 0"]),
    ({}, {"kv_proj_rank": -1}, ["gka_config.kv_proj_rank is -1"]),
    ({}, {"sketch_dim": 32}, ["gka_config.sketch_dim is 32", "does not know"]),
    (dict(num_key_value_heads=4), {"num_k_heads": 4, "num_v_heads": 4, "kv_proj_rank": 3}, ["kv_proj_rank is 3"]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "gka", "words"), REFUSED, ids=lambda case: str(case)[:50])
def test_what_is_not_here_is_named(
    keys: dict[str, Any], gka: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, published_config("*-GKA"))
    (folder / "config.json").write_text(json.dumps({**published_config("*-GKA", gka), **keys}))
    for load in (*LOADERS, GKAConfig.from_pretrained):
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_keys_that_are_not_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("transformers").propagate = True
    try:
        GKAConfig.from_dict(published_config(attention_sinks=4, gdn_config=None))
    finally:
        logging.getLogger("transformers").propagate = False
    assert "attention_sinks" in caplog.text and "gdn_config" not in caplog.text


VALUES = [None, "", "abc", -1, 0, 1, 3, 2.5, 10**9, math.nan, math.inf, True, False, [], [1], {}, {"a": 1}]


def corruptions(count: int = 64) -> list[tuple[str, str | None, Any]]:
    """(table, key or None, value): of all keys and values, the same ones every time."""
    config = published_config("*-GKA-SWA", FULL)
    places = [("", key) for key in sorted(config)]
    places += [(table, key) for table in ("gka_config", "swa_config") for key in sorted(config[table])]
    places = [place for place in places if place != ("", "model_type")]
    draw = random.Random(0)
    draw.shuffle(places)
    assert count >= len(places), "every key is corrupted once"
    places += draw.choices(places, k=count - len(places))
    return [(*place, draw.choice(VALUES)) for place in places]


@pytest.mark.parametrize(("table", "key", "value"), corruptions(), ids=str)
@torch.no_grad()
def test_corrupted_values_give_an_error_that_names_them_or_work(
    table: str, key: str, value: Any, tmp_path: Path
) -> None:
    config = published_config("*-GKA-SWA", FULL)
    folder = write_folder(tmp_path, config, shards=1)
    spoilt = copy.deepcopy(config)
    (spoilt[table] if table else spoilt)[key] = value
    (folder / "config.json").write_text(json.dumps(spoilt))
    try:
        model = GKAForCausalLM.from_pretrained(folder)
    except ValueError as error:
        told = str(error)
        named = {key, *(NAMED_BY.get(key, ()))}
        assert any(name in told for name in named) or "of another shape" in told or "missing (" in told, told
        return
    ids = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(0))
    assert model(ids).logits.isfinite().all()
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == published_shapes(config)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 10)


# A key whose corruption shows in others.
NAMED_BY = {
    "gka_config": ("extra (",),
    "num_hidden_layers": ("hybrid_override_pattern",),
    "tie_word_embeddings": ("lm_head.weight",),
    "attention_bias": ("bias",),
    "kv_proj_rank": ("proj_k", "extra ("),
    "kv_learnable_residual": ("k_rep",),
    "use_gate": ("g_proj",),
    "use_v_conv": ("v_conv1d",),
    "use_alpha_connection": ("alpha_proj",),
    "use_beta_gate": ("b_proj",),
}
