"""Layers and models whose tokens the ranks of a group share, beside one process: errors of one case.

Errors are ||out - ref|| / ||ref|| of outputs, losses and all gradients, in float64. Rank 0 compares; the others
return nothing.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers import relative_error
from model_helpers import random_inputs, random_tokens, tiny_layer, tiny_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gka.distributed import ContextParallel, Part, halo, parallelize

Errors = dict[str, float]
PACK = (0, 5, 5, 6, 17, 18, 24)  # of 24 tokens; a sequence without tokens, and one that spans ranks

LAYERS: dict[str, dict[str, Any]] = {
    "plain": dict(n=4, T=23),
    "zigzag": dict(n=3, T=24, layout="zigzag"),
    "packed": dict(n=4, T=24, packed=True),
    "zigzag, packed": dict(n=3, T=24, layout="zigzag", packed=True),
    "no v convolution": dict(n=2, T=13, changes=dict(use_v_conv=False)),
    "heads expanded": dict(n=4, T=13, changes=dict(kv_proj_rank=3, kv_learnable_residual=True)),
    "no forget gate": dict(n=2, T=13, changes=dict(use_forget_gate=False)),
    "no gates": dict(
        n=2, T=13, changes=dict(use_beta_gate=False, use_alpha_connection=False, use_output_gate=False)
    ),
    "no solve": dict(n=2, T=13, changes=dict(mixer="gla")),
    "width 1": dict(n=2, T=13, changes=dict(conv_size=1)),
    "width 7, ranks of one token or two": dict(n=4, T=6, changes=dict(conv_size=7)),
    "width 7, zigzag, pieces of two": dict(n=4, T=16, layout="zigzag", changes=dict(conv_size=7)),
    "ranks without tokens": dict(n=4, T=2),
    "padding": dict(n=4, T=23, mask=True),
    "padding, zigzag": dict(n=3, T=24, layout="zigzag", mask=True),
    "padding, width 7, short ranks": dict(n=4, T=9, mask=True, changes=dict(conv_size=7)),
}
MODELS: dict[str, dict[str, Any]] = {
    "gka": dict(kind="gka", n=4, T=23),
    "gka, zigzag": dict(kind="gka", n=4, T=24, layout="zigzag"),
    "gka, positions of packed rows": dict(kind="gka", n=4, T=24, told="position_ids", B=2),
    "gka, padding": dict(kind="gka without v convolution", n=4, T=23, told="attention_mask", B=3),
    "gka, embeddings": dict(kind="gka, heads expanded", n=2, T=13, embeds=True),
    "gka, ranks without tokens": dict(kind="gka", n=4, T=3),
    "gka, checkpointing": dict(kind="gka", n=4, T=24, told="cu_seq_lens_q", checkpointing=True),
    "hybrid": dict(kind="hybrid", n=4, T=23),
    "hybrid, zigzag": dict(kind="hybrid", n=4, T=24, layout="zigzag"),
    "hybrid, packed": dict(kind="hybrid", n=4, T=24, told="cu_seq_lens_q"),
    "hybrid, zigzag, packed rows": dict(kind="hybrid", n=4, T=24, layout="zigzag", told="seq_idx", B=2),
    "hybrid, mask of packed rows": dict(kind="hybrid", n=4, T=24, told="numbers", B=2),
    "hybrid, ranks of one token": dict(kind="hybrid", n=4, T=4),
    "hybrid, checkpointing": dict(kind="hybrid", n=2, T=24, told="cu_seq_lens_q", checkpointing=True),
    "all three": dict(kind="hybrid, all three", n=4, T=23),
    "all three, zigzag, padding": dict(
        kind="hybrid, all three", n=4, T=24, layout="zigzag", told="attention_mask", B=3
    ),
    "all three, packed": dict(kind="hybrid, all three", n=4, T=24, told="cu_seq_lens_q"),
    "number of items given, tuples": dict(
        kind="gka", n=2, T=13, options=dict(num_items_in_batch=7, return_dict=False)
    ),
    "shifted labels, another ignored": dict(kind="gka", n=2, T=13, shifted=True, options=dict(ignore_index=5)),
    "plain loss": dict(kind="gka", n=4, T=23, B=2, chunk=None),
}
# What the exchange of the convolutions brings, in the forward and in the backward pass.
BROKEN = {"no halo": "gathered_pieces", "halo without gradients": "scattered_sum"}


def some_mask(B: int, T: int) -> Tensor:
    """[B, T]: padding at the end of a row, at its start, and within."""
    mask = (torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.4).long()
    mask[0] = (torch.arange(T) < 0.7 * T).long()
    mask[1] = (torch.arange(T) >= 0.3 * T).long()
    return mask


def summed(tensors: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """The sum over the ranks of each tensor."""
    for tensor in tensors.values():
        dist.all_reduce(tensor, group=group)
    return tensors


def gradients(module: Any, x: Tensor | None = None) -> dict[str, Tensor]:
    """Copies of all gradients."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found if x is None else {**found, "input": x.grad.clone()}


def layer_errors(group: Any, settings: dict[str, Any]) -> Errors:
    """The errors of one of LAYERS."""
    return _layer(group, **{name: value for name, value in settings.items() if name != "n"})


def model_errors(group: Any, settings: dict[str, Any]) -> Errors:
    """The errors of one of MODELS."""
    return _model(group, **{name: value for name, value in settings.items() if name != "n"})


def broken_errors(group: Any, name: str) -> Errors:
    """The errors of a layer with one of the wrong borders of BROKEN."""
    right = getattr(halo, BROKEN[name])
    with mock.patch.object(halo, BROKEN[name], lambda x, group: right(x, group) * 0):
        return _layer(group, T=23)


def _layer(
    group: Any, T: int, layout: Any = "contiguous", packed: bool = False, mask: bool = False, changes: Any = None
) -> Errors:
    """A layer's output and gradients, of a loss through the output."""
    layer = tiny_layer(**(changes or {}))
    B = 1 if packed else 3
    x, cotangent = random_inputs(B, T, 36, seed=1).requires_grad_(), random_inputs(B, T, 36, seed=2)
    given = some_mask(B, T) if mask else None
    cu_seqlens = torch.tensor(PACK) if packed else None
    expected: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        whole = layer(x, given, cu_seqlens=cu_seqlens)
        (whole * cotangent).sum().backward()
        expected = {"out": whole.detach(), **gradients(layer, x)}
        layer.zero_grad()
        x.grad = None
    shard = ContextParallel(group, layout).shard(T, cu_seqlens)
    layer.context_parallel = Part(shard)
    out = layer(shard.take(x), None if given is None else shard.take(given))
    (out * shard.take(cotangent)).sum().backward()
    found = {"out": shard.gather(out).detach(), **summed(gradients(layer, x), group)}
    return {name: relative_error(found[name], expected[name]) for name in expected}


def batch_of(B: int, T: int, told: str | None, shifted: bool, ignored: int = -100) -> dict[str, Any]:
    """A whole batch with some labels ignored, and packed sequences or padding told in one of the ways."""
    labels = random_tokens(B, T, seed=3)
    labels[:, ::5] = ignored
    batch: dict[str, Any] = {"input_ids": random_tokens(B, T, seed=4), "labels": labels}
    if shifted:
        batch["shift_labels"] = random_tokens(B, T, seed=5)
        batch["shift_labels"][:, ::4] = ignored
    starts = torch.zeros(B, T, dtype=torch.long)
    starts[:, [edge for edge in PACK[1:-1] if edge < T]] = 1
    starts[1:] = starts[1:].roll(3, 1)
    number = starts.cumsum(1)
    if told == "cu_seq_lens_q":
        batch[told] = torch.tensor(PACK)
    elif told == "seq_idx":
        batch[told] = number
    elif told == "position_ids":
        token = torch.arange(T).expand(B, T)
        batch[told] = token - torch.where(starts == 1, token, 0).cummax(1).values
    elif told == "numbers":
        batch["attention_mask"] = number + 1
    elif told == "attention_mask":
        batch[told] = some_mask(B, T)
    return batch


def _model(
    group: Any,
    kind: str,
    T: int,
    B: int = 1,
    layout: Any = "contiguous",
    told: str | None = None,
    embeds: bool = False,
    shifted: bool = False,
    checkpointing: bool = False,
    chunk: int | None = 5,
    options: Any = None,
) -> Errors:
    """A model's logits and loss, and the mean over the ranks of the gradients of the loss.

    The norms of its blocks are float32. A power of two as number of ranks leaves their rounding as it is.
    With checkpointing there are two calls before the backward pass: it must not take one batch for the other.
    """
    model = tiny_model(kind)
    model.set_loss_chunk(chunk)  # the loss in chunks is float64, the plain loss float32
    made = (B, T, told, shifted, (options or {}).get("ignore_index", -100))
    batch = batch_of(*made)
    x = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_() if embeds else None
    if embeds:
        del batch["input_ids"]
        batch["inputs_embeds"] = x
    other = {**batch_of(1, 16, None, False), "cu_seq_lens_q": torch.tensor([0, 3, 16])}

    def results() -> dict[str, Tensor]:
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**batch, **(options or {}))[0]
        losses = loss + 2 * model(**other)[0] if checkpointing else loss
        losses.backward()
        found = {"loss": losses.detach().clone(), **gradients(model, x)}
        model.eval().zero_grad()
        if x is not None:
            x.grad = None
        batch.pop("labels")
        found["logits"] = model(**batch).logits.detach()
        return found

    expected = results() if dist.get_rank() == 0 else {}
    batch["labels"] = batch_of(*made)["labels"]
    context = parallelize(model, ContextParallel(group, layout))
    found = results()
    joined = B * T if told not in (None, "attention_mask") else T
    outputs = {
        "logits": context.shard(joined).gather(found.pop("logits")).flatten(0, 1),
        "loss": found.pop("loss"),
    }
    found = {
        name: gradient / dist.get_world_size(group) for name, gradient in summed(found, group).items()
    } | outputs
    if "logits" in expected:
        expected["logits"] = expected["logits"].flatten(0, 1)
    return {name: relative_error(found[name], expected[name]) for name in expected}


def fsdp_errors(group: Any, dtype: torch.dtype | None) -> Errors:
    """Loss and gradients of a hybrid that FSDP2 shards over the ranks that share its tokens.

    With a dtype for the blocks, compared with ranks that all compute the whole batch in that dtype.
    """
    batch, mesh = batch_of(2, 23, None, False), DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))

    def outcome(shared: bool, sharded: bool) -> dict[str, Tensor]:
        model = tiny_model("hybrid")
        if shared:
            parallelize(model, mesh)
        for module in [*model.model.layers, model] if sharded else []:
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        loss = model(**batch).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
        return {"loss": loss.detach(), **whole}  # type: ignore[dict-item]

    expected, found = outcome(False, dtype is not None), outcome(True, True)
    return {name: relative_error(found[name], expected[name]) for name in expected}


def lora_errors(group: Any) -> Errors:
    """The loss of a model with adapters, and their gradients."""
    from peft import LoraConfig, get_peft_model

    model, batch = tiny_model("gka"), batch_of(2, 23, None, False)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    loss = adapted(**batch).loss
    loss.backward()
    expected = {"loss": loss.detach(), **gradients(adapted)}
    parallelize(model, ContextParallel(group))
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    out = adapted(**batch)
    assert out.logits.shape[1] < 23, "a part of the tokens"
    out.loss.backward()
    found = {"loss": out.loss.detach(), **summed(gradients(adapted), group)}
    n = dist.get_world_size(group)
    return {name: relative_error(x if name == "loss" else x / n, expected[name]) for name, x in found.items()}


def hidden_state_errors(group: Any) -> Errors:
    """The hidden states of the blocks alone, without a loss; some are recorded on the way."""
    model, tokens = tiny_model("hybrid").model, random_tokens(2, 23)
    expected = model(tokens, output_hidden_states=True)
    context = parallelize(model, ContextParallel(group))
    found = model(tokens, output_hidden_states=True)
    pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
    return {str(n): relative_error(context.shard(23).gather(mine), one) for n, (mine, one) in enumerate(pairs)}
