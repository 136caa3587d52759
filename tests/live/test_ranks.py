import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lata_lightning import LataError
from lata_lightning.live.ranks import Ranks


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What each of two processes raised: rows of kind, failing process, class of the error, its message."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).with_name("ranks_run.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank), str(directory)], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def raised(errors, rank, kind, failing):
    return next(row[2:] for row in errors[rank] if row[:2] == [kind, failing])


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("of the system", "OSError", "[Errno 28] No space left on device"),
        ("that cannot be sent", "Unpicklable", "CUDA went away"),
    ],
)
def test_an_error_of_any_kind_is_raised_where_it_happened_and_reported_on_the_other_process(errors, kind, name, text, failing):
    assert raised(errors, failing, kind, failing) == [name, text]
    other = raised(errors, 1 - failing, kind, failing)
    assert other == ["LataError", f"process {failing} of 2 failed with {name}: {text}. Its own log holds the traceback."]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_the_package_is_the_same_on_every_process(errors, failing):
    sides = [raised(errors, rank, "of the package", failing) for rank in (0, 1)]
    assert sides == [["OutputError", "the output_dir cannot be made"]] * 2


def test_without_an_error_every_process_gets_its_result(errors):
    assert [raised(errors, rank, "nothing", None)[0] for rank in (0, 1)] == ["done", "done"]


@pytest.mark.parametrize("error", [LataError("no"), KeyError("no")])
def test_one_process_alone_raises_its_own_error(error):
    def fail():
        raise error

    with pytest.raises(type(error), match="no"):
        Ranks().agree(fail)
