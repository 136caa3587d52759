import math

import pytest
import torch
from linear_models import Chain, changed, tuned, vectors_of
from tiny_models import llama
from torch import nn

from lata_lightning import TaskVector
from lata_lightning.errors import LataError
from lata_lightning.linearity.scores import cosine_distance, l2_distance, measure_linearity, nonlinearity


def rows(count, seed=0):
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_a_module_that_is_linear_along_the_vector_has_score_zero_exactly():
    # 3, 4 and their quarters have exact lengths in binary.
    start, step = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 8.0]])
    assert nonlinearity(lambda scale: start + scale * step).tolist() == [0.0, 0.0]


def test_a_module_that_is_quadratic_along_the_vector_has_the_score_worked_by_hand():
    # D(a, b) = |a² − b²|, so the integrand is (a − b)² (a + b − 1)²; with u = a − ½ and v = b − ½ its integral is 2 (E u⁴ − (E u²)²) = 2 (1/80 − 1/144).
    score = nonlinearity(lambda scale: torch.tensor([[scale**2]], dtype=torch.float64))
    assert score.tolist() == pytest.approx([1 / 90], rel=1e-12)


def test_the_quadrature_is_within_two_percent_of_the_integral_for_an_exponential():
    # D(a, b) = |eᵃ − eᵇ| / (e − 1). ∫∫ (eᵃ − eᵇ)² = e² − 1 − 2 (e − 1)², ∫∫ (a − b)² = 1/6 and ∫∫ (eᵃ − eᵇ)(a − b) = 2 ∫ a eᵃ − (e − 1) = 3 − e.
    whole = math.e - 1
    exact = (math.e**2 - 1 - 2 * whole**2) / whole**2 - 2 * (3 - math.e) / whole + 1 / 6
    score = nonlinearity(lambda scale: torch.tensor([[math.exp(scale)]], dtype=torch.float64))
    assert score.item() == pytest.approx(exact, rel=0.02)


def test_the_score_does_not_depend_on_the_length_of_the_step_nor_on_where_it_starts():
    def at(scale, size=1.0, origin=0.0):
        return origin + size * torch.tensor([[scale**2, scale]], dtype=torch.float64)

    assert nonlinearity(lambda scale: at(scale, 7.0, 3.0)).item() == pytest.approx(nonlinearity(at).item(), rel=1e-12)


def test_positions_that_do_not_move_have_no_score():
    # The second ends where it began.
    score = nonlinearity(lambda scale: torch.tensor([[1.0], [scale * (1 - scale)], [scale]]))
    assert score.isnan().tolist() == [True, True, False]


def test_any_distance_can_be_used():
    turning = nonlinearity(lambda scale: torch.tensor([[math.cos(scale), math.sin(scale)]], dtype=torch.float64), cosine_distance)
    # One minus the cosine of the angle between them, which is |a − b|.
    ratio = [[(1 - math.cos(a - b)) / (1 - math.cos(1.0)) for b in (0, 0.25, 0.5, 0.75, 1)] for a in (0, 0.25, 0.5, 0.75, 1)]
    weights = [7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90]
    expected = sum(weights[i] * weights[j] * (ratio[i][j] - abs(i - j) / 4) ** 2 for i in range(5) for j in range(5))
    assert turning.item() == pytest.approx(expected, rel=1e-9)
    assert l2_distance(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).tolist() == [5.0]
    assert cosine_distance(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [1.0]


def test_blocks_that_are_linear_in_their_parameters_score_zero_and_their_chain_does_not():
    start = Chain()
    (found,) = measure_linearity(start, vectors_of(start, [tuned(start)]), [[{"hidden": rows(3)}, {"hidden": rows(2, seed=1)}]])
    assert [score.layer for score in found.scores] == ["model", "blocks.0", "blocks.1"]
    assert [score.depth for score in found.scores] == [None, 0, 1]
    model, *blocks = found.scores
    assert model.output > 1e-4
    for score in blocks:
        assert score.output == pytest.approx(0.0, abs=1e-10)
        assert score.branch == pytest.approx(0.0, abs=1e-10)


class Squares(nn.Module):
    """Blocks that add the square of a weight to what comes in."""

    class Block(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(start))

        def forward(self, hidden):
            return hidden + self.weight**2

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Squares.Block(0.0), Squares.Block(0.0)])

    def forward(self, hidden):
        return self.blocks[1](self.blocks[0](hidden))


def test_the_scores_of_a_model_worked_by_hand():
    start = Squares()
    model = changed(start, blocks__0__weight=2.0, blocks__1__weight=1.0)
    (found,) = measure_linearity(start, vectors_of(start, [model]), [[{"hidden": rows(2)}]])
    # Every block, and with them the model, adds a multiple of scale².
    assert [score.output for score in found.scores] == pytest.approx([1 / 90] * 3, rel=1e-4)
    assert [score.branch for score in found.scores[1:]] == pytest.approx([1 / 90] * 2, rel=1e-4)


def test_branch_and_output_part_where_the_distance_depends_on_what_comes_in():
    start = llama()
    vector = TaskVector.between(start, tuned(start, size=0.1))
    samples = [[{"input_ids": torch.arange(8)[None]}]]
    (l2,) = measure_linearity(start, [vector], samples)
    (cosine,) = measure_linearity(start, [vector], samples, distance=cosine_distance)
    blocks = [(one, other) for one, other in zip(l2.scores, cosine.scores, strict=True) if one.part == "block"]
    assert blocks
    for one, other in blocks:
        assert one.branch == pytest.approx(one.output, rel=1e-2)
        assert abs(other.branch - other.output) > 0.1 * other.output


def test_layers_that_a_vector_does_not_move_have_no_score():
    start = Chain()
    (found,) = measure_linearity(start, vectors_of(start, [changed(start, blocks__0__bias=torch.ones(4))]), [[{"hidden": rows(2)}]])
    assert [(score.branch, score.output) for score in found.scores[2:]] == [(None, None)]


def test_every_vector_is_measured_on_its_own_samples():
    start = llama()
    vectors = [TaskVector.between(start, tuned(start, size=0.1, seed=seed)) for seed in (1, 2)]
    samples = [[{"input_ids": torch.arange(size)[None]}] for size in (4, 9)]
    seen = []
    both = measure_linearity(start, vectors, samples, level="block", progress=lambda done, size: seen.append((done, size)))
    alone = [measure_linearity(start, [vector], [batches], level="block")[0] for vector, batches in zip(vectors, samples, strict=True)]
    assert both == alone
    assert [score.layer for score in both[0].scores] == ["model", "model.layers.0", "model.layers.1"]
    # Two vectors, five scales, two blocks.
    assert [round(done / size * 20) for done, size in seen] == list(range(1, 21))


def test_invalid_requests_are_refused():
    start = Chain()
    vectors = vectors_of(start, [tuned(start)])
    with pytest.raises(LataError, match="per block or per submodule, not per tensor"):
        measure_linearity(start, vectors, [[{"hidden": rows(1)}]], level="tensor")
    with pytest.raises(LataError, match="got 0 sets that are not empty for 1 vectors"):
        measure_linearity(start, vectors, [[]])
    with pytest.raises(LataError, match="got 2 sets that are not empty for 1 vectors"):
        measure_linearity(start, vectors, [[{"hidden": rows(1)}]] * 2)


def test_a_model_that_gives_out_no_tensor_is_refused():
    class Mute(Chain):
        def forward(self, hidden, attention_mask=None):
            super().forward(hidden)

    start = Mute()
    with pytest.raises(LataError, match="Mute gives out no tensor"):
        measure_linearity(start, vectors_of(start, [tuned(start)]), [[{"hidden": rows(1)}]])
