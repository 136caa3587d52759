"""Ending a fit on Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(advice: str = "") -> Iterator[None]:
    """Let Ctrl-C during a fit raise ``KeyboardInterrupt``, where Lightning exits with status 1 and ignores further signals.

    Args:
        advice: What the exception says about going on.

    Raises:
        KeyboardInterrupt: The fit was interrupted.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        # The trainer counts any exception as an interruption; what it exits on is the context of its exit.
        if not isinstance(stopped.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt(advice) from None
