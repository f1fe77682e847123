"""Files that are written whole."""

from pathlib import Path

import pytest

from transnormer_hf.training.files import replacing, write_atomically


def test_a_text_is_written_with_its_folder(tmp_path):
    write_atomically(tmp_path / "runs" / "card.md", "é\n")
    assert (tmp_path / "runs" / "card.md").read_bytes() == "é\n".encode()
    assert [item.name for item in (tmp_path / "runs").iterdir()] == ["card.md"]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "all_results.json"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert [item.name for item in tmp_path.iterdir()] == ["all_results.json"]
    assert path.read_text() == "old"


def test_a_failed_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert [item.name for item in tmp_path.iterdir()] == ["curves.png"]
    assert path.read_bytes() == b"old"
