"""The loss in chunks: the numbers of the plain loss, and never the logits of all tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close
from model_helpers import assert_near, parameter_gradients, random_tokens, tiny_model
from reads import Reads
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from gka import GKAForCausalLM
from gka.hf.loss import chunked_loss

CHUNK, VOCABULARY = 8, 61
SHALLOW = dict(layer_types=["linear_attention"], solver_steps=[4])  # the loss counts here, not what is below


def chunked(model: GKAForCausalLM, chunk: int = CHUNK) -> GKAForCausalLM:
    """A copy of the model with its loss in chunks."""
    other = copy.deepcopy(model)
    other.set_loss_chunk(chunk)
    return other


def labelled(B: int = 2, T: int = 19) -> tuple[Tensor, Tensor]:
    """Tokens, and their labels with some of them left out."""
    tokens = random_tokens(B, T)
    labels = tokens.clone()
    labels[:, 3:7] = -100
    return tokens, labels


def outcome(model: Any, tokens: Tensor, labels: Tensor, **told: Any) -> dict[str, Tensor]:
    """Loss and gradients of all parameters."""
    out = model(tokens, labels=labels, use_cache=False, **told)
    out.loss.backward()
    return {"loss": out.loss.detach(), **parameter_gradients(getattr(model, "_orig_mod", model))}


class Rows(TorchDispatchMode):
    """The most rows of a tensor that has the vocabulary as its last dim, the weights of the head left out."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == VOCABULARY:
                if tensor.shape != (36, VOCABULARY):
                    self.most = max(self.most, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("told", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_float64_logits(tied: bool, told: dict[str, Any]) -> None:
    """The plain loss rounds logits to float32, so the reference is written out; 7 tokens fill no chunk."""
    plain = tiny_model("hybrid", tie_word_embeddings=tied)
    tokens, labels = labelled()
    logits = plain(tokens).logits.flatten(0, 1)
    targets = pad(labels[:, 1:], (0, 1), value=-100).flatten()
    total = cross_entropy(logits, targets, reduction="sum")
    loss = total / (5 if told else (targets != -100).sum())
    loss.backward()
    reference = {"loss": loss.detach(), **parameter_gradients(plain)}
    for chunk in (1, CHUNK, 100):
        model = chunked(plain, chunk)
        model.zero_grad()
        assert_close(outcome(model, tokens, labels, **told), reference, 1e-13)


def test_shifted_labels_and_another_ignored_label() -> None:
    plain, (tokens, labels) = tiny_model(**SHALLOW), labelled()
    told = {"shift_labels": pad(labels[:, 1:], (0, 1), value=-100).where(labels != 7, -100)}
    assert_close(outcome(chunked(plain), tokens, labels, **told), outcome(plain, tokens, labels, **told), 1e-6)
    labels, told, plain = tokens, {"ignore_index": int(tokens[0, 4])}, tiny_model(**SHALLOW)
    assert_close(outcome(chunked(plain), tokens, labels, **told), outcome(plain, tokens, labels, **told), 1e-6)


def test_packed_sequences() -> None:
    plain, (tokens, labels) = tiny_model("hybrid"), labelled(1, 19)
    labels[0, 8] = -100  # the first token of the second sequence
    told = {"cu_seq_lens_q": torch.tensor([0, 8, 19])}
    assert_close(outcome(chunked(plain, 5), tokens, labels, **told), outcome(plain, tokens, labels, **told), 1e-6)


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_no_less_exact_than_the_plain_loss(kind: str) -> None:
    """Errors of loss and gradients of the head alone, compared with float64; bfloat16 weights sum in bfloat16."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    hidden, labels = torch.randn(3, 43, 32, dtype=dtype), torch.randint(0, 300, (3, 43))
    head = torch.nn.Linear(32, 300, bias=False, dtype=dtype)
    targets = pad(labels[:, 1:], (0, 1), value=-100)

    def found(dtype: torch.dtype, in_chunks: bool) -> list[Tensor]:
        own, h = copy.deepcopy(head).to(dtype), hidden.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast" and dtype != torch.float64):
            if in_chunks:
                loss = chunked_loss(own, h, labels, 16)
            else:
                logits = own(h)
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, [h, own.weight])]

    reference, plain, ours = found(torch.float64, False), found(dtype, False), found(dtype, True)
    for what, ref, base, out in zip(("loss", "dh", "dW"), reference, plain, ours, strict=True):
        assert out.dtype == base.dtype
        allowed = torch.linalg.vector_norm(base.double() - ref) / torch.linalg.vector_norm(ref)
        assert_near(out, ref, (2.5 if kind == "bfloat16" else 1.1) * float(allowed) + 1e-7, what)


def test_logits_of_all_tokens_never_exist() -> None:
    plain, (tokens, labels) = tiny_model(**SHALLOW), labelled(2, 20)
    for model, most in ((plain, 40), (chunked(plain), CHUNK)):
        with Rows() as rows:
            outcome(model, tokens, labels)
        assert rows.most == most
        with Rows() as rows, torch.no_grad():
            assert (model(tokens, labels=labels).logits is None) == (model is not plain)
        assert rows.most == most
    assert chunked(plain)(tokens).logits.shape == (2, 20, VOCABULARY)


def test_nothing_waits_for_the_device() -> None:
    model, labels = tiny_model(**SHALLOW), labelled()[1]
    hidden = torch.randn(2, 19, 36, dtype=torch.float64, requires_grad=True)
    with Reads() as reads:
        chunked_loss(model.lm_head, hidden, labels, CHUNK, num_items_in_batch=torch.tensor(3)).backward()
        chunked_loss(model.lm_head, hidden, labels, CHUNK).backward()
    assert not reads.seen


def test_a_model_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, (tokens, labels) = chunked(tiny_model(layer_types=["full_attention"])), labelled()
    expected = outcome(model, tokens, labels)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(outcome(compiled, tokens, labels), expected, 1e-12)


def test_compiled_under_autocast_with_any_length() -> None:
    torch._dynamo.reset()
    head = torch.nn.Linear(12, 30, bias=False)
    compiled = torch.compile(chunked_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, labels = torch.randn(2, 9, 12, requires_grad=True), torch.randint(0, 30, (2, 9))
    found = []
    for function in (chunked_loss, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(head, hidden, labels, 8)
        found.append([loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])])
    for out, ref in zip(found[1], found[0], strict=True):
        assert_near(out, ref, 1e-6)


def test_transforms_and_gradients_of_gradients() -> None:
    head = torch.nn.Linear(6, 11, bias=False, dtype=torch.float64)
    hidden, labels = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True), torch.randint(0, 11, (2, 9))

    def plain(h: Tensor) -> Tensor:
        return cross_entropy(head(h)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def ours(h: Tensor) -> Tensor:
        return chunked_loss(head, h, labels, 4)

    assert_near(torch.func.grad(ours)(hidden), torch.func.grad(plain)(hidden), 1e-13)
    second = []
    for function in (ours, plain):
        first = torch.autograd.grad(function(hidden), hidden, create_graph=True)[0]
        second.append(torch.autograd.grad(first.square().sum(), [hidden, head.weight]))
    for out, ref in zip(*second, strict=True):
        assert_near(out, ref, 1e-12)


def test_gradient_checkpointing_of_the_blocks() -> None:
    plain, (tokens, labels) = tiny_model(**SHALLOW).train(), labelled()
    model = chunked(plain)
    model.gradient_checkpointing_enable()
    assert_close(outcome(model, tokens, labels), outcome(plain, tokens, labels), 1e-6)


def test_a_head_that_drops_numbers_draws_them_again() -> None:
    """As LoRA with dropout on the head."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(6, 11, bias=False)).double()
    hidden, labels = torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True), torch.randint(0, 11, (1, 8))
    found = []
    for kept in (False, True):
        torch.manual_seed(1)
        if kept:
            loss = cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = chunked_loss(head, hidden, labels, 8)
        found.append(torch.autograd.grad(loss, hidden)[0])
    assert_near(found[0], found[1], 1e-13)


def test_what_is_refused() -> None:
    model, (tokens, labels) = tiny_model(**SHALLOW), labelled()
    for tokens_per_chunk in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"tokens is .*; expected a positive integer or None"):
            model.set_loss_chunk(tokens_per_chunk)  # type: ignore[arg-type]
    model.set_loss_chunk(4)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 19\); expected \(2, 3\)"):
        model(tokens, labels=labels, logits_to_keep=3)
    model.loss_function = cross_entropy
    with pytest.raises(ValueError, match=r"loss_function is .*cross_entropy.*set_loss_chunk\(None\)"):
        model(tokens, labels=labels)
    model.set_loss_chunk(None)
    assert model(tokens).logits is not None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_accumulates_the_same(tmp_path: Any, smoothing: float) -> None:
    """Losses of steps of two batches, and of a validation, in transformers' Trainer, which smooths all logits."""
    plain, (tokens, labels) = tiny_model(dtype=torch.float32, **SHALLOW), labelled(4, 13)
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    logs = []
    for model in (copy.deepcopy(plain), chunked(plain)):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        logs.append([*(log["loss"] for log in trainer.state.log_history[:2]), trainer.evaluate()["eval_loss"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and logs[0][0] != logs[0][1]
