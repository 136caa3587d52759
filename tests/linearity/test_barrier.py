import threading

import pytest

from lata_lightning.linearity.barrier import run_with_barriers


def runner(name, barriers, log):
    def run(wait):
        for barrier in barriers:
            assert wait(barrier, lambda: (name, threading.current_thread())) == (name, threading.main_thread())
            log.append((name, barrier))
        return name

    return run


def test_all_calls_reach_a_barrier_before_any_passes_it():
    log = []
    results = run_with_barriers([runner(name, "ab", log) for name in (1, 2, 3)], log.append)
    assert log == ["a", (1, "a"), (2, "a"), (3, "a"), "b", (1, "b"), (2, "b"), (3, "b")]
    assert results == [1, 2, 3]


def test_a_barrier_may_be_repeated():
    log = []
    run_with_barriers([runner(name, "aa", log) for name in (1, 2)], log.append)
    assert log == ["a", (1, "a"), (2, "a"), "a", (1, "a"), (2, "a")]


def test_calls_without_barriers_return_their_results():
    assert run_with_barriers([runner(name, "", []) for name in (1, 2)], lambda barrier: None) == [1, 2]


@pytest.mark.parametrize("failing", ["call", "between", "work"])
def test_an_error_ends_all_calls_and_is_raised(failing):
    before = threading.active_count()
    log = []

    def fails(wait):
        wait("a", lambda: None)
        raise ValueError("lost")

    def works(wait):
        wait("a", lambda: [][0] if failing == "work" else None)

    def between(barrier):
        if failing == "between":
            raise ValueError("lost")

    with pytest.raises((ValueError, IndexError), match="lost|range"):
        run_with_barriers([runner(1, "ab", log), works, fails, runner(2, "ab", log)], between)
    assert threading.active_count() == before
    assert log == ([] if failing == "between" else [(1, "a")])
