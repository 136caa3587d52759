"""Batches from data that is read as it is needed, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from lata_lightning.errors import LataError
from lata_lightning.rows.tokens import Row


class StreamedBatches(IterableDataset[dict[str, Tensor]]):
    """``batches_per_epoch`` batches of an endless stream in every epoch, each epoch where the last one ended.

    The table is gone through again and again, shuffled within a buffer by seed and pass; batch b of the stream goes to process b mod n. What comes
    in an epoch depends on its number alone: after a resume the batches before it are read and passed over.

    Args:
        table: Iterable data set of `datasets`.
        rows_of: Rows of tokens that a row of the table and its number in its pass give; none, one or several.
        arrange: What is done with the stream of rows: packing, or nothing.
        collate: Makes a batch of rows.
        batch_size: Rows a batch.
        batches_per_epoch: Batches an epoch, of each process.
        buffer: Rows to shuffle among each other.
        seed: Order.
    """

    def __init__(
        self,
        table: Any,
        rows_of: Callable[[Mapping[str, Any], int], Iterable[Row]],
        arrange: Callable[[Iterable[Row]], Iterator[Row]],
        collate: Callable[[list[Row]], dict[str, Tensor]],
        batch_size: int,
        batches_per_epoch: int,
        buffer: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.table, self.rows_of, self.arrange, self.collate = table, rows_of, arrange, collate
        self.batch_size, self.batches_per_epoch, self.buffer, self.seed = batch_size, batches_per_epoch, buffer, seed
        self.share(1, 0, lambda: 0)

    def share(self, num_replicas: int, rank: int, epoch: Callable[[], int]) -> None:
        """Settle which process this is, and whom to ask for the number of the epoch."""
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, epoch
        self._stream: Iterator[list[Row]] = iter(())
        self._at: int | None = None

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        begin = self.epoch() * self.batches_per_epoch * self.num_replicas
        if self._at is None or self._at > begin:
            self._stream, self._at = self._batches(), 0
        for _ in islice(self._stream, begin - self._at):
            self._at += 1
        for number in range(begin, begin + self.batches_per_epoch * self.num_replicas):
            batch = next(self._stream)
            self._at = number + 1
            if number % self.num_replicas == self.rank:
                yield self.collate(batch)

    def _batches(self) -> Iterator[list[Row]]:
        rows = self.arrange(self._rows())
        while True:
            yield list(islice(rows, self.batch_size))

    def _rows(self) -> Iterator[Row]:
        shuffled = self.table.shuffle(seed=self.seed, buffer_size=self.buffer)
        number = 0
        while True:
            shuffled.set_epoch(number)
            found = 0
            for place, row in enumerate(shuffled):
                for made in self.rows_of(row, place):
                    found += 1
                    yield made
            if not found:
                raise LataError("the data in the stream gives no row to learn from: it is empty, or every row is too long")
            number += 1
