from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.callbacks.metrics import metrics_of, padded_names
from lata_lightning.live.history import MeasuredStep


def test_numbers_in_names_of_layers_are_padded_to_the_longest_so_that_letters_sort_them():
    names = [f"model.layers.{index}" for index in range(12)]
    padded = padded_names(names)
    assert padded["model.layers.3"] == "model.layers.03"
    assert [name for name, _ in sorted(padded.items(), key=lambda item: item[1])] == names
    assert padded_names(["encoder.layer.7.attention", "stem"]) == {"encoder.layer.7.attention": "encoder.layer.7.attention", "stem": "stem"}


def test_figures_of_the_model_and_of_layers_go_to_folders_of_their_own():
    layers = {"h.9": LayerStats(0.5, 2.0, 1.0, 0.5), "h.10": LayerStats(None, None, 3.0, 0.0)}
    measured = MeasuredStep(
        4, 0, {"task_norm": 3.5, "cosine/math": -0.25}, Alignment("block", "instruct", layers, {}), {"math": {"h.9": -0.5}}
    )
    assert metrics_of("lata", measured) == {
        "lata/task_norm": 3.5,
        "lata/cosine/math": -0.25,
        "lata_layers/alignment/h.09": 0.5,
        "lata_layers/relative_norm/h.09": 2.0,
        "lata_layers/task_norm/h.09": 1.0,
        "lata_layers/task_norm/h.10": 3.0,
        "lata_layers/cosine/math/h.09": -0.5,
    }


def test_a_measurement_survives_json():
    layers = {"h.0": LayerStats(0.5, 2.0, 1.0, 0.5)}
    measured = MeasuredStep(
        4, None, {"task_norm": 3.5, "cosine/math": -0.25}, Alignment("block", "base", layers, {}), {"math": {"h.0": -0.5}}
    )
    assert MeasuredStep.from_json(measured.to_json()) == measured
