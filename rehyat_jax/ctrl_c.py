"""Ctrl-C that is not lost while Python searches for garbage.

Python ignores every exception of a function in `gc.callbacks`, a KeyboardInterrupt too, and of the finalizers that a
search calls. JAX has both. A search, such as Orbax's after a save, takes up to a second, and a Ctrl-C during it arrives
in one of these functions.
"""

import contextlib
import gc
import signal
import threading
import weakref
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
    gc.callbacks.insert(0, _note_search)
    try:
        yield
    finally:
        gc.callbacks.remove(_note_search)
        _searching.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)


_searching = threading.Event()
"""Set while a search calls finalizers."""


def _note_search(phase: str, _: dict[str, int]) -> None:
    if threading.current_thread() is threading.main_thread():
        _searching.set() if phase == "start" else _searching.clear()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _searching.is_set() or _is_ignored(frame):
        threading.Timer(AGAIN_AFTER_SECONDS, signal.raise_signal, [number]).start()
    else:
        signal.default_int_handler(number, frame)


def _is_ignored(frame: FrameType | None) -> bool:
    """True if a function of `gc.callbacks` or a `weakref.finalize` is being executed."""
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks} - {None}
    codes.add(weakref.finalize.__call__.__code__)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None
