"""Training on several processes: DDP and FSDP2 give the loss curve of one process, and killed runs lose nothing."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, merge_fsdp_weights
from accelerate.utils.launch import prepare_multi_gpu_env
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import BertTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM
from transnormer_hf.model.modeling_transnormer import TransNormerAttention, TransNormerLRPE
from transnormer_hf.training.checkpoints import is_whole_checkpoint, last_whole_checkpoint
from transnormer_hf.training.fine_tuning import CardTrainer, TrainingClock

CONFIGS = Path(__file__).parents[2] / "scripts" / "accelerate"
STEPS, GLOBAL_BATCH = 20, 8
KILLED_STEPS, SAVE_STEPS = 10, 4  # of the runs that are killed
TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 8}

needs_fsdp2 = pytest.mark.skipif(
    "fsdp_version" not in FullyShardedDataParallelPlugin.__dataclass_fields__,
    reason="this accelerate is older than FSDP2 in it (1.6)",
)

can_resume_on_cpus = pytest.mark.skipif(
    "map_location = self.args.device if" in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason='this transformers loads an optimizer to "cpu:0" on several CPU processes, which torch does not know',
)


# ---- One run ----


def rows() -> list[dict[str, torch.Tensor]]:
    """48 rows of 20 tokens, each the one before it plus a step of the row's own."""
    first, step = torch.arange(48)[:, None], torch.arange(48)[:, None] % 5 + 1
    tokens = 3 + (first + step * torch.arange(20)) % 29
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(
    folder: Path, variant: str, steps: int, save_steps: int, dropout: float, callbacks: list[TrainerCallback]
) -> CardTrainer:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=save_steps,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if args.device and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate has FSDP for accelerators only; torch has it for the CPU as well, and all else is the same
        args.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    set_seed(0)
    config = TransNormerConfig(
        **TINY, variant=variant, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return CardTrainer(TransNormerForCausalLM(config), args, train_dataset=rows(), callbacks=callbacks)


def train(
    folder: Path, variant: str, steps: int = STEPS, save_steps: int = STEPS, dropout: float = 0.0, killer: Any = None
) -> dict[str, Any]:
    """Train, from the last whole checkpoint in the folder on; the losses, what kind of model it was, and its logits."""
    trainer = make_trainer(folder, variant, steps, save_steps, dropout, [killer] if killer is not None else [])
    checkpoint = last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    batch = torch.stack([row["input_ids"] for row in rows()[:GLOBAL_BATCH]])
    with torch.no_grad():
        logits = trainer.model_wrapped.eval()(input_ids=batch, use_cache=False).logits
    trainer.save_model()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "resumed": None if checkpoint is None else checkpoint.name,
        "logits": logits,
        "engine": [parent.__name__ for parent in type(trainer.model_wrapped).__mro__],
        "local_parameters": sum(
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
            for parameter in trainer.model_wrapped.parameters()
        ),
    }


@cache
def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file scripts/accelerate/NAME` sets for its processes."""
    argv = ["--config_file", str(CONFIGS / name), "--num_processes", "2", "--mixed_precision", "no"]
    args = launch_command_parser().parse_args([*argv, "--main_process_port", "0", "script.py"])
    env = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {key: value for key, value in env.items() if os.environ.get(key) != value}


ENGINES = [
    pytest.param("ddp.yaml", "t1", "DistributedDataParallel", id="ddp"),
    pytest.param("fsdp2.yaml", "t2", "FSDPModule", id="fsdp2", marks=needs_fsdp2),
]


# ---- The curve ----


@pytest.mark.parametrize(("config", "variant", "engine"), ENGINES)
def test_two_processes_give_the_losses_and_the_model_of_one(tmp_path, config, variant, engine):
    alone = train(tmp_path / "alone", variant)
    assert alone["losses"][-1] < alone["losses"][0] - 0.5  # it learns, so that a difference would grow
    ranks = run_ranks(train, 2, tmp_path / "ranks", variant, env=environment_of(config))
    for rank in ranks:
        assert engine in rank["engine"]
        assert len(rank["losses"]) == STEPS
        torch.testing.assert_close(rank["losses"], alone["losses"], atol=1e-4, rtol=0)
        torch.testing.assert_close(rank["logits"], alone["logits"], atol=1e-3, rtol=1e-3)

    whole = TransNormerForCausalLM.from_pretrained(tmp_path / "ranks")
    batch = torch.stack([row["input_ids"] for row in rows()[:GLOBAL_BATCH]])
    with torch.no_grad():
        logits = whole.eval()(input_ids=batch, use_cache=False).logits
    torch.testing.assert_close(logits, ranks[0]["logits"], atol=1e-6, rtol=1e-5)
    if engine == "FSDPModule":
        sizes = [rank["local_parameters"] for rank in ranks]
        assert max(sizes) < 0.7 * whole.num_parameters()
        check_sharded_checkpoint(tmp_path, whole)


def dtypes_in_training(folder: Path) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of LRPE's theta and of the queries."""
    thetas, queries = set(), set()
    trainer = make_trainer(folder, "t2", 1, 1, 0.0, [])
    for module in trainer.model.modules():
        if isinstance(module, TransNormerLRPE):
            module.register_forward_hook(lambda module, inputs, lrpe: thetas.add(lrpe.theta.dtype))
        if isinstance(module, TransNormerAttention):
            module.q_proj.register_forward_hook(lambda module, inputs, query: queries.add(query.dtype))
    trainer.train()
    return thetas, queries


@needs_fsdp2
def test_fsdp_in_bfloat16_computes_in_it_and_does_not_round_the_angles(tmp_path):
    env = environment_of("fsdp2.yaml") | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for thetas, queries in run_ranks(dtypes_in_training, 2, tmp_path, env=env):
        assert (thetas, queries) == ({torch.float32}, {torch.bfloat16})


def check_sharded_checkpoint(tmp_path: Path, whole: TransNormerForCausalLM) -> None:
    """The parts of the last checkpoint, merged as `accelerate merge-weights` does, are the model at the end."""
    parts = tmp_path / "ranks" / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0"
    assert {"__0_0.distcp", "__1_0.distcp"} <= {path.name for path in parts.iterdir()}
    assert not (parts.parent / "model.safetensors").exists()
    merge_fsdp_weights(str(parts), str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    weights = whole.state_dict()
    assert set(merged) <= set(weights)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, weights[name], atol=0, rtol=0)


# ---- Killed runs ----


class Killer(TrainerCallback):
    """SIGKILL between gradients and update of a step; or, in the main process, half-way through a checkpoint's file."""

    def __init__(self, step: int, file: str | None = None):
        self.step, self.file = step, file

    def on_train_begin(self, args, state, control, **kwargs):
        if self.file is not None:
            torch.save = partial(self.save, torch.save, f"checkpoint-{self.step}/{self.file}")

    @staticmethod
    def save(save, fatal, content, file, *args, **kwargs):
        save(content, file, *args, **kwargs)
        if str(file).endswith(fatal):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.file is None and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("config", "variant", "file"),
    [
        pytest.param("ddp.yaml", "t1", "optimizer.pt", id="ddp", marks=can_resume_on_cpus),
        pytest.param("fsdp2.yaml", "t2", "scheduler.pt", id="fsdp2", marks=[needs_fsdp2, pytest.mark.slow]),
    ],
)
def test_a_run_killed_in_training_and_while_saving_ends_with_the_same_losses(tmp_path, config, variant, file):
    run = partial(run_ranks, train, 2, env=environment_of(config))
    options = (variant, KILLED_STEPS, SAVE_STEPS, 0.1)
    undisturbed = run(tmp_path / "undisturbed", *options)[0]
    assert undisturbed["resumed"] is None

    folder = tmp_path / "killed"
    run(folder, *options, Killer(SAVE_STEPS + 2), killed=True)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]

    run(folder, *options, Killer(2 * SAVE_STEPS, file), killed=True)
    assert (folder / "checkpoint-8" / file).is_file()
    assert last_whole_checkpoint(folder) == folder / "checkpoint-4"

    resumed = run(folder, *options)[0]
    assert resumed["resumed"] == "checkpoint-4"
    assert len(resumed["losses"]) == KILLED_STEPS
    assert resumed["losses"] == pytest.approx(undisturbed["losses"], abs=1e-6)
    torch.testing.assert_close(resumed["logits"], undisturbed["logits"], atol=1e-5, rtol=1e-5)
    assert is_whole_checkpoint(folder / "checkpoint-8")  # written anew


def save_with_a_slow_rank(folder: Path) -> bool:
    """Whether the mark of a whole checkpoint was there before the last rank had written its part."""
    trainer = make_trainer(folder, "t1", 1, 1, 0.0, [])
    seen = []
    if dist.get_rank() == 1:
        save = torch.save

        def save_late(content, file, *args, **kwargs):
            time.sleep(1)
            seen.append((folder / "checkpoint-1" / "trainer_state.json").exists())
            save(content, file, *args, **kwargs)

        torch.save = save_late
    trainer.train()
    assert (folder / "checkpoint-1" / "trainer_state.json").exists()
    return any(seen)


def test_a_checkpoint_is_not_marked_whole_before_all_ranks_have_written(tmp_path):
    assert run_ranks(save_with_a_slow_rank, 2, tmp_path / "out", env=environment_of("ddp.yaml")) == [False, False]


def train_by_clocks(folder: Path, minutes: list[float]) -> int:
    """The last step of a run in which each rank has a time limit of its own."""
    clock = TrainingClock(minutes[dist.get_rank()])
    trainer = make_trainer(folder, "t1", KILLED_STEPS, KILLED_STEPS, 0.0, [clock])
    trainer.train()
    return trainer.state.global_step


def test_all_ranks_stop_after_the_same_step_when_the_time_of_one_is_over(tmp_path):
    assert run_ranks(train_by_clocks, 2, tmp_path / "out", [1000.0, 1e-9], env=environment_of("ddp.yaml")) == [1, 1]


# ---- The configuration files ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp.yaml", "MULTI_GPU"),
        ("fsdp2.yaml", "FSDP"),
        ("deepspeed_zero2.yaml", "DEEPSPEED"),
        ("deepspeed_zero3.yaml", "DEEPSPEED"),
    ],
)
def test_accelerate_reads_the_configuration_and_knows_every_field(name, kind):
    path = CONFIGS / name
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.mixed_precision) == (kind, "bf16")
    assert f"accelerate launch --config_file scripts/accelerate/{name} --num_processes 4 scripts/" in path.read_text()
    # a field that the launcher does not know would be set and never looked at
    known = vars(launch_command_parser().parse_args(["script.py"]))
    fields = {**config.fsdp_config, **config.deepspeed_config}
    if name == "fsdp2.yaml" and "fsdp_version" not in known:
        pytest.skip("this accelerate is older than FSDP2 in it (1.6)")
    assert set(fields) <= set(known)
    assert set(yaml.safe_load(path.read_text())) <= {*vars(config), "distributed_type"}


def test_the_two_stages_of_deepspeed_are_told_apart():
    stages = {
        name: load_config_from_file(str(CONFIGS / name)).deepspeed_config["zero_stage"]
        for name in ("deepspeed_zero2.yaml", "deepspeed_zero3.yaml")
    }
    assert stages == {"deepspeed_zero2.yaml": 2, "deepspeed_zero3.yaml": 3}


@pytest.mark.slow
def test_accelerate_launch_trains_a_script_on_two_processes(tmp_path):
    """The command of ddp.yaml, on the CPU: the losses of run_glue.py are those of one process."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    lines = [f"{['bad', 'good'][number % 2]} film\t{number % 2}" for number in range(32)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "transnormer_hf", **TINY, "hidden_dropout_prob": 0.0, "classifier_dropout": 0.0})
    )
    scripts = CONFIGS.parent
    options = f"--task_name sst2 --train_file {tmp_path}/train.tsv --config_name {tmp_path}/config.json"
    options += f" --tokenizer_name {tmp_path}/tokenizer --do_train --use_cpu --max_steps 4 --logging_steps 1"
    options += " --learning_rate 1e-2 --report_to none"
    launch = f"-m accelerate.commands.launch --config_file {CONFIGS}/ddp.yaml --num_processes 2 --mixed_precision no"
    losses = {}
    for name, start, batch in (("alone", "", 8), ("launched", f"{launch} --main_process_port 0", 4)):
        command = f"{start} {scripts}/run_glue.py {options} --per_device_train_batch_size {batch}"
        argv = [sys.executable, *command.split(), "--output_dir", str(tmp_path / name)]
        subprocess.run(argv, check=True, timeout=250, capture_output=True, text=True)
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses["alone"]) == 4
    assert losses["launched"] == pytest.approx(losses["alone"], abs=1e-4)
