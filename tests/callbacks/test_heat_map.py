import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_models import EXPECTED_WARNINGS, Module, batches, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback
from lata_lightning.callbacks import loggers

pytestmark = EXPECTED_WARNINGS


@pytest.fixture
def instruct(models):
    return LlamaForCausalLM.from_pretrained(models / "instruct")


class Images(Logger):
    """A logger that takes images, as that of W&B does."""

    name, version = "images", 0

    def __init__(self):
        super().__init__()
        self.images = []

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, *args, **kwargs): ...

    def log_image(self, key, images, step=None):
        self.images.append((key, images, step))


def fit(tmp_path, instruct, given, instruction):
    callback = LATACallback(instruction, table=False, output_dir=tmp_path / "lata")
    trainer(tmp_path, callback, logger=given).fit(Module(instruct), batches())


def test_loggers_of_figures_and_of_images_get_the_heat_map_of_the_run_with_every_measurement(tmp_path, models, instruct):
    images = Images()
    fit(tmp_path, instruct, [TensorBoardLogger(tmp_path, name="board"), images, CSVLogger(tmp_path)], models / "instruction")
    assert [(key, step) for key, _, step in images.images] == [("lata/alignment_by_layer", 5), ("lata/alignment_by_layer", 11)]
    (picture,) = images.images[-1][1]
    assert (picture.dtype, picture.ndim) == (np.uint8, 3)
    events = EventAccumulator(str(tmp_path / "board/version_0")).Reload()
    first, image = events.Images("lata/alignment_by_layer")
    assert (first.step, image.step) == (5, 11)
    assert (image.height, image.width) == picture.shape[:2]


def test_without_an_instruction_vector_there_is_no_picture(tmp_path, instruct):
    images = Images()
    fit(tmp_path, instruct, images, None)
    assert images.images == []


def test_without_matplotlib_training_ends_as_ever(tmp_path, models, instruct, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    images = Images()
    fit(tmp_path, instruct, images, models / "instruction")
    assert images.images == []
    assert (tmp_path / "lata" / "task_vector" / "task_vector.json").is_file()


def test_without_an_output_directory_there_is_no_picture():
    images = Images()
    loggers.log_heat_map([images], "lata", None, 1)
    assert images.images == []
