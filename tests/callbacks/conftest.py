import pytest
from lightning_models import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Base, instruct and instruction vector of a tiny Llama; not to be changed."""
    return make_models(tmp_path_factory.mktemp("models"))
