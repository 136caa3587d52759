"""What matrices take in, and the one matrix that does on the inputs of several tasks what the matrix of each does, as nearly as one can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lata_lightning.errors import LataError
from lata_lightning.numerics.matrix_regression import Settings

Role = Literal["rows", "columns", "table"]
"""What a matrix does with its inputs: its rows are multiplied with them (a linear layer), its columns are (a Conv1D of transformers), or they are numbers
of rows to look up (an embedding)."""


class Gram:
    """Mean of x xᵀ over the inputs x of one matrix, in float64; of a table, whose inputs are single rows, the frequency of every row.

    Args:
        role: What the matrix does with its inputs.
        width: Length of an input; number of rows of a table.
    """

    def __init__(self, role: Role, width: int) -> None:
        self.role: Role = role
        self._sum = torch.zeros((width,) if role == "table" else (width, width), dtype=torch.float64)
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        """Take in inputs of shape (positions, width); of a table numbers of rows, of shape (positions,)."""
        self._count += len(inputs)
        if self.role == "table":
            self._sum += torch.bincount(inputs, minlength=len(self._sum))
        else:
            wide = inputs.double()
            self._sum.addmm_(wide.T, wide)

    def mean(self, off_diagonal: float) -> Tensor:
        """The mean, with its entries off the diagonal times a factor; uses up the sum."""
        mean = self._sum.div_(max(self._count, 1))
        if self.role != "table":
            diagonal = mean.diagonal().clone()
            mean.mul_(off_diagonal).diagonal().copy_(diagonal)
        return mean


class Fit:
    """Sums over the tasks of which one merged matrix follows, in float64.

    Args:
        role: What the matrix does with its inputs.
        shape: Its shape.
    """

    def __init__(self, role: Role, shape: Sequence[int]) -> None:
        self._role = role
        rows, width = reversed(shape) if role == "columns" else shape
        self._vectors, self._products = torch.zeros(2, rows, width, dtype=torch.float64)
        self._grams = torch.zeros((rows,) if role == "table" else (width, width), dtype=torch.float64)
        self._tasks = 0

    def add(self, vector: Tensor, gram: Tensor | None) -> None:
        """Take in the matrix of a task's vector, and the mean that its Gram gives; None if its samples never reach the matrix."""
        self._tasks += 1
        matrix = vector.T if self._role == "columns" else vector
        self._vectors += matrix
        if gram is None:
            return
        self._grams += gram
        if self._role == "table":
            used = gram.nonzero().flatten()
            self._products[used] += gram[used, None] * matrix[used]
        else:
            self._products.addmm_(matrix.double(), gram)

    def solve(self, settings: Settings) -> Tensor:
        """The matrix W of least Σ_t tr((W − τ_t) C_t (W − τ_t)ᵀ) + λ ‖W − P‖², in float32, with C_t the means and P the prior; uses up the sums.

        Args:
            settings: λ as a ridge in units of the mean of the diagonal of Σ C_t, and the prior, which directions get that no input has, and rows of a
                table that no input uses. Rows that are used need no ridge.

        Raises:
            LataError: The ridge is too small for some direction that no input has.
        """
        found = self._vectors.mul_(settings.share(self._tasks))
        if self._role == "table":
            used = self._grams.nonzero().flatten()
            found[used] = self._products[used] / self._grams[used, None]
        elif (trace := self._grams.trace()) > 0:
            # What the inputs add to the prior: of a single vector nothing, so it comes out as it is.
            added = self._products.addmm_(found, self._grams, alpha=-1)
            self._grams.diagonal().add_(settings.penalty(float(trace), len(self._grams)))
            factor, failed = torch.linalg.cholesky_ex(self._grams)
            if failed:
                raise LataError(
                    f"the ridge {settings.ridge:g} is lost in rounding beside the inputs, which do not go in all directions. Give a larger one."
                )
            found += torch.cholesky_solve(added.T, factor).T
        solved: Tensor = (found.T if self._role == "columns" else found).float().contiguous()
        return solved


class Seen(TorchFunctionMode):
    """While it is entered, takes in the inputs of matrices where they are used.

    It looks at the products themselves and not at types of modules, so that scaled embeddings, embeddings of positions and linear layers of any
    library are what they are. A matrix that is used in two roles is taken in the one that comes first.

    Args:
        matrices: By name; known again by being the same tensors.

    Attributes:
        grams: By name, of those that were used.
        positions: From the inputs of a use, and the role, to those that are taken in, one under the other.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(matrix): name for name, matrix in matrices.items()}
        self.grams: dict[str, Gram] = {}
        self.positions: Callable[[Tensor, Role], Tensor] = flattened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = _use(func, args, kwargs)
        if found is not None and (name := self._names.get(id(found[1]))) is not None:
            inputs, matrix, role = found
            if name not in self.grams:
                self.grams[name] = Gram(role, matrix.shape[1] if role == "rows" else matrix.shape[0])
            if self.grams[name].role == role:
                self.grams[name].add(self.positions(inputs, role))
        return func(*args, **kwargs)


def _use(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Role] | None:
    """Inputs, matrix and its role, if a call is a use of a matrix."""
    if func is functional.linear:
        inputs, matrix, role = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), "rows"
    elif func is functional.embedding:
        inputs, matrix, role = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), "table"
    elif func is torch.addmm:
        inputs, matrix, role = _argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2"), "columns"
    else:
        return None
    return inputs, matrix, role  # type: ignore[return-value]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def flattened(inputs: Tensor, role: Role) -> Tensor:
    """Inputs of a matrix one under the other: (positions, width), of a table (positions,)."""
    return inputs.reshape(-1) if role == "table" else inputs.reshape(-1, inputs.shape[-1])
