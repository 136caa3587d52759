import numba
import numpy as np
import pytest

from lata_lightning.numerics.kernels import combine, compiled

SOURCE = "def add(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total\n"


def function_of(file):
    space = {}
    exec(compile(SOURCE, str(file), "exec"), space)  # noqa: S102 (the text above)
    return space["add"]


@pytest.mark.parametrize("options", [{}, {"fastmath": {"reassoc"}}])
def test_a_function_is_compiled_without_a_cache_where_no_directory_can_be_written(options):
    # numba keeps nothing of a file that it cannot find, as in a file system that it cannot write to.
    function = function_of("/nowhere/module.py")
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(function)
    assert compiled(**options)(function)(np.arange(5.0)) == 10.0


def test_compiled_code_is_cached_where_a_directory_can_be_written(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    assert compiled()(function_of(tmp_path / "module.py"))(np.arange(5.0)) == 10.0
    assert list(tmp_path.rglob("*.nbi"))


def test_a_cache_directory_that_cannot_be_made_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "cache"))
    (tmp_path / "module.py").write_text(SOURCE)
    assert compiled()(function_of(tmp_path / "module.py"))(np.arange(5.0)) == 10.0


def test_the_kernels_keep_weights_as_they_are_where_nothing_is_added():
    weights, found = np.array([-0.0, 1.5], np.float32), np.empty(2, np.float32)
    combine(weights, np.zeros((1, 2), np.float32), np.zeros(1, bool), np.ones(1), found, False)
    assert np.array_equal(np.signbit(found), np.signbit(weights))
    assert np.array_equal(found, weights)
