import pytest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """What `datasets` makes of a file stays with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
