"""Batches from streamed data, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from lata_lightning.errors import LataError
from lata_lightning.rows.tokens import TokenRow


class StreamedBatches(IterableDataset[dict[str, Tensor]]):
    """An endless stream of batches, of which each epoch takes the next ``batches_per_epoch``.

    The stream repeats the table, each pass shuffled within a buffer by seed and pass number; batch b of the stream goes to process b mod n. The batches
    of an epoch depend on its number alone: after a resume the earlier batches are read and skipped.

    Args:
        table: Iterable data set of `datasets`.
        rows_of: From a row of the table and its number within the pass to rows of tokens: none, one or several.
        arrange: Transforms the stream of rows, for example by packing.
        collate: Makes a batch from rows.
        batch_size: Rows per batch.
        batches_per_epoch: Batches of each process per epoch.
        buffer: Size of the shuffle buffer in rows.
        seed: Seed of the order.
    """

    def __init__(
        self,
        table: Any,
        rows_of: Callable[[Mapping[str, Any], int], Iterable[TokenRow]],
        arrange: Callable[[Iterable[TokenRow]], Iterator[TokenRow]],
        collate: Callable[[list[TokenRow]], dict[str, Tensor]],
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
        """Set the number of processes, the rank of this one, and a function that returns the number of the epoch."""
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, epoch
        self._stream: Iterator[list[TokenRow]] = iter(())
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

    def _batches(self) -> Iterator[list[TokenRow]]:
        rows = self.arrange(self._rows())
        while True:
            yield list(islice(rows, self.batch_size))

    def _rows(self) -> Iterator[TokenRow]:
        shuffled = self.table.shuffle(seed=self.seed, buffer_size=self.buffer)
        number = 0
        while True:
            shuffled.set_epoch(number)
            count = 0
            for position, row in enumerate(shuffled):
                for made in self.rows_of(row, position):
                    count += 1
                    yield made
            if not count:
                raise LataError("the data in the stream gives no row to learn from: it is empty, or every row is too long")
            number += 1
