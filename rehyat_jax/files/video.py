"""Reads video files with the ffmpeg program of imageio-ffmpeg or of the machine."""

import errno
import functools
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
"""Suffixes of the files that `frame_size` and `read_clip` can read."""

_DEMUXERS = "mov,matroska,webm,avi"
"""Formats of these files, the only ones allowed. ffmpeg detects formats by content, and some other formats make it
open further files."""

_PROCESSOR_SECONDS = 600
"""Limit of the processor time of an ffmpeg run. A video that needs more is unreadable, on a busy machine or not."""

_SECONDS = 3600
"""Limit of an ffmpeg run in seconds, which a busy machine or a slow disk may use up."""

_LIMITED = f'ulimit -t {_PROCESSOR_SECONDS} 2>/dev/null; exec "$0" "$@"'
"""A shell's program that runs a command with that limit."""

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
"""Signals by which a program's own fault ends it. Others come from outside."""

_MAX_PIXELS = 2**26
"""Largest number of pixels in a frame; 8K has half as many."""

_MESSAGE_BYTES = 2**16
"""Number of bytes to read of ffmpeg's messages."""


class UnreadableVideo(OSError):
    """A video that ffmpeg cannot read on any machine. Any other OSError may be a fault of the machine."""


class NoFfmpeg(InputError):
    """This machine has no ffmpeg program."""


def find_ffmpeg() -> str:
    """The ffmpeg program of imageio-ffmpeg, or else the one on PATH. Raises NoFfmpeg if neither exists."""
    try:
        import imageio_ffmpeg  # not at the top: commands that handle no videos do not need it

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        program = shutil.which("ffmpeg")
        if program is None:
            raise NoFfmpeg(
                f"videos need the ffmpeg program: expected the package imageio-ffmpeg or ffmpeg on PATH, found neither "
                f"({error}); `pip install imageio-ffmpeg`, or install ffmpeg"
            ) from error
        return program


def frame_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a video when it is displayed. Raises the exceptions of `read_clip`."""
    picture = _ffmpeg_reads(path, ["-frames:v", "1", "-c:v", "ppm", "-f", "image2pipe", "-"])
    # A PPM begins with "P6", the width, the height and the largest value, each followed by white space.
    _, width, height = picture[:50].split(maxsplit=3)[:3]
    return int(height), int(width)


def read_clip(path: str | Path, *, fps: int, frames: int, height: int, width: int) -> np.ndarray:
    """The start of a video at another frame rate and size.

    The video is scaled to cover the size (by pixel area when it shrinks) and cropped equally on both sides. Frames are
    repeated or dropped to match the rate.

    Args:
      path: the file.
      fps: frames per second of the result.
      frames: largest number of frames in the result.
      height, width: size of the result, in pixels.

    Returns:
      [frames or fewer, height, width, 3] uint8; fewer if the video ends earlier.

    Raises:
      NoFfmpeg: this machine has no ffmpeg program.
      UnreadableVideo: a frame cannot be read, and the video is to blame; the message is ffmpeg's.
      OSError: ffmpeg was killed, took too long or lacked memory, or the file itself cannot be read.
    """
    scale = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area+accurate_rnd+bitexact"
    crop = f"crop={width}:{height}"
    options = ["-vf", f"fps={fps},{scale},{crop}", "-frames:v", str(frames), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    pixels = np.frombuffer(_ffmpeg_reads(path, options), np.uint8)
    frame = math.prod((height, width, 3))
    return pixels[: len(pixels) // frame * frame].reshape(-1, height, width, 3)


class _Run(NamedTuple):
    """The result of an ffmpeg run: its exit code, or minus the signal that ended it, its output and its messages."""

    code: int
    output: bytes
    messages: str

    @property
    def has_read(self) -> bool:
        return self.code == 0 and bool(self.output)


AMPLE_BYTES = 2**34
"""A limit on the memory of a process under which ffmpeg reads every video."""


def _ffmpeg_reads(path: str | Path, options: list[str]) -> bytes:
    """ffmpeg's output for a file's first video stream. The file is not trusted: ffmpeg opens no other file.

    A single failure may be a fault of the video or of the machine: without memory, ffmpeg calls good videos invalid.
    The video is to blame if ffmpeg fails on it twice, and reads a good video in between.
    """
    run = _run_ffmpeg(path, options)
    if run.has_read:
        return run.output
    _read_stored_bytes(path)
    reason = f"{path}: ffmpeg could not read the video: {run.messages}"
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if any(limit != resource.RLIM_INFINITY and limit < AMPLE_BYTES for limit in limits):
        raise OSError(
            f"{reason}; the memory of a process is limited, under which it fails on good videos too: ulimit -v"
        )
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good.mp4"
        good.write_bytes(_good_video())
        if not (control := _run_ffmpeg(good, options)).has_read:
            raise OSError(f"{reason}; it cannot read a good video either: {control.messages}")
    again = _run_ffmpeg(path, options)
    if not again.has_read:
        raise UnreadableVideo(reason)
    return again.output


def _run_ffmpeg(path: str | Path, options: list[str]) -> _Run:
    """Runs ffmpeg on a file, with limits of time.

    Raises:
      UnreadableVideo: the video takes too much processor time.
      OSError: ffmpeg was ended from outside, or took too long.
    """
    safely = ["-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS, "-max_pixels", str(_MAX_PIXELS)]
    ffmpeg = [find_ffmpeg(), "-loglevel", "error", "-nostdin", "-xerror", *safely]
    command = ["/bin/sh", "-c", _LIMITED, *ffmpeg, "-i", f"file:{path}", "-map", "0:v:0", *options]
    if not os.path.isfile(path):
        raise OSError(f"{path}: is not a file any more")
    begin = time.monotonic()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None
        end = lambda: os.kill(process.pid, signal.SIGKILL)
        timer = threading.Timer(_SECONDS, end)
        timer.start()
        try:
            output = process.stdout.read()
        except BaseException:
            end()
            raise
        finally:
            process.stdout.close()
            # `subprocess.run` would not say how much processor time the program took.
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            timer.cancel()
        messages.seek(0)
        text = messages.read(_MESSAGE_BYTES).decode(errors="replace")
    code = process.returncode
    if code and used.ru_utime + used.ru_stime >= _PROCESSOR_SECONDS - 1:
        raise UnreadableVideo(f"{path}: takes more than {_PROCESSOR_SECONDS} s of processor time to decode")
    if time.monotonic() - begin >= _SECONDS:
        raise OSError(f"{path}: ffmpeg did not come to an end within {_SECONDS} s")
    if code < 0 and -code not in _CRASHES:
        raise OSError(f"{path}: ffmpeg was ended by signal {-code}; perhaps for lack of memory")
    # ffmpeg ends itself by 255 after SIGTERM and SIGINT, without a message. The same code stands for an error.
    if code == 255 and "Operation not permitted" not in text:
        raise OSError(f"{path}: ffmpeg was asked to end, by a signal")
    return _Run(code, output, _reason(text) if code >= 0 else f"it crashed by signal {-code}")


@functools.cache
def _good_video() -> bytes:
    black = ["-f", "lavfi", "-i", "color=size=16x16:rate=16", "-frames:v", "2"]
    encoding = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "good.mp4"
        run = subprocess.run([find_ffmpeg(), "-loglevel", "error", *black, *encoding, file], stderr=subprocess.PIPE)
        if run.returncode:
            raise OSError(f"ffmpeg could not write a video: {run.stderr.decode(errors='replace').strip()}")
        return file.read_bytes()


def _read_stored_bytes(path: str | Path) -> None:
    """Reads a file. Raises OSError if its disk fails, which does not make a video unreadable."""
    with open(path, "rb", buffering=0) as file:
        end = 0
        while True:
            try:
                # A file may have holes of any size, which no disk stores.
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more data
                    return
                raise
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            os.lseek(file.fileno(), begin, os.SEEK_SET)
            while (left := end - file.tell()) > 0 and file.read(min(left, 2**24)):
                pass


def _reason(messages: str) -> str:
    """The first line of ffmpeg's messages, without memory addresses, which differ between runs."""
    lines = messages.strip().splitlines() or ["no reason given"]
    return shown(re.sub(r" @ 0x[0-9a-f]+", "", lines[0]))
