import pytest
from report_inputs import write_vectors


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """The directory of the vectors and the differences they hold."""
    directory = tmp_path_factory.mktemp("vectors")
    return directory, write_vectors(directory)
