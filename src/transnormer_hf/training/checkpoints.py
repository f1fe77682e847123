"""Which of the Trainer's checkpoints are whole.

The Trainer writes a checkpoint file by file into a folder with its final name, and `get_last_checkpoint` of
transformers takes the highest number: after a run that was killed while saving, that one is useless.
"""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE_FILE = "trainer_state.json"


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The `checkpoint-N` with the highest N that was written to its end, or None."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    paths = [path for path, number in numbers.items() if number.isdigit() and is_whole_checkpoint(path)]
    return max(paths, key=lambda path: int(numbers[path]), default=None)


def is_whole_checkpoint(path: str | Path) -> bool:
    """Whether a checkpoint folder of the Trainer was written to its end.

    The main process writes trainer_state.json last. The other files are looked at as well, because a machine that
    loses power may keep the names of files and not their contents.
    """
    path = Path(path)
    try:
        json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # parts of a sharded checkpoint, whose index is written last
    if any(not (part.parent / ".metadata").is_file() for part in path.glob("*/*.distcp")):
        return False
    torch_files = [file for ending in ("pt", "pth", "bin") for file in path.glob(f"**/*.{ending}")]
    return all(map(zipfile.is_zipfile, torch_files)) and all(map(_is_whole_safetensors, path.glob("**/*.safetensors")))


def _is_whole_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy"):  # reads the header and compares it with the size of the file
            return True
    except SafetensorError:
        return False
