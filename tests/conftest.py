"""Settings every test runs under: offline, one thread, seeded."""

import os
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def short_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a short quickstart; not to be changed."""
    from short_quickstart import SHORT, small

    from lata_lightning.quickstart import job

    directory = tmp_path_factory.mktemp("short-quickstart") / "output"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small(patch)
        job.run(directory, experts=SHORT)
    return directory


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with starts of classifiers and fine-tunes of each; files may be added to it."""
    import datasets
    from classifier_runs import make

    directory = tmp_path_factory.mktemp("classifiers")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
        patch.chdir(directory)
        make(directory)
    return directory
