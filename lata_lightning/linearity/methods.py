"""Names of the methods that merge several vectors; torch is not imported, so that the command line starts fast."""

from __future__ import annotations

from typing import Literal, get_args

MatrixMethod = Literal["regression", "tsv", "iso"]
"""Methods that make one vector of several, matrix by matrix."""
MATRIX_METHODS: tuple[MatrixMethod, ...] = get_args(MatrixMethod)
Method = Literal["sum", MatrixMethod]
"""All methods of a merge; ``"sum"`` adds the vectors up, which is task arithmetic."""
METHODS: tuple[Method, ...] = get_args(Method)
