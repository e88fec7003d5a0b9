"""The lock of a checkpoint's folder, which keeps two jobs from saving into it at the same moment.

Its file is locked by ``flock``, which ends with the process that holds it, however it dies; its text says
who that is. It is there during a save only. File systems without ``flock`` have the text alone. Then a lock is stale if
its process, of this host, is gone, or if it is of another host and `STALE` seconds old.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable

NAME = "save.lock"
STALE = 6 * 3600.0
LONGEST = 1000  # bytes of the text
_WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """A process.

    Args:
        host: its host.
        space: that host's boot and the container that give the process id its meaning.
        pid: its id.
        start: when it began, in the clock ticks of ``/proc``, because ids are used again.
    """

    host: str
    space: str
    pid: int
    start: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(socket.gethostname(), _space(), os.getpid(), _start(os.getpid()))

    @property
    def is_visible(self) -> bool:
        """Whether this process can tell if that one still runs."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    @property
    def is_gone(self) -> bool:
        """Whether it is known that the process has ended."""
        return self.is_visible and _start(self.pid) != self.start

    def __str__(self) -> str:
        return f"process {self.pid} on host {printable(self.host[:100])}"


@dataclass
class FolderLock:
    """A lock that is held until `release`, or until this process ends.

    Args:
        path: of its file.
        file: the open file; None after `release`.
    """

    path: Path
    file: io.FileIO | None

    @classmethod
    def acquire(cls, folder: Path) -> FolderLock:
        """Lock a folder.

        Raises:
            CheckpointError: if another process holds it, which the message names.
            OSError: if the file cannot be written.
        """
        path = folder / NAME
        while True:
            file, created = _open(path)
            lock = cls(path, file)
            try:
                if _is_locked(path, file, created):
                    os.ftruncate(file.fileno(), 0)
                    os.pwrite(file.fileno(), json.dumps(vars(Holder.here())).encode(), 0)
                    if lock.is_held():
                        return lock
            except CheckpointError:
                file.close()
                raise
            except BaseException:
                lock.release()
                raise
            file.close()

    def is_held(self) -> bool:
        """Whether the file is still this lock's: a user may have deleted it, or a process without ``flock``."""
        return self.file is not None and _is_at(self.path, self.file)

    def check(self) -> None:
        """Raise CheckpointError if another job has taken the lock away."""
        if not self.is_held():
            raise CheckpointError(f"{self.path} was taken away while this save was under way: another job has saved")

    def release(self) -> None:
        """Unlock the folder, and remove the file if it is still this lock's."""
        if self.file is None:
            return
        file, self.file = self.file, None
        with suppress(OSError):
            if _is_at(self.path, file):
                self.path.unlink()
            # Processes that were forked meanwhile have the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def _open(path: Path) -> tuple[io.FileIO, bool]:
    """The lock's file, and whether it was not there before."""
    created = True

    def opener(name: str, _: int) -> int:
        nonlocal created
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with suppress(FileExistsError):
            return os.open(name, flags | os.O_EXCL, 0o666)
        created = False
        return os.open(name, flags, 0o666)

    try:
        file = io.FileIO(str(path), "r+", opener=opener)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise CheckpointError(f"{path} is no regular file; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} is no regular file; remove it")
    return file, created


def _is_locked(path: Path, file: io.FileIO, created: bool) -> bool:
    """Lock the file; False if a stale one had to be removed first.

    Raises:
        CheckpointError: if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        stale = _holder(file)
        gone = stale is not None and stale.is_gone  # but a process that it forked still has the file open
    except OSError as error:
        if error.errno not in _WITHOUT_FLOCK:
            raise
        if created:
            return True
        stale = _holder(file)
        old = time.time() - os.fstat(file.fileno()).st_mtime > STALE
        gone = stale.is_gone if stale is not None and stale.is_visible else old
    if not gone:
        raise CheckpointError(
            f"{stale or 'another process'} is saving into {path.parent} now; it holds {path.name} there. If two jobs "
            "were started by mistake, end one; else save into a folder of its own"
        )
    if _is_at(path, file):
        path.unlink(missing_ok=True)
    return False


def _holder(file: io.FileIO) -> Holder | None:
    """Who has written the text, if it can be read."""
    try:
        found = json.loads(os.pread(file.fileno(), LONGEST, 0))
        return Holder(str(found["host"]), str(found["space"]), int(found["pid"]), str(found["start"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_at(path: Path, file: io.FileIO) -> bool:
    """Whether a path still leads to an open file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _space() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start(pid: int) -> str:
    """When a process of this host began; empty if there is none, or only a dead one that nobody has waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]
