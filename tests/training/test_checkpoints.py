"""Which checkpoints count as whole."""

import pytest
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from transnormer_hf.training.checkpoints import is_whole_checkpoint, last_whole_checkpoint


def write_checkpoint(folder):
    (folder / "model_fsdp_0").mkdir(parents=True)
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "model_fsdp_0/__0_0.distcp"):
        torch.save({"state": torch.arange(6.0)}, folder / name)
    (folder / "model_fsdp_0" / ".metadata").write_bytes(b"index")
    (folder / "trainer_state.json").write_text('{"global_step": 5}\n')
    return folder


def test_the_last_whole_checkpoint_is_found_by_its_number(tmp_path):
    for step in (5, 20, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    write_checkpoint(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")  # what transformers would take
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state_1.pth"])
def test_a_checkpoint_with_a_file_cut_off_is_not_whole(tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    assert is_whole_checkpoint(folder)
    content = (folder / name).read_bytes()
    for size in (len(content) - 3, len(content) // 2, 0):
        (folder / name).write_bytes(content[:size])
        assert not is_whole_checkpoint(folder), f"{name} of {size} bytes"


def test_a_sharded_checkpoint_without_its_index_is_not_whole(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    (folder / "model_fsdp_0" / ".metadata").unlink()
    assert not is_whole_checkpoint(folder)
