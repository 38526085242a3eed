"""Where a language model's loss falls: by position in the context, and by how far back a token can be recalled.

A window is a context of a model, x_0 .. x_T: x_0 is given, x_1 .. x_T are predicted, each from all before it. Of
every predicted token the negative log-likelihood -log p(x_t | x_0 .. x_{t-1}) is taken, in nats, and added up

    by position       p = t - 1, tokens of the window that were predicted before
    by distance       d = t - max{s < t: x_{s-1} = x_{t-1} and x_s = x_t}

Where there is such an s, the pair of tokens (x_{t-1}, x_t), the bigram, stands in the window before, and x_t could
be found there by what precedes it: x_t is a recall token, an associative recall hit of Zoology (arXiv 2312.04927,
section 4). All others are no recall. A bigram that is frequent in training text can be known by heart:
Zoology leaves out those seen more than 1250 times; here `common` says which, and they are no recall. Bins double:

    bin          0      1      2      3       b
    positions    0-1    2-3    4-7    8-15    2^b .. 2^(b+1) - 1
    distances    1      2-3    4-7    8-15    2^b .. 2^(b+1) - 1

Bits per byte are nats / log 2 / bytes of the text that is predicted, as in gka/cli/evaluate.py, which carries a
model's state from window to window; here each window is read for itself.

Legend: N windows, T predicted tokens of a window, B windows side by side, D width of the model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gka.cli.evaluate import side_by_side


@dataclass(frozen=True)
class Bin:
    """Tokens whose position or distance is first .. last, and the sum of their nats."""

    first: int
    last: int
    tokens: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token; nan for no tokens."""
        return _mean(self.nats, self.tokens)


@dataclass(frozen=True)
class RecallLoss:
    """Sums over all predicted tokens, and over the parts of them.

    Attributes:
        nats, tokens, bytes: totals.
        positions: bins of the position, which hold every token once.
        recall: bins of the distance, which hold every recall token once.
        other_nats, other_tokens: of the tokens that are no recall tokens.
    """

    nats: float
    tokens: int
    bytes: int
    positions: tuple[Bin, ...]
    recall: tuple[Bin, ...]
    other_nats: float
    other_tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return _mean(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def recall_tokens(self) -> int:
        return sum(part.tokens for part in self.recall)

    @property
    def recall_nats(self) -> float:
        return math.fsum(part.nats for part in self.recall)

    @property
    def recall_loss(self) -> float:
        """Nats per recall token; nan if there are none."""
        return _mean(self.recall_nats, self.recall_tokens)

    @property
    def other_loss(self) -> float:
        """Nats per token that is no recall token; nan if there are none."""
        return _mean(self.other_nats, self.other_tokens)

    def as_dict(self) -> dict[str, Any]:
        """The sums, and the means of them, as JSON takes it: a mean over no tokens is None."""
        values = asdict(self)
        for name in ("positions", "recall"):
            values[name] = [{**asdict(part), "loss": _or_none(part.loss)} for part in getattr(self, name)]
        for name in ("loss", "bits_per_byte", "recall_nats", "recall_tokens", "recall_loss", "other_loss"):
            values[name] = _or_none(getattr(self, name))
        return values


def context_windows(documents: Sequence[np.ndarray], start: int, context: int) -> list[np.ndarray]:
    """Cut documents into windows in which every token is predicted once.

    Args:
        documents: token ids, [T_i] each.
        start: the token before each document, gka.training.data.document_token's.
        context: predicted tokens of a window at most, T.

    Returns:
        windows [1 + n], n <= T. The first token of each, which is given, is `start` or, further on in a document,
        the last of the window before. An empty document has none.

    Raises:
        ValueError: context is less than 1.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    windows = []
    for document in documents:
        tokens = np.concatenate([[start], document]).astype(np.int64)
        windows += [tokens[i : i + context + 1] for i in range(0, len(document), context)]
    return windows


def bigram_distances(tokens: np.ndarray | Tensor) -> np.ndarray:
    """How far back the bigram that ends at each token stands last: d, see the module.

    Args:
        tokens: ids from 0 to 2^32 - 1, [T] or [B, T]; each row is a context of its own.

    Returns:
        int64, of the shape of tokens; 0 where there is none, and so always for the first token of a row.

    Raises:
        ValueError: another number of dimensions, no integers, or ids out of range.
    """
    codes = _bigrams(tokens)
    order = codes.argsort(-1, kind="stable")
    codes = np.take_along_axis(codes, order, -1)
    # equal bigrams are neighbours now, in the order of their places
    gaps = np.where(codes[..., 1:] == codes[..., :-1], np.diff(order, axis=-1), 0)
    distances = np.zeros(tuple(tokens.shape), np.int64)
    np.put_along_axis(distances, order[..., 1:] + 1, gaps, -1)
    return distances


def common_bigrams(tokens: np.ndarray | Tensor, more_than: int) -> np.ndarray:
    """The bigrams that training text has more than n times, for `common` of `recall_loss`.

    Args:
        tokens: training tokens, [T] or [B, T], e.g. a run's train.bin. It takes up to 16 bytes of memory each.
        more_than: n >= 0; Zoology's is 1250.

    Returns:
        uint64 [n], ascending: 2^32 times the first token of the bigram, plus the second.

    Raises:
        ValueError: as bigram_distances, or more_than is negative.
    """
    if more_than < 0:
        raise ValueError(f"more_than must not be negative, got {more_than}")
    codes = _bigrams(tokens).ravel()
    codes.sort()
    # one that stands there more than n times in a row is again there n places further
    return np.unique(codes[more_than:][codes[more_than:] == codes[: max(0, len(codes) - more_than)]])


@torch.inference_mode()
def token_nats(
    model: Any,
    windows: Sequence[np.ndarray],
    *,
    batch_size: int,
    slice_tokens: int = 4096,
    autocast: bool = False,
) -> list[np.ndarray]:
    """Negative log-likelihood of every predicted token of every window.

    The hidden states of a batch of windows are computed at once, [B, T, D]; the logits, which may be a hundred
    times larger, of slices of them. The logarithm is taken in float32.

    Args:
        model: a causal language model in eval mode whose logits are `get_output_embeddings()` of the last hidden
            states of its `base_model`, as those of this library are and Llama's, Mistral's, Qwen2's and Qwen3's.
        windows: token ids, [1 + T_i] each, of which the first is given.
        batch_size: windows side by side, B. Shorter ones are padded at their end, where a causal model's
            predictions of the tokens before are not touched.
        slice_tokens: tokens whose logits are in memory at once, slice_tokens * V numbers.
        autocast: whether the model computes in bfloat16 (torch.autocast), with weights as they are.

    Returns:
        nats, float32 [T_i] for each window.

    Raises:
        ValueError: a window without a token to predict.
    """
    if short := [index for index, window in enumerate(windows) if len(window) < 2]:
        raise ValueError(f"window {short[0]} has {len(windows[short[0]])} tokens; expected at least 2")
    nats = [np.empty(0, np.float32)] * len(windows)
    head = model.get_output_embeddings()
    for batch, tokens, counted in side_by_side(windows, batch_size):
        tokens, counted = tokens.to(model.device), counted[:, 1:].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            targets, hidden = tokens[:, 1:][counted], hidden[counted]  # [n], [n, D]: without the padding
            losses = [
                F.cross_entropy(head(states).float(), labels, reduction="none")
                for states, labels in zip(hidden.split(slice_tokens), targets.split(slice_tokens), strict=True)
            ]
        rows = torch.cat(losses).cpu().split(counted.sum(1).tolist())
        for index, row in zip(batch, rows, strict=True):
            nats[index] = row.numpy()
    return nats


def sum_nats(
    windows: Sequence[np.ndarray],
    nats: Sequence[np.ndarray],
    *,
    num_bytes: int,
    common: np.ndarray | None = None,
) -> RecallLoss:
    """Add the nats of tokens up, by position and by distance.

    Args:
        windows: token ids, [1 + T_i] each. nats: of their predicted tokens, [T_i] each.
        num_bytes: bytes of the text that is predicted.
        common: bigrams that do not make recall tokens, as common_bigrams gives them; None for no such.

    Raises:
        ValueError: there are no windows, nats do not fit them, or num_bytes is less than 1.
    """
    if len(windows) == 0 or num_bytes < 1:
        raise ValueError(f"expected windows and bytes, got {len(windows)} windows and {num_bytes} bytes")
    if [len(window) - 1 for window in windows] != [len(row) for row in nats]:
        raise ValueError("nats must have one number for every token of the windows but the first")
    positions = np.concatenate([np.arange(len(row)) for row in nats])
    distances = np.concatenate([_recall_distances(window, common) for window in windows])
    values = np.concatenate(nats).astype(np.float64)
    recalled = distances > 0
    other = values[~recalled]
    return RecallLoss(
        nats=float(values.sum()),
        tokens=len(values),
        bytes=num_bytes,
        positions=_bins(positions, values, lowest=0),
        recall=_bins(distances[recalled], values[recalled], lowest=1),
        other_nats=float(other.sum()),
        other_tokens=len(other),
    )


def recall_loss(
    model: Any,
    windows: Sequence[np.ndarray],
    *,
    num_bytes: int,
    batch_size: int,
    common: np.ndarray | None = None,
    slice_tokens: int = 4096,
    autocast: bool = False,
) -> RecallLoss:
    """Measure a model on windows of text; arguments and errors are those of `token_nats` and `sum_nats`."""
    nats = token_nats(model, windows, batch_size=batch_size, slice_tokens=slice_tokens, autocast=autocast)
    return sum_nats(windows, nats, num_bytes=num_bytes, common=common)


def _bigrams(tokens: np.ndarray | Tensor) -> np.ndarray:
    """Every token and the next as one number: uint64 [..., T - 1]."""
    ids = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers [T] or [B, T], got {ids.dtype} {list(ids.shape)}")
    if ids.size and not (ids.min() >= 0 and ids.max() < 2**32):
        raise ValueError(f"token ids must be 0 to 2^32 - 1, got {ids.min()} to {ids.max()}")
    codes = ids[..., :-1].astype(np.uint64)
    codes <<= np.uint64(32)
    codes |= ids[..., 1:].astype(np.uint64, copy=False)
    return codes


def _recall_distances(window: np.ndarray, common: np.ndarray | None) -> np.ndarray:
    """Distances of the predicted tokens [T], 0 where they are no recall."""
    distances = bigram_distances(window)[1:]
    if common is not None:
        codes = _bigrams(window)
        place = common.searchsorted(codes)
        distances[place < common.searchsorted(codes, side="right")] = 0
    return distances


def _bins(numbers: np.ndarray, values: np.ndarray, lowest: int) -> tuple[Bin, ...]:
    """Sums of values [n] by the power of two below numbers [n], up to the last that occurs; 0 counts as 1."""
    index = np.frexp(np.maximum(numbers, 1))[1] - 1  # floor(log2), exact
    tokens, nats = np.bincount(index), np.bincount(index, values)
    return tuple(
        Bin(2**b if b else lowest, 2 ** (b + 1) - 1, int(count), float(total))
        for b, (count, total) in enumerate(zip(tokens, nats, strict=True))
    )


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
