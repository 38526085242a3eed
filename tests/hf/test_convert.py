"""Conversion of Transformers: what is copied, what stays untouched to the bit, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forked import run_forked
from model_helpers import FULL, GKA, SLIDING, random_tokens, tiny_model
from torch import Tensor
from transformer_helpers import MODELS, SIZES, small
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import gka
from gka import GKAForCausalLM, convert
from gka.cli.main import main
from gka.hf.cache_size import cache_bytes
from gka.hf.convert import replace_by_fresh


def left_padded(T: int = 17) -> dict[str, Tensor]:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :5] = 0
    return dict(input_ids=random_tokens(2, T), attention_mask=mask)


# No layer replaced: the same model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_without_a_replaced_layer_every_bit_is_the_same(kind: str, dtype: torch.dtype) -> None:
    model = small(kind, dtype)
    new = convert(model, [])
    tokens = random_tokens(2, 17)
    assert type(new) is GKAForCausalLM and new.dtype == dtype
    assert torch.equal(new(tokens).logits, model(tokens).logits)
    batch = left_padded()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    theirs = model(**batch, position_ids=positions).logits
    assert torch.equal(new(**batch, position_ids=positions).logits, theirs)
    assert torch.equal(new(**batch).logits, theirs), "positions count from the first token that is no pad"


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_without_a_replaced_layer_the_cache_gives_the_same(kind: str) -> None:
    model, tokens = small(kind), random_tokens(2, 17)
    new = convert(model, [])
    caches: list[Any] = [None, None]
    for part in tokens.split([9, 1, 4, 3], dim=1):
        outputs = [m(part, past_key_values=c, use_cache=True) for m, c in zip((model, new), caches, strict=True)]
        caches = [output.past_key_values for output in outputs]
        assert torch.equal(outputs[0].logits, outputs[1].logits)


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_replaced_layer_the_text_and_the_gradients_are_the_same(kind: str) -> None:
    model = small(kind)
    new, batch = convert(model, []), left_padded()
    texts = [m.generate(**batch, max_new_tokens=12, do_sample=False) for m in (model, new)]
    assert torch.equal(*texts)
    for m in (model, new):
        m(batch["input_ids"], labels=batch["input_ids"]).loss.backward()
    theirs = {name: value.grad for name, value in model.named_parameters()}
    assert {name for name, _ in new.named_parameters()} == set(theirs)
    assert all(torch.equal(value.grad, theirs[name]) for name, value in new.named_parameters())


# Replaced layers


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_copied_and_what_stays(kind: str) -> None:
    model = small(kind)
    new = convert(model, [3, 1])
    assert [i for i, name in enumerate(new.config.layer_types) if name == GKA] == [1, 3]
    old, weights = model.state_dict(), new.state_dict()
    for name, value in weights.items():
        if ".gka." not in name:
            assert torch.equal(value, old[name]), name
            assert value.data_ptr() != old[name].data_ptr()
    replaced = ("model.layers.1.self_attn.", "model.layers.3.self_attn.")
    assert {n for n in old if not n.startswith(replaced)} == {n for n in weights if ".gka." not in n}
    for index in (1, 3):
        ours, theirs = f"model.layers.{index}.gka.", f"model.layers.{index}.self_attn."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert torch.equal(weights[f"{ours}{part}.weight"], old[f"{theirs}{part}.weight"])
        D = new.config.head_dim
        v, o = old[f"{theirs}v_proj.weight"], old[f"{theirs}o_proj.weight"]
        for head in range(4):  # two query heads read one value head
            rows = slice(D * head, D * (head + 1))
            expected = (o[:, rows].T + v[D * (head // 2) : D * (head // 2 + 1)]) / 2
            assert torch.equal(weights[f"{ours}g_proj.weight"][rows], expected)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_layers_that_stay_give_the_same_bits(kind: str) -> None:
    """All before the first replaced layer is the original's; a later layer too, once it gets the same input."""
    model = small(kind)
    new, tokens = convert(model, [1]), random_tokens(2, 17)
    theirs = model(tokens, output_hidden_states=True).hidden_states
    ours = new(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[2], theirs[2])
    new.model.layers[1].register_forward_hook(lambda *_: theirs[2])
    assert torch.equal(new(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_hybrid_saves_loads_and_generates(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    new, batch = convert(small(kind, dtype), [0, 2]), left_padded()
    assert {value.dtype for value in new.parameters()} == {dtype}
    new.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is GKAForCausalLM and loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, new(**batch).logits)
    text = loaded.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, new.generate(**batch, max_new_tokens=6, do_sample=False))
    one = loaded.generate(batch["input_ids"][:1, 5:], max_new_tokens=6, do_sample=False)
    if dtype == torch.float32:
        assert text[0, 5 : 5 + one.shape[1]].tolist() == one[0].tolist(), "pads change nothing"


def test_the_given_model_stays_as_it_is() -> None:
    model, tokens = small("qwen3").train(), random_tokens(1, 9)
    before = copy.deepcopy(model.state_dict())
    new = convert(model, [0, 1, 2, 3], ridge_ratio=0.05, solver="cg", solver_steps=[8, 8], use_v_conv=False)
    assert new.training and not new.config.has_attention
    assert (new.config.ridge_ratio, new.config.solver, new.config.solver_steps) == (0.05, "cg", [8, 8])
    assert new.model.layers[0].gka.v_conv1d is None
    new(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(new.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_seed_decides_what_is_fresh() -> None:
    model = small("qwen3")
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(convert(model, [1]).model.layers[1].gka.q_conv1d.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_hybrid_can_be_converted_further() -> None:
    model, tokens = small("qwen3"), random_tokens(2, 9)
    first = convert(model, [1], ridge_ratio=0.05)
    second = convert(first, [3])
    assert second.config.layer_types == [FULL, GKA, FULL, GKA] and second.config.ridge_ratio == 0.05
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items()
               if ".3.self_attn" not in name)  # fmt: skip
    assert torch.equal(convert(second, [])(tokens).logits, second(tokens).logits)
    assert convert(tiny_model("hybrid, all three", torch.float32), [0]).config.layer_types == [GKA, GKA, FULL]


def test_the_window_of_mistral_is_every_layers() -> None:
    assert convert(small("mistral, sliding"), [2]).config.layer_types == [SLIDING, SLIDING, GKA, SLIDING]


def test_fresh_layers_take_nothing_over() -> None:
    model = small("qwen3")
    weights, old = replace_by_fresh(model, [1]).state_dict(), model.state_dict()
    assert not torch.equal(
        weights["model.layers.1.gka.q_proj.weight"], old["model.layers.1.self_attn.q_proj.weight"]
    )
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], old["model.layers.1.mlp.up_proj.weight"])


# What is refused


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=2))


def _moe() -> Any:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**{**SIZES, "num_hidden_layers": 1}, num_experts=2, moe_intermediate_size=8,
                       shared_expert_intermediate_size=8)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "layers", "error", "words"),
    [
        (_gpt2, [0], TypeError, "GPT2LMHeadModel of the family gpt2; expected ForCausalLM"),
        (_moe, [0], TypeError, "Qwen2MoeForCausalLM of the family qwen2_moe"),
        (lambda: small("qwen3").model, [0], TypeError, "Qwen3Model of the family qwen3"),
        (lambda: torch.nn.Linear(1, 1), [0], TypeError, "Linear; expected ForCausalLM"),
        (lambda: "models/q", [0], TypeError, "model is 'models/q'; expected a model, from AutoModel"),
        (lambda: small("qwen3"), 1, TypeError, r"layers is 1; expected a sequence of integers such as \[1, 3\]"),
        (lambda: small("qwen3"), [1, 2, 1], ValueError, "layers has 1 more than once"),
        (lambda: small("qwen3"), [4], ValueError, "layers has 4, and there is no such layer; expected 0 to 3"),
        (lambda: small("qwen3"), [-1], ValueError, "layers has -1"),
        (lambda: small("qwen3"), [1.0], TypeError, "layers has 1.0; expected integers"),
        (lambda: small("qwen3"), ["1"], TypeError, "layers has '1'; expected integers"),
        (lambda: convert(small("qwen3"), [2]), [2], ValueError, "layers has 2, which is no attention layer"),
        (lambda: small("qwen3", head_dim=258), [0], ValueError, "head_dim is 258; expected at most 256"),
    ],
)
def test_refuses(make: Any, layers: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        convert(make(), layers)


def test_heads_of_any_size_stay_if_none_is_replaced() -> None:
    model, tokens = small("qwen3", head_dim=258), random_tokens(1, 9)
    assert torch.equal(convert(model, [])(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "name, told",
    [
        ("hidden_size", "hidden_size is a field of GKAConfig that convert does not take; expected one of"),
        ("use_qk_norm", "use_qk_norm is a field of GKAConfig that convert does not take"),
        ("mixr", r"mixr is no setting of the new layers; did you mean mixer\?"),
        ("depth", "depth is no setting of the new layers; expected one of .*ridge_ratio.*use_v_conv"),
    ],
)
def test_refuses_settings_that_are_not_of_the_new_layers(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        convert(small("qwen3"), [0], **{name: 1})


def test_one_model_has_layers_of_one_mixer() -> None:
    hybrid = convert(small("qwen3"), [1], mixer="gla")
    assert convert(hybrid, [2]).config.mixer == "gla"
    with pytest.raises(ValueError, match="mixer is 'gka'; expected 'gla', that of the layers which the model has"):
        convert(hybrid, [2], mixer="gka")


def test_biases_that_are_left_out_are_told(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.enable_propagation()
    logging.set_verbosity_warning()
    try:
        with caplog.at_level("WARNING"):
            convert(small("qwen2"), [1])
    finally:
        logging.disable_propagation()
    assert "layer 1: a GKA layer has no place for k_proj.bias, q_proj.bias, v_proj.bias" in caplog.text


# The size of the cache


@pytest.mark.parametrize("kind", ["qwen3", "mistral, sliding", "qwen2, sliding"])
@torch.no_grad()
def test_cache_bytes_are_those_of_a_real_cache(kind: str) -> None:
    for model in (small(kind), convert(small(kind), [1, 3]), convert(small(kind), [0, 1, 2, 3])):
        cache: Any = model(random_tokens(1, 23), use_cache=True).past_key_values
        held = 0
        for layer in cache.layers:
            for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                held += sum(value.nbytes for value in states.values() if value is not None)
            if getattr(layer, "keys", None) is not None:
                held += layer.keys.nbytes + layer.values.nbytes
        assert cache_bytes(model, 23) == held


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a Qwen3 with the byte tokenizer and a file of code that is nobody's business."""
    model = small("qwen3", vocab_size=259)
    model.save_pretrained(tmp_path / "qwen3")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "qwen3")
    (tmp_path / "qwen3" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "qwen3" / "tokenizer.py").write_text("raise SystemExit")
    return tmp_path / "qwen3"


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.with_name("hybrid")
    assert main(["convert", str(folder), "--layers", "1,3", str(out), "--solver-steps", "8,8", "--seed", "5"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 4 layers replaced" in shown and "0 full_attention, 1 gka, 2 full_attention, 3 gka" in shown
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.manual_seed(5)
    expected = convert(AutoModelForCausalLM.from_pretrained(folder), [1, 3], solver_steps=[8, 8])
    assert model.config.solver_steps == [8, 8]
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [100, 101, 1]
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
        "chat_template.jinja", *(path.name for path in folder.glob("*added_tokens.json")),
    }  # fmt: skip
    done = run_forked("-m", "gka", "generate", str(out), "--prompt", "ab", "--max-new-tokens", "2", "--seed", "0")
    assert done.stdout.startswith("ab")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL is missing"),
        (["{model}", "{out}"], "--layers is missing"),
        (["{model}", "--layers", "1"], "OUT is missing"),
        (["{model}", "--layers", "1,4", "{out}"], "layers has 4, and there is no such layer"),
        (["{model}", "--layers=", "{out}"], "--layers: is empty; give the layers to replace"),
        (["{model}", "--layers", "x", "{out}"], "--layers: expected a list of whole numbers"),
        (["{out}", "--layers", "1", "{out}"], "no such checkpoint folder"),
        (["{model}", "--layers", "1", "{model}"], "is the folder of the model itself"),
        (["{model}", "--layers", "1", "{model}/.."], "contains no model"),
        (["{model}", "--layers", "1", "{model}/config.json"], "is a file"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.with_name("out")
    given = [part.format(model=folder, out=out) for part in arguments]
    before = sorted(path.name for path in folder.parent.iterdir())
    assert main(["convert", *given]) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def test_layers_without_a_solve_and_a_model_without_a_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    assert main(["convert", str(folder), "--layers", "1", "--mixer", "gla", str(folder.with_name("out"))]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer  none in" in shown and "gka distill" not in shown and "1 gla" in shown
    assert gka.GKAForCausalLM.from_pretrained(folder.with_name("out")).config.mixer == "gla"


def test_a_family_that_is_not_supported_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _gpt2().save_pretrained(tmp_path / "gpt2")
    assert main(["convert", str(tmp_path / "gpt2"), "--layers", "0", str(tmp_path / "out")]) == 2
    assert "type 'gpt2'; this command needs type one of llama, mistral, qwen2, qwen3" in capsys.readouterr().err


def test_overwriting_is_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(folder), str(folder.with_name("out")), "--layers"]
    assert main([*arguments, "1"]) == 0
    assert main([*arguments, "2"]) == 2
    assert "already contains a model; replace it with --overwrite" in capsys.readouterr().err
    assert main([*arguments, "2", "--overwrite"]) == 0
    model = gka.GKAForCausalLM.from_pretrained(folder.with_name("out"))
    assert model.config.layer_types == [FULL, FULL, GKA, FULL]


# Other heads, and adapters


@pytest.mark.parametrize("kind", ["llama", "qwen3 with biases"])
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
@torch.no_grad()
def test_classifiers(kind: str, task: str, tmp_path: Path) -> None:
    causal, config_class, fields = MODELS[kind]
    theirs = getattr(transformers, causal.__name__.replace("CausalLM", task))
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **fields}, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model, tokens = theirs(config).eval(), random_tokens(2, 17)
    same = convert(model, [])
    assert type(same) is getattr(gka, f"GKAFor{task}") and same.config.id2label == config.id2label
    assert torch.equal(same(tokens).logits, model(tokens).logits)
    new = convert(model, [1])
    assert torch.equal(new.score.weight, model.score.weight)
    new.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModelFor{task}").from_pretrained(tmp_path)
    assert type(loaded) is type(new) and torch.equal(loaded(tokens).logits, new(tokens).logits)
    again = convert(new, [2])
    assert torch.equal(again.model.layers[1].gka.q_proj.weight, new.model.layers[1].gka.q_proj.weight)


def test_adapters_are_to_be_merged_first() -> None:
    peft = pytest.importorskip("peft")
    base = small("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for one in (model, base):
        with pytest.raises(TypeError, match=r"with PEFT adapters; call merge_and_unload\(\)"):
            convert(one, [1])
    assert type(convert(model.merge_and_unload(), [1])) is GKAForCausalLM
