"""Barriers for several calls: none passes a barrier before all of them have reached it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Wait = Callable[[str, Callable[[], Any]], Any]
"""Waits at the barrier of a name, has a function called there, and returns its result."""


class PausedCall(Generic[Result]):
    """A call in its own thread that pauses at every barrier until it is resumed; only one of several calls runs at a time.

    Args:
        call: Takes the function that waits at a barrier, and returns the result.

    Attributes:
        barrier: The barrier at which the call is paused; None at the end.
        result: What the call returned; set at the end.
    """

    def __init__(self, call: Callable[[Wait], Result]) -> None:
        self.barrier: str | None = None
        self.result: Result | None = None
        self._call, self._cancelled = call, False
        self._work: Callable[[], Any] | None = None
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Call the function given at the barrier, and let the call continue to the next barrier or its end; raises an error of the call."""
        work, self._work = self._work, None
        if work is not None:
            # In this thread and not in that of the call: memory that a thread has freed stays in a pool of that thread, and there are many threads.
            self._outcome = work()
        self._resumed.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the call at the barrier."""
        self._cancelled = True
        self._resumed.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._pause()
            self.result = self._call(self._wait)
        except _CancelledError:
            pass
        except BaseException as error:
            self._error = error
        self.barrier = None
        self._paused.release()

    def _wait(self, barrier: str, work: Callable[[], Any]) -> Any:
        self.barrier, self._work = barrier, work
        self._paused.release()
        self._pause()
        outcome, self._outcome = self._outcome, None
        return outcome

    def _pause(self) -> None:
        self._resumed.acquire()
        if self._cancelled:
            raise _CancelledError


class _CancelledError(BaseException):
    """Unwinds a call that is cancelled."""


def run_with_barriers(calls: Sequence[Callable[[Wait], Result]], at_barrier: Callable[[str], None]) -> list[Result]:
    """Run calls that wait for each other at every barrier, and return their results.

    Args:
        calls: Each takes a function, which it calls at every barrier with the name of the barrier and a function to run there. All reach the same
            barriers in the same order. The functions run in the thread that called ``run_with_barriers``.
        at_barrier: Called with the name of a barrier when all calls that come to it have reached it, before any of their functions.

    Raises:
        BaseException: Whatever a call, or ``at_barrier``, raises; the other calls are cancelled.
    """
    running = [PausedCall(call) for call in calls]
    try:
        for paused in running:
            paused.resume()
        while waiting := [paused for paused in running if paused.barrier is not None]:
            barrier = waiting[0].barrier
            at_barrier(str(barrier))
            for paused in waiting:
                if paused.barrier == barrier:
                    paused.resume()
    finally:
        for paused in running:
            paused.cancel()
    return [paused.result for paused in running]  # type: ignore[misc]
