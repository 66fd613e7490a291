"""Several processes: the same training as in one, sharded or not; other numbers of them after an interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining
from tests.test_trainer import make_trainer
from tests.training_helpers import (
    flags,
    launch_processes,
    run,
    run_in_processes,
    subprocess_environment,
    tiny_config,
    write_images,
)
from training_greenmim.runs.arguments import ClassificationTrainingArguments, MIMTrainingArguments


EXAMPLES = Path(__file__).parent.parent / "examples"
GLOBAL_BATCH = 8
# run_mim.py whose processes share the mask of a step, and which notes losses and process numbers.
SHARED_MASK = f"""
import json, os, sys
from pathlib import Path
import run_mim
from training_greenmim.pretraining import trainer as pretraining
from training_greenmim.runs.processes import leave_processes

class SharedMask(pretraining.MaskedCollator):
    def generator(self, sample_key):
        epoch, position = sample_key
        return super().generator((epoch, position // {GLOBAL_BATCH}))

class Recording(pretraining.MIMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        mean = self.accelerator.reduce(loss.detach(), "mean").item()
        with open(Path(sys.argv[1]) / f"losses-{{self.args.process_index}}.jsonl", "a") as file:
            file.write(json.dumps([self.state.global_step, mean]) + "\\n")
        return loss

pretraining.MaskedCollator = SharedMask
run_mim.MIMTrainer = Recording
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
(folder / f"pid-{{os.environ.get('RANK', 0)}}").write_text(str(os.getpid()))
run_mim.main(sys.argv[2:])
leave_processes()
"""


@pytest.fixture
def script(tmp_path) -> Path:
    write_images(tmp_path / "data", 40)
    (tmp_path / "shared.py").write_text(SHARED_MASK)
    return tmp_path / "shared.py"


def arguments(output: Path, num_processes: int, *more) -> list[str]:
    options = ("--train_dir", output.parent / "data", "--do_train", "--max_steps", 20, "--dataloader_num_workers", 0)
    # Biases of keys have no gradient but rounding, which Adam with its usual epsilon would blow up to whole steps.
    batch = ("--per_device_train_batch_size", GLOBAL_BATCH // num_processes, "--adam_epsilon", 1e-3)
    backend = ("--ddp_backend", "gloo") if num_processes > 1 else ()
    return [str(output.parent / f"notes-{output.name}"), *flags(output, *options, *batch, *backend, *more)]


def train(script: Path, name: str, num_processes: int, *more) -> tuple[dict, dict]:
    """Final weights, and the mean loss over processes of each step."""
    output = script.parent / name
    argv = arguments(output, num_processes, *more)
    if num_processes == 1:
        environment = {**subprocess_environment(), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(script), *argv], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        run_in_processes(script, argv, num_processes)
    return load_file(output / "model.safetensors"), losses(script.parent / f"notes-{name}")


def losses(notes: Path) -> dict[int, float]:
    return dict(json.loads(line) for line in (notes / "losses-0.jsonl").read_text().splitlines())


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        value = torch.as_tensor(value)
        error = (torch.as_tensor(actual[name]) - value).abs().max() / value.abs().max().clamp_min(1e-2)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.slow
def test_more_processes_train_as_one_and_take_over_from_another_number(script):
    """20 steps of the same batches and masks; then the second half of a run of two processes in one and in four."""
    by_layer = ("--layer_decay", 0.9)
    weights, expected = train(script, "one", 1, *by_layer)
    assert len(expected) == 20 and len(set(expected.values())) == 20
    saving = ("--save_strategy", "steps", "--save_steps", 10)
    for number, more in ((2, saving), (4, ())):
        found, found_losses = train(script, f"with-{number}", number, *by_layer, *more)
        assert_same(found_losses, expected)
        assert_same(found, weights)
    for number in (1, 4):
        resuming = ("--resume_from_checkpoint", script.parent / "with-2" / "checkpoint-10")
        found, found_losses = train(script, f"resumed-{number}", number, *by_layer, *resuming)
        assert set(found_losses) == set(range(10, 20))
        assert_same(found_losses, {step: loss for step, loss in expected.items() if step >= 10})
        assert_same(found, weights)


@pytest.mark.slow
def test_a_killed_process_ends_the_launch_and_nothing_is_lost(script):
    saving = ("--save_strategy", "steps", "--save_steps", 5)
    expected, _ = train(script, "whole", 2, *saving)
    output = script.parent / "killed"
    argv = arguments(output, 2, *saving, "--max_steps", 20)
    process = launch_processes(script, argv, 2)
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoint-5" / "trainer_state.json").is_file():
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.01)
        os.kill(int((script.parent / "notes-killed" / "pid-1").read_text()), signal.SIGKILL)
        log, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0
    assert "exitcode  : -9" in log and "rank      : 1" in log, log[-3000:]
    assert not (output / "model.safetensors").exists()
    found, _ = train(script, "killed", 2, *saving, "--resume_from_checkpoint", "true")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# run_mim.py as on a GPU, which looks for broken losses at logs and checkpoints; one process's breaks in step 3.
ONE_BROKEN = """
import os, sys
import run_mim
from training_greenmim.runs.processes import leave_processes
from training_greenmim.runs.trainer import NonFiniteLossError

class OneBroken(run_mim.MIMTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waits_to_check = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        if (self.state.global_step, self.args.process_index) == (2, 1):
            loss = loss * float("nan")
            self.check_finite(loss)
        return loss

run_mim.MIMTrainer = OneBroken
try:
    run_mim.main(sys.argv[2:])
except NonFiniteLossError as error:
    with open(f"{sys.argv[1]}-{os.environ['RANK']}", "w") as file:
        file.write(str(error))
leave_processes()
"""


@pytest.mark.slow
def test_a_loss_that_breaks_in_one_process_stops_all_before_anything_is_saved(tmp_path):
    write_images(tmp_path / "data", 16)
    (tmp_path / "broken.py").write_text(ONE_BROKEN)
    options = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 6, "--ddp_backend", "gloo")
    argv = flags(tmp_path / "out", *options, "--logging_steps", 50, "--save_strategy", "steps", "--save_steps", 1)
    run_in_processes(tmp_path / "broken.py", [str(tmp_path / "message"), *argv])
    expected = f"not a finite number at step 3. Last good checkpoint: {tmp_path / 'out' / 'checkpoint-2'}."
    assert all(expected in (tmp_path / f"message-{rank}").read_text() for rank in range(2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


# What the first process alone does, and fails at: with an error of Python's, and one that cannot travel as it is.
FIRST_FAILS = """
import os, sys
from transformers import TrainingArguments
from training_greenmim.runs.processes import leave_processes, on_main_process

class Stubborn(Exception):
    def __init__(self, message, cause):
        super().__init__(message)

def fail(error):
    raise error

args = TrainingArguments(sys.argv[1], use_cpu=True, ddp_backend="gloo", report_to="none")
for name, error in (("key", KeyError("place")), ("stubborn", Stubborn("It broke.", None))):
    try:
        on_main_process(args, lambda: fail(error))
    except Exception as raised:
        with open(f"{sys.argv[1]}-{name}-{os.environ['RANK']}", "w") as file:
            file.write(repr(raised))
assert on_main_process(args, lambda: args.process_index) == 0
leave_processes()
"""


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all(tmp_path):
    (tmp_path / "fails.py").write_text(FIRST_FAILS)
    run_in_processes(tmp_path / "fails.py", [str(tmp_path / "out")])
    raised = {path.name: path.read_text() for path in tmp_path.glob("out-*")}
    assert raised == {
        "out-key-0": "KeyError('place')",
        "out-key-1": "KeyError('place')",
        "out-stubborn-0": "Stubborn('It broke.')",
        "out-stubborn-1": "RuntimeError('The first process ended with Stubborn: It broke.')",
    }


# Examples


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_accelerates(path):
    """What accelerate makes of them is what they say."""
    command = launch_command_parser().parse_args(["--config_file", str(path), "run_mim.py"])
    used, _, _ = _validate_launch_command(command)
    text = path.read_text()
    given = yaml.safe_load(text)
    for name, value in {**given.pop("fsdp_config", {}), **given}.items():
        if name == "distributed_type":
            assert {"MULTI_GPU": used.multi_gpu, "FSDP": used.use_fsdp, "NO": not used.multi_gpu}[value]
        elif name != "compute_environment":
            assert str(getattr(used, name)) == str(value), name
    assert used.num_processes == {"one_gpu": 1, "eight_gpus": 8, "multi_node": 32, "fsdp": 8, "cpu": 2}[path.stem]
    assert f"accelerate launch --config_file examples/accelerate/{path.name}" in text
    if path.stem == "fsdp":
        wrapped = set(used.fsdp_transformer_layer_cls_to_wrap.split(","))
        for model_class in (GreenMIMForPreTraining, GreenMIMForImageClassification):
            assert wrapped <= {type(module).__name__ for module in model_class(tiny_config()).modules()}


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_slurm_scripts_name_what_there_is(name):
    path = EXAMPLES / "slurm" / f"{name}.sbatch"
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    (config,) = re.findall(r"--config_file (\S+)", text)
    assert (EXAMPLES.parent / config).is_file()
    script, command = re.search(r"\n\s+(run_\w+\.py)(.*)", text, flags=re.DOTALL).groups()
    module = {"run_mim.py": run_mim, "run_image_classification.py": run_image_classification}[script]
    kind = MIMTrainingArguments if module is run_mim else ClassificationTrainingArguments
    known = {field.name for part in (module.ModelArguments, module.DataArguments, kind) for field in fields(part)}
    assert set(re.findall(r"--(\w+)", command)) <= known | {"recipe"}


# A sharded model, by torch alone: accelerate falls back to DDP on CPUs.
SHARDED = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import load, save
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from safetensors.torch import save_file
from modeling_greenmim import GreenMIMForPreTraining, plan_mask
from modeling_greenmim.masking import sample_noise, visible_units_from_noise
from tests.training_helpers import leave_at_once, tiny_config
from training_greenmim.runs.trainer import keep_single_precision

folder, last_step, save_to, load_from, precision = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
torch.manual_seed(0)
config = tiny_config()
model = GreenMIMForPreTraining(config)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
    blocks = [block for stage in model.greenmim.encoder.layers for block in stage.blocks]
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        plugin.set_mixed_precision("bf16")
        keep_single_precision(plugin)
        policy = plugin.mixed_precision_policy
    for module in (*blocks, model):
        fully_shard(module, mp_policy=policy)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    shares = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert shares < 0.75 * sum(parameter.numel() for parameter in model.parameters())
# Biases of keys have no gradient but rounding, which the usual epsilon would blow up to whole steps.
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
first_step = 0
if load_from != "-":
    weights, moments = get_state_dict(model, optimizer)
    load({"model": weights, "optimizer": moments}, checkpoint_id=load_from)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    first_step = 10
losses = []
for step in range(first_step, last_step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    visible = visible_units_from_noise(sample_noise(16, generator=generator), 16, 8, 0.75)
    loss = model(images[rank::world], plan=plan_mask(config, visible)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert loss.dtype == torch.float32
    mean = loss.detach() / world
    if world > 1:
        dist.all_reduce(mean)
    losses.append(mean.item())
if save_to != "-":
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments}, checkpoint_id=save_to)
weights = model.state_dict()
weights = {name: tensor.full_tensor() if world > 1 else tensor for name, tensor in weights.items()}
if rank == 0:
    os.makedirs(folder, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder + "/model.safetensors")
    with open(folder + "/losses.json", "w") as file:
        json.dump(dict(enumerate(losses, first_step)), file)
if world > 1:
    leave_at_once()
"""


def train_sharded(
    folder: Path, num_processes: int, steps: int = 20, save_to="-", load_from="-", precision="fp32"
) -> tuple[dict, dict]:
    script = folder.parent / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [str(script), str(folder), str(steps), str(save_to), str(load_from), precision]
    environment = {**subprocess_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "model.safetensors"), json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
def test_sharded_processes_train_as_one_and_take_over_from_another_number(tmp_path):
    """FSDP2: every parameter is a DTensor; its checkpoint of two processes is read by one and by four."""
    weights, expected = train_sharded(tmp_path / "one", 1)
    checkpoint = tmp_path / "checkpoint"
    for number in (2, 4):
        found, found_losses = train_sharded(tmp_path / f"with-{number}", number)
        assert_same(found_losses, expected)
        assert_same(found, weights)
    train_sharded(tmp_path / "half", 2, steps=10, save_to=checkpoint)
    for number in (1, 4):
        found, found_losses = train_sharded(tmp_path / f"resumed-{number}", number, load_from=checkpoint)
        assert_same(found_losses, {step: loss for step, loss in expected.items() if int(step) >= 10})
        assert_same(found, weights)


@pytest.mark.slow
def test_sharded_processes_in_bf16_sum_and_report_in_fp32(tmp_path):
    _, expected = train_sharded(tmp_path / "fp32", 2, steps=5)
    _, found = train_sharded(tmp_path / "bf16", 2, steps=5, precision="bf16")
    assert_same(found, expected, tolerance=0.02)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in found.values())


def test_a_model_in_parts_is_saved_whole_at_the_end(tmp_path, monkeypatch):
    """Its checkpoints are torch.distributed's; accelerate has no FSDP on CPUs, so the trainer is told it had."""
    trainer = make_trainer(tmp_path)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    trainer.save_model(str(tmp_path / "part"), _internal_call=True)
    assert not list((tmp_path / "part").glob("*.safetensors"))
    trainer.save_model(str(tmp_path / "whole"))
    assert GreenMIMForPreTraining.from_pretrained(tmp_path / "whole").config.image_size == 32


def test_masks_do_not_depend_on_the_number_of_workers(tmp_path):
    write_images(tmp_path / "data", 12)
    options = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 5)
    weights = [
        load_file(run(tmp_path / f"{workers}", *options, "--dataloader_num_workers", workers) / "model.safetensors")
        for workers in (0, 2)
    ]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
