"""The folder in which a checkpoint is assembled, `NAME.partial`, and checks of its disk.

It is renamed to NAME when it is complete, so a folder with a checkpoint's name is always complete.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from xgenmm.checkpoints.manifest import format_size
from xgenmm.errors import CheckpointError
from xgenmm.files import lock_folder

PARTIAL = ".partial"


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Create or reopen the folder `TARGET.partial`, locked for this process.

    Raises CheckpointError if another process has locked it.
    """
    staging = target.with_name(f"{target.name}{PARTIAL}")
    staging.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(staging))
        except BlockingIOError as error:
            raise CheckpointError(f"{staging}: another process is writing to it") from error
        yield staging


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise CheckpointError if the folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {format_size(needed)} are needed on this disk, but only "
            f"{format_size(free)} are free; free some, or set XGENMM_HOME to another folder"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, quota or size limit, met while writing `path`, into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(disk_full(path, error.strerror or str(error))) from error


def disk_full(path: Path, reason: str) -> str:
    """Return the error text for a file that does not fit on the disk."""
    return f"{path}: {reason}; free some disk space and run the same command again, it resumes"
