"""Examples of multi-query associative recall as a training uses them: positions of queries, and answers.

    loss       mean cross entropy of the answers, in nats
    accuracy   fraction of queries whose most likely token is the answer

Both look at the queries alone, so the output projection need not be applied anywhere else.

Legend: N examples, B batch, T tokens of a sequence, P queries of a sequence, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mqar import IGNORE, MQAR


class Asked(NamedTuple):
    """`inputs` [N, T] token ids, `queries` [N, P] int64 positions, `values` [N, P] int64 answers or IGNORE."""

    inputs: Tensor
    queries: Tensor
    values: Tensor

    def batches(self, size: int) -> list[Asked]:
        """Batches in order, the last one smaller where N is no multiple of the size."""
        return [Asked(*parts) for parts in zip(*(x.split(size) for x in self), strict=True)]


Logits = Callable[[Any, Asked], Tensor]  # of a model and a batch: [B, P, V]


def asked(examples: MQAR, pairs: int, device: torch.device) -> Asked:
    """Examples with their queries, padded to `pairs` queries by position 0 and IGNORE."""
    is_query = examples.labels != IGNORE
    positions = is_query.nonzero()[:, 1].view(len(examples.inputs), -1)
    values = examples.labels.gather(1, positions)
    missing = pairs - positions.shape[1]
    parts = examples.inputs, F.pad(positions, (0, missing)), F.pad(values, (0, missing), value=IGNORE)
    return Asked(*(part.to(device) for part in parts))


def loss(model: Any, logits_of: Logits, batch: Asked, dtype: str) -> Tensor:
    """The loss of a batch, a scalar in float32.

    Args:
        model: the model.
        logits_of: its logits at the queries.
        batch: the batch, on the device of the model.
        dtype: "bfloat16" for autocast, or "float32".
    """
    logits = _logits(model, logits_of, batch, dtype)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.values.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def accuracy(model: Any, logits_of: Logits, examples: Asked, rows: int, dtype: str) -> float:
    """The fraction of right answers, over batches of `rows` sequences; sets eval mode. Arguments as for `loss`."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=examples.inputs.device)
    for batch in examples.batches(rows):
        said = _logits(model, logits_of, batch, dtype).argmax(-1)
        right += (said == batch.values).sum()  # padding, IGNORE, is never said
    return round(right.item() / int((examples.values != IGNORE).sum()), 5)


def _logits(model: Any, logits_of: Logits, batch: Asked, dtype: str) -> Tensor:
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return logits_of(model, batch)
