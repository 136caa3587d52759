"""Models that the parity tests share."""

from functools import cache

import pytest
from architectures import save_family


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A function that gives the directories of a variant and dtype (see save_family), made once; not to be changed."""

    @cache
    def directories(name, tied, dtype):
        return save_family(tmp_path_factory.mktemp(name), name, tied=tied, dtype=dtype)

    return directories
