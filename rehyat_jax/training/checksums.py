"""Checksums of the files of a directory, which reveal damage before the files are used.

`checksums.txt` has a line "CRC BYTES PATH" for every file, and a last line "CRC LINES ." for the lines above. CRC-32
detects every flipped bit and every burst of up to 32 bits, and is several times as fast as disks are. It guards
against accidents, not forgery. TensorStore checks its own indices, but not the values of arrays.
"""

import errno
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

CHECKSUMS = "checksums.txt"
NOT_COVERED = (CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")
"""Files at the top of the directory without a checksum. Orbax writes times into the last two after all other files,
and only reads whether they exist."""

MAY_BE_MISSING = ("metrics/metrics",)
"""Files that only rank checkpoints. They are deleted where Orbax could not read them."""

BLOCK_BYTES = 2**24
THREADS = 4
"""Enough to keep a disk busy; zlib lets other threads run."""


def write_checksums(directory: epath.Path) -> None:
    """Writes `checksums.txt` for the files that a directory holds now."""
    names = sorted(_files(directory))
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: _checksum(directory / name), names)
        lines = [f"{found} {name}\n" for found, name in zip(sums, names, strict=True)]
    (directory / CHECKSUMS).write_text("".join([*lines, _last_line(lines)]))


def find_damage(directory: epath.Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Description of the first file that has changed since `checksums.txt` was written; None if no file has.

    Args:
      part, parts: index of the part of the files to check, and number of equal parts; processes share the work so.

    Raises:
      OSError: a file cannot be read for a reason that says nothing about its content, such as missing permissions.
    """
    file = directory / CHECKSUMS
    try:
        lines = file.read_bytes().decode().splitlines(keepends=True)
    except FileNotFoundError:
        return f"{file} is missing: it was deleted, or an older version of rehyat_jax wrote the checkpoint"
    except OSError as error:
        return _unreadable(file, error)
    except UnicodeDecodeError as error:
        return f"{file} cannot be read ({error})"
    if not lines or lines[-1] != _last_line(lines[:-1]):
        return f"{file} is damaged"

    def damage(line: str) -> str | None:
        expected, size, name = line.rstrip("\n").split(" ", maxsplit=2)
        try:
            found = _checksum(directory / name)
        except FileNotFoundError:
            return None if name in MAY_BE_MISSING else f"{directory / name} is missing"
        except OSError as error:
            return _unreadable(directory / name, error)
        if found == f"{expected} {size}":
            return None
        return f"{directory / name}: expected CRC and bytes {expected} {size}, found {found}"

    with ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(damage, lines[:-1][part::parts])), None)


def _unreadable(file: epath.Path, error: OSError) -> str:
    """The description of a file that is damaged itself. Raises any other error again."""
    if error.errno not in (errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
        raise error
    return f"{file} cannot be read ({error})"


def _files(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif prefix or path.name not in NOT_COVERED:
            yield prefix + path.name


def _checksum(path: epath.Path) -> str:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return f"{crc:08x} {size}"


def _last_line(lines: list[str]) -> str:
    return f"{zlib.crc32(''.join(lines).encode()):08x} {len(lines)} .\n"
