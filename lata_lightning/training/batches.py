"""Which rows of tokens make which batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lata_lightning.rows.tokens import TokenRow, collate


class MixtureBatchSampler(DistributedSampler[list[int]]):
    """Batches of row numbers: chat rows drawn by group shares, and raw-text windows spread evenly between them.

    Every row of a group comes once, in shuffled order, before any of them comes again in the same epoch. Each of n processes takes every n-th batch of one
    common order, and all take the same number of batches; so ``batches`` is the number of steps, whatever the number of processes.
    """

    def __init__(
        self,
        groups: Sequence[range],
        shares: Sequence[float],
        windows: range,
        raw_share: float,
        rows_per_batch: int,
        windows_per_batch: int,
        batches: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        # Under DDP Lightning keeps a DistributedSampler, where it would wrap any other sampler.
        super().__init__(cast("Dataset[Any]", range(len(windows))), num_replicas, rank, seed=seed)
        self.groups = groups
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.windows = windows
        self.raw_share = raw_share
        self.rows_per_batch = rows_per_batch
        self.windows_per_batch = windows_per_batch
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        orders = [_endless_shuffle(group, generator) for group in self.groups]
        for number in range(self.batches * self.num_replicas):
            # Every process draws the batches of all processes, so that they share one order.
            mine = number % self.num_replicas == self.rank
            # A batch is raw text when the running total of raw text passes a whole number.
            if int((number + 1) * self.raw_share) > int(number * self.raw_share):
                starts = torch.randint(len(self.windows), (self.windows_per_batch,), generator=generator)
                batch = [self.windows[start] for start in starts.tolist()]
            else:
                drawn = torch.multinomial(self.shares, self.rows_per_batch, replacement=True, generator=generator)
                batch = [next(orders[group]) for group in drawn.tolist()]
            if mine:
                yield batch


class TokenRows(Dataset[TokenRow]):
    """Chat rows first, then one row for every position at which a window of raw text can start."""

    def __init__(self, rows: list[TokenRow], raw: Tensor, context_length: int) -> None:
        self.rows = rows
        self.raw = raw
        self.context_length = context_length
        self.windows = range(len(rows), len(rows) + (len(raw) - context_length + 1 if len(raw) else 0))

    def __len__(self) -> int:
        return len(self.rows) + len(self.windows)

    def __getitem__(self, index: int) -> TokenRow:
        if index < len(self.rows):
            return self.rows[index]
        start = index - len(self.rows)
        window = self.raw[start : start + self.context_length].long()
        return TokenRow(window, window)


class Batches(Dataset[dict[str, Tensor]]):
    """Whole batches, indexed by lists of row numbers from a batch sampler."""

    def __init__(self, rows: Dataset[TokenRow], pad_token_id: int) -> None:
        self.rows = rows
        self.pad_token_id = pad_token_id

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return collate([self.rows[number] for number in numbers], self.pad_token_id)


def _endless_shuffle(group: range, generator: torch.Generator) -> Iterator[int]:
    while True:
        for position in torch.randperm(len(group), generator=generator).tolist():
            yield group[position]
