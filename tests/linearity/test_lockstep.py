import threading

import pytest

from lata_lightning.linearity.lockstep import in_lockstep


def traveller(name, places, log):
    def travel(stand):
        for place in places:
            assert stand(place, lambda: (name, threading.current_thread())) == (name, threading.main_thread())
            log.append((name, place))
        return name

    return travel


def test_all_calls_come_to_a_place_before_any_passes_it():
    log = []
    results = in_lockstep([traveller(name, "ab", log) for name in (1, 2, 3)], lambda place: log.append(place))
    assert log == ["a", (1, "a"), (2, "a"), (3, "a"), "b", (1, "b"), (2, "b"), (3, "b")]
    assert results == [1, 2, 3]


def test_a_place_may_come_again():
    log = []
    in_lockstep([traveller(name, "aa", log) for name in (1, 2)], lambda place: log.append(place))
    assert log == ["a", (1, "a"), (2, "a"), "a", (1, "a"), (2, "a")]


def test_calls_without_places_are_simply_called():
    assert in_lockstep([traveller(name, "", []) for name in (1, 2)], lambda place: None) == [1, 2]


@pytest.mark.parametrize("failing", ["call", "between", "work"])
def test_an_error_ends_all_calls_and_is_raised(failing):
    before = threading.active_count()
    log = []

    def fails(stand):
        stand("a", lambda: None)
        raise ValueError("lost")

    def works(stand):
        stand("a", lambda: [][0] if failing == "work" else None)

    def between(place):
        if failing == "between":
            raise ValueError("lost")

    with pytest.raises((ValueError, IndexError), match="lost|range"):
        in_lockstep([traveller(1, "ab", log), works, fails, traveller(2, "ab", log)], between)
    assert threading.active_count() == before
    assert log == ([] if failing == "between" else [(1, "a")])
