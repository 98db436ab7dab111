"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "unwritable"]


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, sync: bool = True) -> None:
    """Write ``path`` so that a reader finds the old file or the whole new one, with ``sync`` after a power cut, too.

    write: puts the content into the file that it is given, or under that file's ``name``, which is next to ``path``,
    hidden, and ends in ``.tmp``. Raises OSError naming ``path`` where it cannot be written.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(scratch, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            write(file)
        with open(scratch, "rb") as file:  # anew: what writes by name may have put another file there
            os.fchmod(file.fileno(), mode)
            if sync:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> OSError:
    """The error to raise, in one sentence, where a file or folder cannot be written."""
    reason = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError) and e.strerror), str(error))
    return OSError(f"{path} cannot be written ({reason}); free some space or choose another folder")
