"""Recording the Gram matrices of the inputs of linear layers and embeddings, and fitting one matrix to the matrices of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lata_lightning.errors import LataError
from lata_lightning.numerics.matrix_regression import Settings

MatrixUse = Literal["rows", "columns", "table"]
"""How a matrix is used: its rows are multiplied by the inputs (a linear layer), its columns are (a Conv1D of transformers), or its rows are looked up by
number (an embedding)."""


class GramMatrix:
    """Sum of x xᵀ over the inputs x of one matrix, in float64; for a table, the number of uses of each row.

    Args:
        role: How the matrix is used.
        width: Length of an input; number of rows of a table.
    """

    def __init__(self, role: MatrixUse, width: int) -> None:
        self.role: MatrixUse = role
        self._sum = torch.zeros((width,) if role == "table" else (width, width), dtype=torch.float64)
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (positions, width), or row numbers of a table of shape (positions,)."""
        self._count += len(inputs)
        if self.role == "table":
            self._sum += torch.bincount(inputs, minlength=len(self._sum))
        else:
            wide = inputs.double()
            self._sum.addmm_(wide.T, wide)

    def mean(self, off_diagonal: float) -> Tensor:
        """Return the mean over all inputs, with the entries off the diagonal multiplied by a factor; overwrites the sum."""
        mean = self._sum.div_(max(self._count, 1))
        if self.role != "table":
            diagonal = mean.diagonal().clone()
            mean.mul_(off_diagonal).diagonal().copy_(diagonal)
        return mean


class MatrixFit:
    """The sums over tasks that determine one merged matrix, in float64.

    Args:
        role: How the matrix is used.
        shape: Shape of the matrix.
    """

    def __init__(self, role: MatrixUse, shape: Sequence[int]) -> None:
        self._role = role
        rows, width = reversed(shape) if role == "columns" else shape
        self._vectors, self._products = torch.zeros(2, rows, width, dtype=torch.float64)
        self._grams = torch.zeros((rows,) if role == "table" else (width, width), dtype=torch.float64)
        self._tasks = 0

    def add(self, vector: Tensor, gram: Tensor | None) -> None:
        """Add the matrix of a task's vector and the mean of its Gram matrix, or None if its samples never reach the matrix."""
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
        """Return the W that minimises Σ_t tr((W − τ_t) C_t (W − τ_t)ᵀ) + λ ‖W − P‖², in float32, with C_t the means and P the prior; overwrites the sums.

        Args:
            settings: The ridge, λ in units of the mean of the diagonal of Σ C_t, and the prior. In directions without inputs, and in rows of a table
                that are never used, W is the prior. Used rows of a table need no ridge.

        Raises:
            LataError: The ridge is too small for a direction without inputs.
        """
        solution = self._vectors.mul_(settings.share(self._tasks))
        if self._role == "table":
            used = self._grams.nonzero().flatten()
            solution[used] = self._products[used] / self._grams[used, None]
        elif (trace := self._grams.trace()) > 0:
            # The change relative to the prior: zero for a single vector, which therefore comes out exactly.
            added = self._products.addmm_(solution, self._grams, alpha=-1)
            self._grams.diagonal().add_(settings.penalty(float(trace), len(self._grams)))
            factor, failed = torch.linalg.cholesky_ex(self._grams)
            if failed:
                raise LataError(
                    f"the ridge {settings.ridge:g} is lost in rounding beside the inputs, which do not span all directions. Give a larger one."
                )
            solution += torch.cholesky_solve(added.T, factor).T
        solved: Tensor = (solution.T if self._role == "columns" else solution).float().contiguous()
        return solved


class GramRecorder(TorchFunctionMode):
    """A context that records the Gram matrices of the inputs of some matrices wherever they are used.

    It intercepts the products themselves and does not depend on types of modules, so that scaled embeddings, position embeddings and linear layers of any
    library are handled alike. A matrix that is used in two roles is recorded in the first.

    Args:
        matrices: The matrices by name; they are recognised by identity.

    Attributes:
        grams: Gram matrices, by name, of the matrices that were used.
        positions: From the inputs of a use, and the role, to the inputs to record, of shape (positions, width) or (positions,).
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(matrix): name for name, matrix in matrices.items()}
        self.grams: dict[str, GramMatrix] = {}
        self.positions: Callable[[Tensor, MatrixUse], Tensor] = flattened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        use = _use(func, args, kwargs)
        if use is not None and (name := self._names.get(id(use[1]))) is not None:
            inputs, matrix, role = use
            if name not in self.grams:
                self.grams[name] = GramMatrix(role, matrix.shape[1] if role == "rows" else matrix.shape[0])
            if self.grams[name].role == role:
                self.grams[name].add(self.positions(inputs, role))
        return func(*args, **kwargs)


def _use(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, MatrixUse] | None:
    """Return the inputs, the matrix and its role where a call uses a matrix; None for any other call."""
    if func is functional.linear:
        inputs, matrix, role = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), "rows"
    elif func is functional.embedding:
        inputs, matrix, role = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), "table"
    elif func is torch.addmm:
        inputs, matrix, role = _argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2"), "columns"
    else:
        return None
    return inputs, matrix, role  # type: ignore[return-value]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs[name]


def flattened(inputs: Tensor, role: MatrixUse) -> Tensor:
    """Return the inputs of a matrix as (positions, width), or the row numbers of a table as (positions,)."""
    return inputs.reshape(-1) if role == "table" else inputs.reshape(-1, inputs.shape[-1])
