"""Opens what lies in a checkpoint's folder: real folders and files only, never through a link out of it.

Links above the checkpoint's folder are the user's own, and are followed. Within it, a name stands for what lies there.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shampoo_deepspeed.checkpoint.errors import CheckpointError

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class MissingError(CheckpointError):
    """A file or folder of a checkpoint is not there."""


@contextmanager
def inner_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder within a checkpoint's, for `open_file`.

    Raises:
        CheckpointError: if it is missing or no folder.
    """
    descriptor = _checked(path, stat.S_IFDIR, os.O_DIRECTORY, None)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(path: Path, folder: int | None = None) -> io.FileIO:
    """A file that is open for reading until what is returned is dropped.

    Args:
        folder: the descriptor of its folder, which may have been moved since it was opened.

    Raises:
        CheckpointError: if it is missing, no regular file, or cannot be opened.
    """
    # O_NONBLOCK: should a pipe take its place now, opening it would wait for a writer.
    return io.FileIO(path, opener=lambda *_: _checked(path, stat.S_IFREG, os.O_NONBLOCK, folder))


def _checked(path: Path, kind: int, flags: int, folder: int | None) -> int:
    """Open a path if it is of this kind, both before and after it is opened."""
    name: str | Path = path if folder is None else path.name
    try:
        _check_kind(path, os.stat(name, dir_fd=folder, follow_symlinks=False), kind)
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        _check_kind(path, os.fstat(descriptor), kind)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(path: Path, found: os.stat_result, wanted: int) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != wanted:
        raise CheckpointError(
            f"{path} is {_KINDS.get(kind, 'something unknown')}, and must be {_KINDS[wanted]}: nothing in a "
            "checkpoint's folder may lead out of it"
        )


def read_range(file: io.FileIO, path: Path, start: int, memory: memoryview) -> None:
    """Fill memory with the bytes of a file from ``start`` on.

    Raises:
        CheckpointError: if they are not all there, or cannot be read.
    """
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file.fileno(), [memory[done:]], start + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not count:
            raise CheckpointError(f"{path} has no byte {start + done}: it was cut short")
        done += count


def sync_directory(path: Path) -> None:
    """Make what was created and renamed in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
