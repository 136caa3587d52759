"""A saved vector of which some tensors are factors and all others are unchanged, as that of a LoRA run."""

from dataclasses import replace

import torch

from lata_lightning import TaskVector
from lata_lightning.numerics.chunks import factor_chunks
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.store.views import Wrapping
from lata_lightning.vectors.entries import TensorEntry


class InFactors(Wrapping):
    """A source of which some tensors are products of a left and a right factor; each is its only part."""

    def __init__(self, source, factors):
        super().__init__(source)
        self._factors = {name: LowRank(source.shape(name), (Factors(*pair),)) for name, pair in factors.items()}

    def read(self, name):
        return self._factors[name].dense() if name in self._factors else super().read(name)

    def low_rank(self, name):
        return self._factors.get(name)

    def chunks(self, name):
        return factor_chunks(self._factors[name]) if name in self._factors else super().chunks(name)


def vector_in_factors(directory, weights, factors):
    """The saved vector; factors are pairs of left and right by the name of the tensor."""
    zero = TaskVector.between(weights, {name: tensor.clone() for name, tensor in weights.items()})
    entries = {name: TensorEntry(tuple(weights[name].shape), "float32", unchanged=True) for name in weights if name not in factors}
    return TaskVector(InFactors(zero.tensors, factors), replace(zero.manifest, tensors=entries)).save(directory)


def random_factors(weights, names, *, rank=2, seed=0):
    """Random factors for some of the tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(weights[name].shape) for name in names}
    return {
        name: (torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))
        for name, (rows, columns) in shapes.items()
    }
