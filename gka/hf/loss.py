"""The next-token loss in chunks of tokens: the logits of the whole batch never exist.

    loss = 1/n sum_t cross_entropy(head(h_t), y_t),    n = tokens with a label, or num_items_in_batch

The plain loss holds several float32 copies of all logits, N vocab_size numbers each. Here the logits of a chunk
are freed once they are summed, and computed again in the backward pass. This costs one product with the head more.
torch.compile makes a graph for each number of chunks.

Legend: B batch, T time, N = B T tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from ..ops.autocast import autocast_dtype
from ..ops.transforms import transforms_active


def chunked_loss(
    head: nn.Module,
    hidden_states: Tensor,
    labels: Tensor,
    chunk: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The loss of transformers' causal language models, without the logits of all tokens at once.

    Under a transform of torch.func nothing is computed again, so the backward pass keeps all logits.

    Args:
        head: [N, hidden_size] -> [N, vocab_size], the output projection.
        hidden_states: [B, T, hidden_size], the input of the head.
        labels: [B, T] int64, the input tokens; they are shifted here.
        chunk: tokens whose logits exist at the same time.
        num_items_in_batch: the sum of the losses is divided by it; None divides by the number of labels.
        shift_labels: [B, T] int64, the next tokens; they replace `labels`.
        ignore_index: the label of a token without a loss.

    Returns:
        A scalar, float32; float64 for float64 logits. NaN if no token has a label, as the plain loss.

    Raises:
        ValueError: the labels have another shape than the tokens.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    tokens = hidden_states.shape[:-1]
    if shift_labels.shape.numel() != tokens.numel():
        raise ValueError(f"labels have shape {tuple(shift_labels.shape)}; expected {tuple(tokens)}")
    hidden_states = hidden_states.flatten(0, -2)
    targets = shift_labels.flatten().to(hidden_states.device)
    parts = zip(hidden_states.split(chunk), targets.split(chunk), strict=True)
    with _casts_in_each_chunk(hidden_states.device):
        losses = [_recomputed_sum(head, h, y, ignore_index) for h, y in parts]
    total = torch.stack(losses).sum()
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def check_loss_function(loss_function: Any) -> None:
    """Raise ValueError if a model's loss_function is not the one that is computed here."""
    if loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"loss_function is {loss_function!r}, which needs the logits of all tokens; expected transformers' "
            "ForCausalLMLoss after set_loss_chunk, or set_loss_chunk(None)"
        )


def _casts_in_each_chunk(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as it is, without its cache: so the weights' gradients of the chunks are summed in their dtype."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)


def _recomputed_sum(head: nn.Module, hidden_states: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The sum of the losses of a chunk, whose logits the backward pass computes again."""
    if transforms_active() or not torch.is_grad_enabled():
        return _sum(head, hidden_states, targets, ignore_index)
    # A plain projection draws no random numbers. A head with LoRA may drop some, the same ones again.
    random = type(head) is not nn.Linear
    loss: Tensor = checkpoint(
        _sum, head, hidden_states, targets, ignore_index, use_reentrant=False, preserve_rng_state=random
    )
    return loss


def _sum(head: nn.Module, hidden_states: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = head(hidden_states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
