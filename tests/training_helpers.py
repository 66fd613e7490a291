"""What the tests of training share: tiny images, tiny models, runs of the scripts."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMConfig, GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor


ROOT = Path(__file__).parent.parent
OVERRIDES = (
    "image_size=32,patch_size=4,embed_dim=8,depths=[2,2],num_heads=[1,2],window_size=4,decoder_hidden_size=16,"
    "decoder_num_attention_heads=2,decoder_intermediate_size=32"
)

# Training arguments of a few quiet steps on the CPU.
SHORT_RUN = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "max_steps": 4,
}


def tiny_config(**changes) -> GreenMIMConfig:
    """Configuration of 32x32 px and 16 units of 8x8 px, the one that `OVERRIDES` give."""
    values = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window_size": 4,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    return GreenMIMConfig(**{**values, **changes})


def noise_image(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    """Random colours in blocks of 8x8 px."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])


def smooth_image(height: int, width: int) -> Image.Image:
    """Slow waves whose phase tells the place, different in each channel."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(rows / height * 7 + columns / width * 3),
        np.cos(columns / width * 8),
        np.sin(rows / height * 9 - columns / width * 4),
    ]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(folder: Path, count: int, first_seed: int = 0) -> list[str]:
    """Writes `count` random PNG files and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03}.png" for index in range(count)]
    for index, path in enumerate(paths):
        noise_image(first_seed + index).save(path)
    return [str(path) for path in paths]


def coloured_image(seed: int, channel: int, height: int = 40, width: int = 48) -> Image.Image:
    """Dark noise with more of one colour."""
    pixels = np.asarray(noise_image(seed, height, width)) // 3
    pixels[..., channel] += 100
    return Image.fromarray(pixels)


def write_class_folders(folder: Path, counts: dict[str, int], first_seed: int = 0) -> Path:
    """Writes PNG files of a colour for each class, those called red, green and blue their own, into sub-folders."""
    for number, (name, count) in enumerate(counts.items()):
        channel = {"red": 0, "green": 1, "blue": 2}.get(name, number % 3)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            coloured_image(first_seed + 1000 * number + index, channel).save(folder / name / f"{index:03}.png")
    return folder


def write_pretrained(folder: Path, **changes) -> Path:
    """Saves a tiny pre-training model with its image processor; the norms are not what they start as."""
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    return folder


def write_broken(path: Path) -> str:
    """Writes a PNG file that ends in its middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(noise_image(99))
    path.write_bytes(content[: len(content) // 2])
    return str(path)


def write_webdataset(folder: Path, contents: list[bytes], shards: int = 2, split: str = "train") -> Path:
    """Writes tar files of images and labels, the images dealt out in turn, and returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{split}-{shard}.tar", "w") as archive:
            for index, content in enumerate(contents[shard::shards]):
                for name, part in ((f"{shard}-{index}.png", content), (f"{shard}-{index}.cls", b"0")):
                    member = tarfile.TarInfo(name)
                    member.size = len(part)
                    archive.addfile(member, BytesIO(part))
    return folder


def flags(output: Path, *more, overrides: str = OVERRIDES) -> list[str]:
    """Arguments of a tiny, silent run on the CPU; `more` wins."""
    values = ["--output_dir", output, "--config_overrides", overrides, "--per_device_train_batch_size", 4]
    values += ["--per_device_eval_batch_size", 4, "--dataloader_num_workers", 0, "--use_cpu", "true"]
    values += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", 1]
    values += ["--base_learning_rate", 0.1]
    return [str(value) for value in (*values, *more)]


def run(output: Path, *more, overrides: str = OVERRIDES) -> Path:
    """Runs the script in this process and returns its output folder."""
    run_mim.main(flags(output, *more, overrides=overrides))
    return output


def classification_flags(output: Path, *more) -> list[str]:
    """Arguments of a silent classification on the CPU; `more` wins."""
    values = ["--output_dir", output, "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4]
    values += ["--dataloader_num_workers", 0, "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    values += ["--save_strategy", "no", "--logging_steps", 1]
    return [str(value) for value in (*values, *more)]


def classify(output: Path, *more) -> Path:
    """Runs the classification script in this process and returns its output folder."""
    run_image_classification.main(classification_flags(output, *more))
    return output


def predictions_of(output: Path) -> list[dict[str, str]]:
    """Lines of the predictions that a run wrote."""
    with open(output / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def results_of(output: Path) -> dict:
    """The results of a run."""
    return json.loads((output / "all_results.json").read_text())


def state_of(output: Path) -> dict:
    """The trainer's state at the end of a run."""
    return json.loads((output / "trainer_state.json").read_text())


def subprocess_environment() -> dict[str, str]:
    """Environment of a process that imports this repository, with the threads of this process."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }


def start(argv: list[str], script: str = "run_mim.py") -> subprocess.Popen:
    """Starts a script in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *argv],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a saved model."""
    return load_file(str(folder / "model.safetensors"))


def assert_same_weights(first: Path, second: Path) -> None:
    """Every tensor of two saved models is equal, bit for bit."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, such as {different[0]}"


def kill_after_checkpoint(process: subprocess.Popen, checkpoint: Path) -> None:
    """Sends SIGKILL to a run and its workers as soon as a checkpoint is whole."""
    deadline = time.monotonic() + 120
    try:
        while not (checkpoint / "trainer_state.json").is_file():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def launch_processes(script: Path, argv: list[str], num_processes: int) -> subprocess.Popen:
    """Starts a script in processes of one thread each, which talk by gloo."""
    # With --cpu, accelerate starts a single process; --multi_gpu is its way to start several, on CPUs too.
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(num_processes),
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.Popen(
        [*command, str(script), *argv],
        env={**subprocess_environment(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_in_processes(script: Path, argv: list[str], num_processes: int = 2) -> None:
    """Runs a script in processes of one thread each, which talk by gloo, and waits for them."""
    process = launch_processes(script, argv, num_processes)
    try:
        log, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, log[-6000:]


def leave_at_once() -> None:
    """Ends one of several processes: meshes and wrapped models keep connections, whose threads abort an ordinary end.

    Such a thread may want Python when that is gone (https://github.com/pytorch/pytorch/pull/179291).
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def messages(caplog, level: int = logging.WARNING) -> str:
    """The text of all log records of at least a level."""
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= level)
