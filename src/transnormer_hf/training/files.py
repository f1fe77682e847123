"""Files and folders that are written whole: a reader sees the old or the new, an interrupted write loses nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`; what is written there takes the place of `path` at the end.

    The folder is made. Where the block raises, the temporary file goes and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file by way of `replacing`, in UTF-8 and with plain newlines."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name at the end; `path` must then not exist or be empty.

    Where the block raises, the temporary folder goes and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as unfinished:
        yield Path(unfinished)
        os.chmod(unfinished, 0o755)  # a temporary folder is private
        if path.exists():
            path.rmdir()
        os.rename(unfinished, path)
