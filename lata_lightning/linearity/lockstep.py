"""Several calls that go through the same places together: none passes a place before all have come to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Stand = Callable[[str, Callable[[], Any]], Any]
"""What a call does at a place: it gives the name of the place and what is to be done there, and gets what came of that."""


class Paused(Generic[Result]):
    """A call in a thread of its own that stands still at every place until it is told to go on; only one of several ever runs at a time.

    Args:
        call: Takes the function to call at every place, and gives the result.

    Attributes:
        place: Where it stands; None at the end.
        result: What it gave, at the end.
    """

    def __init__(self, call: Callable[[Stand], Result]) -> None:
        self.place: str | None = None
        self.result: Result | None = None
        self._call, self._cancelled = call, False
        self._work: Callable[[], Any] | None = None
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Do what is to be done where it stands, and let it go on to the next place or the end; an error of the call is raised here."""
        work, self._work = self._work, None
        if work is not None:
            # Here and not in the thread of the call: what a thread has freed stays in its own pool of memory, and there are many threads.
            self._outcome = work()
        self._go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the call where it stands."""
        self._cancelled = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            self.result = self._call(self._stand)
        except _CancelledError:
            pass
        except BaseException as error:
            self._error = error
        self.place = None
        self._stands.release()

    def _stand(self, place: str, work: Callable[[], Any]) -> Any:
        self.place, self._work = place, work
        self._stands.release()
        self._wait()
        outcome, self._outcome = self._outcome, None
        return outcome

    def _wait(self) -> None:
        self._go.acquire()
        if self._cancelled:
            raise _CancelledError


class _CancelledError(BaseException):
    """Unwinds a call that is not to be finished."""


def in_lockstep(calls: Sequence[Callable[[Stand], Result]], at_place: Callable[[str], None]) -> list[Result]:
    """Results of calls that wait for each other at every place.

    Args:
        calls: Each takes a function that it calls with the name of every place it comes to and with what is to be done there; all come to the same
            places in one order. What is to be done there is done by the thread that called ``in_lockstep``.
        at_place: Called with a place when all calls that come to it next have come to it, before anything is done there.

    Raises:
        BaseException: Whatever a call, or ``at_place``, raises; the other calls end where they stand.
    """
    running = [Paused(call) for call in calls]
    try:
        for paused in running:
            paused.advance()
        while waiting := [paused for paused in running if paused.place is not None]:
            place = waiting[0].place
            at_place(str(place))
            for paused in waiting:
                if paused.place == place:
                    paused.advance()
    finally:
        for paused in running:
            paused.cancel()
    return [paused.result for paused in running]  # type: ignore[misc]
