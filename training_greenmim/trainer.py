# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for masked image modeling: derived masks, exact resumption, pictures, and a halt at broken losses."""

import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from modeling_greenmim.attention import GreenMIMWindowAttention
from modeling_greenmim.masking import sample_noise

from .data import EpochShuffle, ImageDataset, collate
from .model_card import RunFacts, write_model_card
from .pictures import picture_grid, reconstruct
from .randomness import MASK, MODEL, derived_seed, derived_torch_generator


logger = logging.get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss is not a finite number; the weights were not touched by it."""


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was saved to its end and whose weights are finite numbers."""
    checkpoints = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit() and is_whole_checkpoint(folder):
            checkpoints[int(step)] = folder
    newest_first = (checkpoints[step] for step in sorted(checkpoints, reverse=True))
    return next((str(folder) for folder in newest_first if _has_finite_weights(folder)), None)


def is_whole_checkpoint(folder: str | Path) -> bool:
    """Whether a checkpoint was saved to its end: the trainer's state is written last."""
    try:
        json.loads(Path(folder, "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _has_finite_weights(folder: Path) -> bool:
    # A run may save after its weights broke and before a loss could tell.
    try:
        weights = [weight for file in folder.glob("*.safetensors") for weight in load_file(file).values()]
    except SafetensorError:
        return False
    return all(weight.isfinite().all() for weight in weights)


def no_decay_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: 1-D parameters, position bias tables and tokens."""
    tables = {
        f"{name}.relative_position_bias_table"
        for name, module in model.named_modules()
        if isinstance(module, GreenMIMWindowAttention)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name in tables or name.endswith("mask_token")
    }


class _EpochCallback(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it in a resumed run of several processes."""

    def __init__(self, sampler: EpochShuffle):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class _ThroughputCallback(TrainerCallback):
    """Measures seconds and steps of training, leaving out evaluation and saving."""

    def __init__(self):
        self.steps, self.seconds, self.last = 0, 0.0, None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self.last
        self.last = now

    def on_evaluate(self, args, state, control, **kwargs):
        self.last = None

    def on_save(self, args, state, control, **kwargs):
        self.last = None

    def steps_per_second(self) -> float | None:
        """Since it was last asked."""
        rate = self.steps / self.seconds if self.seconds else None
        self.steps, self.seconds = 0, 0.0
        return rate


class MIMTrainer(Trainer):
    """Trains `GreenMIMForPreTraining` on uint8 images that are normalised on the device.

    Masks are derived from (seed, step, micro-batch, process) and order and augmentation from (seed, epoch, sample), so
    that a run that was killed and resumed goes on exactly as if it had not been.

    Args:
        image_processor: its mean and standard deviation normalise images; it is saved beside the model.
        facts: what the model card tells of the run; None = no card.
        kwargs: those of `Trainer`.
    """

    def __init__(self, *args, image_processor, facts: RunFacts | None = None, **kwargs):
        self.facts = facts
        self.last_picture: str | None = None
        super().__init__(*args, data_collator=collate, processing_class=image_processor, **kwargs)
        # On the device once, not in every step.
        statistics = torch.tensor([image_processor.image_mean, image_processor.image_std], device=self.args.device)
        self.image_mean, self.image_std = statistics[..., None, None]
        rows, columns = self.model.config.unit_grid
        self.num_units = rows * columns
        self.unreadable: set[str] = set()
        self.throughput = _ThroughputCallback()
        self.add_callback(self.throughput)
        self._micro_batch_of_step = (-1, 0)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, ImageDataset):
            return None
        sampler = EpochShuffle(len(dataset), self.args.seed)
        self.add_callback(_EpochCallback(sampler))
        return sampler

    def get_decay_parameter_names(self, model) -> list[str]:
        """Names of the parameters that are decayed."""
        kept = no_decay_parameters(model)
        return [name for name, _ in model.named_parameters() if name not in kept]

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """uint8 images -> normalised float images, on their device."""
        return (pixel_values / 255 - self.image_mean) / self.image_std

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A micro-batch, with every random draw of the model derived from where the run stands."""
        step, micro_batch = self._micro_batch_of_step
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._micro_batch_of_step = (self.state.global_step, micro_batch)
        torch.manual_seed(derived_seed(self.args.seed, MODEL, *self._place()))
        return super().training_step(model, inputs, num_items_in_batch)

    def _place(self) -> tuple[int, int, int]:
        return (*self._micro_batch_of_step, self.args.process_index)

    def training_noise(self, batch_size: int) -> torch.Tensor:
        """Noise of the mask(s) of the current micro-batch of this process, `(1 or batch_size, num_units)`."""
        generator = derived_torch_generator(self.args.seed, MASK, *self._place())
        return sample_noise(self.num_units, batch_size if self.args.mask_per_sample else 1, generator)

    def evaluation_noise(self) -> torch.Tensor:
        """Noise of the one mask that every evaluation uses, `(1, num_units)`."""
        return sample_noise(self.num_units, generator=derived_torch_generator(self.args.seed, MASK))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch of uint8 images; in training it stops at a loss that is not finite."""
        self._report_unreadable(inputs["unreadable"])
        pixel_values = self.normalize(inputs["pixel_values"])
        noise = self.training_noise(len(pixel_values)) if model.training else self.evaluation_noise()
        outputs = model(pixel_values=pixel_values, noise=noise)
        if model.training and self.args.stop_on_nonfinite_loss and not torch.isfinite(outputs.loss):
            last = last_checkpoint(self.args.output_dir)
            raise NonFiniteLossError(
                f"The loss is {outputs.loss.item()} at step {self.state.global_step + 1}. Last good checkpoint:"
                f" {last or 'none was saved yet'}. A lower base_learning_rate or a longer warm-up helps;"
                " --stop_on_nonfinite_loss false goes on regardless."
            )
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _report_unreadable(self, messages: list[str]) -> None:
        for message in messages:
            if message not in self.unreadable:
                self.unreadable.add(message)
                logger.warning(f"Skipped an unreadable image ({len(self.unreadable)} so far): {message}")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of an evaluation batch; predictions are not kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(self, *args, **kwargs):
        """Evaluates on the fixed mask, then draws what the model reconstructs."""
        metrics = super().evaluate(*args, **kwargs)
        self.last_picture = self.save_reconstructions()
        return metrics

    def save_reconstructions(self) -> str | None:
        """Writes a picture of originals, masked inputs and reconstructions, and sends it to TensorBoard.

        Returns:
            Name of the PNG file; None where there is nothing to draw, or on other processes than the first.
        """
        if self.eval_dataset is None or self.args.num_pictures == 0:
            return None
        samples = list(itertools.islice(self.eval_dataset, self.args.num_pictures))
        pixel_values = self.normalize(collate(samples)["pixel_values"].to(self.args.device))
        # Every process takes part: a sharded model computes on all of them.
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model_wrapped(pixel_values=pixel_values, noise=self.evaluation_noise())
        if not self.is_world_process_zero():
            return None
        model = self.accelerator.unwrap_model(self.model_wrapped)
        masked, reconstruction = reconstruct(model, pixel_values, outputs.logits, outputs.mask)
        mean, std = self.image_mean.flatten().tolist(), self.image_std.flatten().tolist()
        picture = picture_grid([pixel_values, masked, reconstruction], mean, std)
        path = os.path.join(self.args.output_dir, "reconstructions", f"step-{self.state.global_step:06d}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture.save(path)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(picture.convert("RGB"))
                callback.tb_writer.add_image("reconstructions", pixels, self.state.global_step, dataformats="HWC")
        return path

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds images per second of training and the number of unreadable images."""
        if "loss" in logs:
            rate = self.throughput.steps_per_second()
            if rate is not None:
                logs["images_per_second"] = round(rate * self.args.total_batch_size, 1)
        if self.args.world_size > 1:
            self.unreadable = set(gather_object(sorted(self.unreadable)))
        if self.unreadable:
            logs["unreadable_images"] = len(self.unreadable)
        super().log(logs, start_time)

    def create_model_card(self, **kwargs) -> None:
        """Writes README.md with its pictures; called by `push_to_hub` too."""
        if self.facts is not None and self.is_world_process_zero():
            write_model_card(self, self.facts)
