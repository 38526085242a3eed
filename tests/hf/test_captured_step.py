"""Decoding by a recorded step gives the tokens of decoding without, and follows every change of model and call.

On a GPU the step is a CUDA graph. On the CPU a recording of operators stands in for it (`recording.py`).
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import recording
import torch
from model_helpers import KINDS, PAD, assert_near, cache_tensors, new_cache, random_tokens, tiny_model
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from gka.hf import captured_step
from gka.hf.cache_name import CACHE
from gka.ops import checks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Watch:
    """A device, and how often a step was recorded and replayed there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.recorded = self.replayed = 0

    def model(self, kind: str = "gka", **changes: Any) -> Any:
        return tiny_model(kind, torch.float32, solver_steps=None if kind == "gla" else [3], **changes).to(
            self.device
        )

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        return random_tokens(*shape, seed=seed).to(self.device)

    def both(self, model: Any, tokens: Tensor, n: int = 9, **options: Any) -> tuple[Tensor, Tensor]:
        """The tokens of `generate`, with a recorded step and without."""
        options = {"do_sample": False, "pad_token_id": PAD, **options}
        found = []
        for without in (False, True):
            torch.manual_seed(3)
            found.append(model.generate(tokens, max_new_tokens=n, disable_compile=without, **options))
        return found[0], found[1]

    def check(self, model: Any, tokens: Tensor, n: int = 6, recorded: int | None = None, **options: Any) -> None:
        """The same tokens, and all but the first steps replayed; `recorded`: so many recordings."""
        self.recorded = self.replayed = 0
        out, ref = self.both(model, tokens, n, **options)
        assert torch.equal(out, ref)
        assert self.replayed >= n - 2 - self.recorded
        assert recorded is None or self.recorded == recorded


@pytest.fixture(params=DEVICES)
def watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    found = Watch(request.param)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    record = recording.record if request.param == "cpu" else captured_step.record

    def counted(*args: Any) -> Any:
        replay, result = record(*args)
        found.recorded += 1

        def counted_replay() -> None:
            found.replayed += 1
            replay()

        return counted_replay, result

    monkeypatch.setattr(captured_step, "record", counted)
    monkeypatch.setattr(captured_step, "DEVICE", request.param)
    monkeypatch.setattr(captured_step, "SMALLEST", 8)
    monkeypatch.setattr(captured_step, "_told", set())
    monkeypatch.setattr(checks, "NEVER_WAITING", ())  # nor on the CPU is anything read
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gated_kalmanet decodes")
        yield found


def padded(watch: Watch, B: int, P: int) -> Tensor:
    mask = torch.ones(B, P, dtype=torch.long, device=watch.device)
    mask[0, : P // 2] = 0
    return mask


@pytest.mark.parametrize("kind", list(KINDS))
def test_same_tokens(kind: str, watch: Watch) -> None:
    """One row and several, also behind padding, and beyond the first slots of softmax attention."""
    model = watch.model(kind)
    watch.check(model, watch.tokens(1, 5))
    watch.check(model, watch.tokens(3, 5), n=11, attention_mask=padded(watch, 3, 5))
    watch.check(model, watch.tokens(3, 5), n=4, recorded=0)


@pytest.mark.parametrize("kind", ["gka", "hybrid, all three"])
def test_other_lengths_and_batch_sizes(kind: str, watch: Watch) -> None:
    model = watch.model(kind)
    watch.check(model, watch.tokens(2, 5))
    for B, P, n in ((2, 3, 5), (3, 7, 4), (2, 11, 7), (1, 2, 3)):
        watch.check(model, watch.tokens(B, P, seed=P), n)
    with torch.inference_mode():  # its tensors can be written nowhere else
        watch.check(model, watch.tokens(1, 4))
    watch.check(model, watch.tokens(1, 6), recorded=0 if kind == "gka" else None)


def test_slots_follow_the_tokens(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of many slots serves a few tokens more, until it has far too many; states have no slots."""
    monkeypatch.setattr(captured_step, "FEW", 16)
    hybrid, pure = watch.model("hybrid"), watch.model()
    watch.check(pure, watch.tokens(1, 3), 4, recorded=1)
    watch.check(pure, watch.tokens(1, 70), 4, recorded=0)
    watch.check(hybrid, watch.tokens(1, 70), 4, recorded=1)
    watch.check(hybrid, watch.tokens(1, 30), 4, recorded=0)
    watch.check(hybrid, watch.tokens(1, 3), 4, recorded=1)
    assert captured_step._KEPT[hybrid].capacity == 8


@pytest.mark.parametrize("kind", ["gka", "hybrid, sliding"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.9, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"eos_token_id": list(range(1, 9)), "min_new_tokens": 5},
        {"prefill_chunk_size": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(kind: str, options: dict[str, Any], watch: Watch) -> None:
    model, tokens = watch.model(kind), watch.tokens(2, 6)
    out, ref = watch.both(model, tokens, 9, attention_mask=padded(watch, 2, 6), **options)
    assert torch.equal(out, ref) and watch.replayed > 1


def test_adds_its_mask(watch: Watch) -> None:
    model = watch.model("hybrid", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    watch.check(model, watch.tokens(2, 6), attention_mask=padded(watch, 2, 6))


@pytest.mark.parametrize("kind", ["gka", "hybrid, all three"])
@torch.no_grad()
def test_a_cache_that_lives_on(kind: str, watch: Watch) -> None:
    """It is that of decoding without a graph, and a later call of `generate` does not write to it."""
    model, tokens = watch.model(kind), watch.tokens(2, 6)
    options: dict[str, Any] = dict(max_new_tokens=7, do_sample=False, pad_token_id=PAD)
    found = []
    for without in (False, True):
        given = new_cache(model.config)
        text = model.generate(tokens, **{CACHE: given}, disable_compile=without, **options)
        returned = model.generate(tokens, return_dict_in_generate=True, disable_compile=without, **options)[CACHE]
        model.generate(watch.tokens(2, 8, seed=5), disable_compile=without, **options)
        more = model.generate(text, **{CACHE: given}, disable_compile=without, **options)
        found.append((cache_tensors(given), cache_tensors(returned), more))
    for held, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert held.keys() == expected.keys()
        for name in expected:
            assert_near(held[name], expected[name], 1e-5, name)
    assert torch.equal(found[0][2], found[1][2]) and watch.replayed > 10


@torch.no_grad()
def test_a_changed_model(watch: Watch) -> None:
    """Weights written in place are read by the next replay; others, and other steps of the solve, are recorded."""
    model, tokens = watch.model("hybrid, sliding"), watch.tokens(2, 5)
    watch.check(model, tokens, recorded=1)
    before = model.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=PAD)
    layer = model.model.layers[0]
    layer.gka.q_proj.weight.neg_()
    layer.mlp.down_proj.weight.mul_(3.0)
    watch.check(model, tokens, recorded=0)
    changed = model.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=PAD)
    assert not torch.equal(changed, before)
    layer.mlp.down_proj.weight = torch.nn.Parameter(-layer.mlp.down_proj.weight)
    watch.check(model, tokens, recorded=1)
    model.set_solver_steps([5])
    watch.check(model, tokens, recorded=1)
    pure = watch.model()
    watch.check(pure, tokens, recorded=1)
    watch.check(pure.to(torch.bfloat16), tokens, recorded=1)  # of a hybrid, 16 bits could round to other tokens
    watch.check(pure, tokens, recorded=0)


def test_adapters(watch: Watch) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = watch.model("hybrid, sliding"), watch.tokens(2, 5)
    watch.check(model, tokens, recorded=1)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
    adapted = peft.get_peft_model(model, config).eval()
    watch.check(adapted, tokens)
    assert watch.recorded > 0
    with adapted.disable_adapter():
        watch.check(adapted, tokens)
        assert watch.recorded > 0
    watch.check(adapted, tokens)
    watch.check(adapted.merge_and_unload(), tokens)
    assert watch.recorded > 0


def test_what_is_kept_for_a_model(watch: Watch) -> None:
    """One graph, until the model trains, moves or is gone; copies have none."""
    model, tokens = watch.model(), watch.tokens(1, 5)
    kept = captured_step._KEPT
    watch.check(model, tokens)
    watch.check(copy.deepcopy(model), tokens)
    assert model in kept
    model.train()
    assert model not in kept
    watch.check(model.eval(), tokens, recorded=1)
    model.to(torch.float16)
    assert model not in kept
    watch.check(model, tokens, recorded=1)
    gc.collect()
    count = len(kept)
    del model
    gc.collect()
    assert len(kept) == count - 1


@pytest.mark.parametrize("kind", ["gka", "hybrid", "hybrid, sliding"])
def test_several_continuations_of_one_prompt(kind: str, watch: Watch) -> None:
    """Copies of a prompt's cache move in one after the other, and one with repeated rows; the prompt's stays."""
    model, prompt = watch.model(kind), watch.tokens(1, 7)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    before = {name: x.clone() for name, x in cache_tensors(cache).items()}
    endings = watch.tokens(3, 2, seed=4)
    rows = torch.cat([prompt.expand(3, -1), endings], dim=1)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    for some, copies in ((rows[:1], 1), (rows[1:2], 1), (rows, 3)):
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(copies)
        watch.replayed = 0
        out = model.generate(some, past_key_values=copied, **options)
        assert watch.replayed >= 3
        assert torch.equal(out, model.generate(some, disable_compile=True, **options))
    assert all(torch.equal(x, before[name]) for name, x in cache_tensors(cache).items())


class Failing(BaseStreamer):
    """Fails at the fifth token."""

    def __init__(self, error: Exception) -> None:
        self.error, self.left = error, 5

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise self.error

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), ValueError("the client is gone")], ids=repr
)
def test_a_call_that_fails(error: Exception, watch: Watch) -> None:
    """The next is right, and a call without memory leaves nothing behind."""
    model, tokens = watch.model("hybrid, sliding"), watch.tokens(2, 5)
    with pytest.raises(type(error)):
        model.generate(tokens[:1], max_new_tokens=9, pad_token_id=PAD, streamer=Failing(error))
    assert (model in captured_step._KEPT) == isinstance(error, ValueError)
    watch.check(model, tokens[:1], recorded=0 if isinstance(error, ValueError) else 1)
    watch.check(model, tokens)


class Nested(BaseStreamer):
    """Generates with the same model while it generates."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens, self.found = model, tokens, []

    def put(self, value: Tensor) -> None:
        self.found.append(self.model.generate(self.tokens, max_new_tokens=4, do_sample=False, pad_token_id=PAD))

    def end(self) -> None:
        pass


def test_two_calls_at_once(watch: Watch) -> None:
    model, tokens, others = watch.model("hybrid"), watch.tokens(1, 5), watch.tokens(1, 4, seed=7)
    (_, ref), (_, other) = watch.both(model, tokens), watch.both(model, others, 4)
    streamer = Nested(model, others)
    with pytest.warns(UserWarning, match="at the same time"):
        out = model.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=PAD, streamer=streamer)
    assert torch.equal(out, ref) and len(streamer.found) == 10
    assert all(torch.equal(text, other) for text in streamer.found)


@pytest.mark.parametrize(
    "reason, options",
    [
        ("training mode", {}),
        ("autocast is on", {}),
        ("GKA_CHECK_VALUES is 1", {}),
        ("attn_implementation is 'flex_attention'", {}),
        ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("cannot be recorded", {}),
        ("runs by torch.compile", {}),
        ("hooks are registered", {}),
    ],
)
def test_says_once_why_there_is_no_graph(
    reason: str, options: dict[str, Any], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = watch.model("hybrid"), watch.tokens(2, 5)
    if reason == "cannot be recorded":
        block = model.model.layers[0]
        own = block.forward
        block.forward = lambda x, *args, **others: own(x, *args, **others) if x.sum().item() else x
    if reason == "training mode":
        model.train()
    if "hooks" in reason:
        calls: list[str] = []
        model.model.layers[1].register_forward_hook(lambda module, args, out: calls.append("called"))
    if "torch.compile" in reason:
        torch._dynamo.reset()
        model.model.norm.forward = torch.compile(model.model.norm.forward, backend="eager")
    if "CHECK_VALUES" in reason:
        monkeypatch.setenv("GKA_CHECK_VALUES", "1")
    if "flex" in reason:
        monkeypatch.setattr(captured_step, "_ATTENTION", ("flex_attention",))
        reason = "attn_implementation is 'sdpa'"
    with torch.autocast(watch.device.type, torch.bfloat16, enabled="autocast" in reason):
        with pytest.warns(UserWarning, match=reason):
            outs = watch.both(model, tokens, **options)
        again = watch.both(model, tokens, **options)  # a second warning would be an error
    for out, ref in (outs, again):
        texts = [x if isinstance(x, Tensor) else x.sequences for x in (out, ref)]
        assert torch.equal(*texts)
    assert watch.replayed == 0
    if reason == "cannot be recorded":
        watch.both(model, tokens, do_sample=True)  # draws random numbers
    if "hooks" in reason:
        assert len(calls) == 4 * 9  # with and without the switch, twice, for every token


def test_capacity_grows_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_step, "SMALLEST", 256)
    found = [captured_step.capacity_for(n) for n in (1, 256, 257, 1024, 1025, 2049, 100_000)]
    assert found == [256, 256, 512, 1024, 1280, 2560, 114_688]
    assert all(n <= captured_step.capacity_for(n) <= max(256 + n, 1.25 * n + 1) for n in range(1, 5000, 7))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gka", "hybrid, all three"])
def test_memory_stays(kind: str, device: torch.device) -> None:
    model = tiny_model(kind, torch.bfloat16).to(device)
    held = []
    for repeat in range(6):
        model.generate(random_tokens(2 + repeat % 2, 5).to(device), max_new_tokens=40, do_sample=False)
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert [x for x, _ in held[2:4]] == [x for x, _ in held[4:]]
    assert max(x for _, x in held[4:]) <= max(x for _, x in held[:4])
