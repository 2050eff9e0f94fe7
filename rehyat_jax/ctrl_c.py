"""Ctrl-C that is not lost while Python searches for garbage.

Python ignores every exception of a function in `gc.callbacks`, a KeyboardInterrupt too. JAX has a function there. A
search, such as Orbax's after a save, takes up to a second, and a Ctrl-C during it arrives in that function.
"""

import contextlib
import gc
import signal
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN_AFTER_SECONDS = 0.05


@contextlib.contextmanager
def kept_ctrl_c() -> Iterator[None]:
    """While the block runs, a Ctrl-C during a search for garbage raises KeyboardInterrupt after the search.

    Only the main thread can handle signals: in any other one nothing changes, nor if Ctrl-C already has a handler that
    is not Python's.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _is_in_search(frame):
        threading.Timer(AGAIN_AFTER_SECONDS, signal.raise_signal, [number]).start()
    else:
        signal.default_int_handler(number, frame)


def _is_in_search(frame: FrameType | None) -> bool:
    """True if a function of `gc.callbacks` is being executed."""
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks} - {None}
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None
