"""Multi-query associative recall (MQAR): the synthetic recall task of Zoology (arXiv 2312.04927, section 3).

A sequence first lists P key-value pairs; later every key comes once more, as a query, and the model has to
name its value. With T = 12, P = 2, keys 4 and 2, values 8 and 7, filler written as a dot:

    position   0   1   2   3   4   5   6   7   8   9  10  11
    inputs     4   8   2   7   .   .   2   .   .   .   4   .
    labels     -   -   -   -   -   -   7   -   -   -   8   -        (- is -100: no loss, no score)

A label stands at the position of its query (labels are not shifted by one). Queries stand at 2P + 2s, where the
slots s are drawn without replacement, in the order of the pairs, from the power law

    p(s) ~ (s + 1)^(a - 1),   s = 0 .. (T - 2P) / 2 - 1          a = 1: uniform; a near 0: close to the pairs

Vocabulary: token 0 is the filler of the version without random fillers, keys are 1 .. V/2 - 1, values are
V/2 .. V - 1; within a sequence keys are distinct and so are values. Random fillers are uniform over all tokens but
the keys of the sequence, so that each key stands in it exactly twice (the published generator lets them collide).

Legend: N examples, T tokens of a sequence, P pairs, V vocabulary size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gka.training.errors import UserError

IGNORE = -100  # the label that torch's cross entropy leaves out
_SEED_STEP = {"train": 0, "test": 1}


class MQAR(NamedTuple):
    """Examples: `inputs` [N, T] int64 token ids, `labels` [N, T] int64, -100 where there is no query."""

    inputs: Tensor
    labels: Tensor


def check_mqar(seq_len: int, num_pairs: int, vocab_size: int, power_a: float) -> None:
    """Refuse settings that no sequence fits.

    Raises:
        UserError: saying which number does not fit and what would.
    """
    if num_pairs < 1:
        raise UserError(f"num_pairs must be at least 1, got {num_pairs}")
    if seq_len % 2:
        raise UserError(f"seq_len must be even, got {seq_len}")
    if seq_len < 4 * num_pairs:
        raise UserError(
            f"{num_pairs} pairs and their queries need a seq_len of at least {4 * num_pairs}, got {seq_len}"
        )
    if vocab_size < 2 * (num_pairs + 1):
        raise UserError(
            f"{num_pairs} distinct keys need a vocab_size of at least {2 * (num_pairs + 1)}, got {vocab_size}"
        )
    if not power_a > 0:
        raise UserError(f"power_a must be greater than 0, got {power_a}")


def slot_probabilities(seq_len: int, num_pairs: int, power_a: float) -> Tensor:
    """Probability of each slot for the first pair's query: float64 [(T - 2P) // 2], sums to 1."""
    ranks = torch.arange(1, (seq_len - 2 * num_pairs) // 2 + 1, dtype=torch.float64)
    weights = ranks ** (power_a - 1)
    return weights / weights.sum()


def make_mqar(
    num_examples: int,
    *,
    seq_len: int = 64,
    num_pairs: int = 8,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    device: torch.device | str = "cpu",
) -> MQAR:
    """Generate examples of MQAR; the same arguments give the same examples.

    Args:
        num_examples: N >= 0.
        seq_len: T, even, at least 4P.
        num_pairs: P >= 1.
        vocab_size: V, at least 2P + 2.
        power_a: a > 0 of the power law of the queries' slots.
        random_non_queries: whether positions that are neither pair nor query hold random tokens; else 0.
        seed: of the examples, not negative.
        split: "train" and "test" never share a stream of random numbers, whatever the seeds.
        device: where they are generated; another kind of device draws other examples.

    Returns:
        MQAR(inputs [N, T], labels [N, T]), int64 on the device.

    Raises:
        UserError: for settings that no sequence fits.
    """
    check_mqar(seq_len, num_pairs, vocab_size, power_a)
    random = torch.Generator(device).manual_seed(2 * seed + _SEED_STEP[split])
    half, context = vocab_size // 2, 2 * num_pairs
    keys = 1 + _distinct(num_examples, num_pairs, half - 1, random)
    values = half + _distinct(num_examples, num_pairs, vocab_size - half, random)

    probabilities = slot_probabilities(seq_len, num_pairs, power_a).to(device).expand(num_examples, -1)
    slots = _draw_in_order(probabilities, num_pairs, random)
    positions = context + 2 * slots

    if random_non_queries:
        inputs = _fillers(keys, seq_len, vocab_size, random)
    else:
        inputs = torch.zeros(num_examples, seq_len, dtype=torch.int64, device=device)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    inputs.scatter_(1, positions, keys)
    labels = torch.full_like(inputs, IGNORE).scatter_(1, positions, values)
    return MQAR(inputs, labels)


def _draw_in_order(probabilities: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Draw without replacement, one after the other, by the largest of log p + Gumbel noise: [N, count]."""
    if probabilities.shape[0] == 0:
        return torch.empty(0, count, dtype=torch.int64, device=random.device)
    uniform = torch.rand(probabilities.shape, generator=random, dtype=torch.float64, device=random.device)
    noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    return (probabilities.log() + noise).topk(count, dim=1).indices


def _distinct(num_examples: int, count: int, size: int, random: torch.Generator) -> Tensor:
    """Draw `count` distinct numbers of range(size) for each example, in random order: [N, count].

    Floyd's algorithm: the j-th draw is uniform on 0 .. size - count + j; where that number is taken
    already, its upper end, which cannot be, takes its place.
    """
    place: dict[str, Any] = {"generator": random, "device": random.device}
    drawn = torch.empty(num_examples, count, dtype=torch.int64, device=random.device)
    for j in range(count):
        top = size - count + j
        candidate = torch.randint(top + 1, (num_examples, 1), **place)
        taken = (drawn[:, :j] == candidate).any(1, keepdim=True)
        drawn[:, j : j + 1] = torch.where(taken, top, candidate)
    order = torch.rand(num_examples, count, **place).argsort(1)
    return drawn.gather(1, order)


def _fillers(keys: Tensor, seq_len: int, vocab_size: int, random: torch.Generator) -> Tensor:
    """Random tokens [N, T], uniform over the vocabulary without the example's keys [N, P].

    Number r of the tokens that are left is token r + j, where j counts the keys that it has to jump.
    """
    num_examples, num_pairs = keys.shape
    device = random.device
    rank = torch.randint(vocab_size - num_pairs, (num_examples, seq_len), generator=random, device=device)
    ahead = keys.sort(1).values - torch.arange(
        num_pairs, device=device
    )  # how many tokens are left before each key
    return rank + torch.searchsorted(ahead, rank, right=True)
