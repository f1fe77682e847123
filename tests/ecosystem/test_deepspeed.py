"""DeepSpeed on two CPU processes: ZeRO-2 and ZeRO-3 train to the losses of one process alone, save and load.

DeepSpeed's first run on a CPU compiles the exchange between processes, for which it needs a C++ compiler. What it has
compiled stays in torch's cache of extensions.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed_run import make_rows

from transnormer_hf import TransNormerForCausalLM

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.cell("DeepSpeed"),
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="DeepSpeed needs a C++ compiler"),
]

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(__file__).with_name("deepspeed_run.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def losses_of(output_dir, *command):
    """The losses of 20 steps, and that of the saved model on all rows."""
    result = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    rows, model = make_rows(), TransNormerForCausalLM.from_pretrained(output_dir).eval()
    with torch.no_grad():
        return [*json.loads(Path(f"{output_dir}.json").read_text()), model(rows, labels=rows).loss.item()]


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("alone") / "out"
    return losses_of(output_dir, PROGRAM, str(output_dir))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_to_the_losses_of_one_and_what_they_save_loads(
    stage, losses_of_one_process, tmp_path, record_property
):
    config = yaml.safe_load((ROOT / "scripts" / "accelerate" / f"deepspeed_zero{stage}.yaml").read_text())
    given = config["deepspeed_config"]
    zero = {"stage": given["zero_stage"]}
    if given.get("zero3_save_16bit_model"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    settings = {"zero_optimization": zero, "gradient_clipping": given["gradient_clipping"]}
    settings |= dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    losses = losses_of(tmp_path / "out", *launch, PROGRAM, str(tmp_path / "out"), json.dumps(settings))
    assert len(losses) == 21
    assert losses == pytest.approx(losses_of_one_process, abs=1e-5)
    difference = max(abs(a - b) for a, b in zip(losses, losses_of_one_process, strict=True))
    record_property("measured", f"ZeRO-{stage}: losses within {difference:.0e}")
