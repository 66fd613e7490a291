# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the trainers of dense tasks share: names of classes, colour jitter, pixels to look at."""

from pathlib import Path

import numpy as np
import torch

from ..pretraining.pictures import drawn_channels
from ..runs.extras import require
from ..runs.trainer import ImageTrainer


PICTURE = "predictions.png"


class DenseTrainer(ImageTrainer):
    """`ImageTrainer` for models with a head on a backbone.

    Attributes:
        names: of the classes, by their numbers.
        augmentation: what training images, as bytes or values, become on the device.
        predictions_folder: where predictions of the images that are seen now go; None: nowhere.
        last_picture: file of the picture that was made last.
    """

    # The loss is a mean over a micro-batch, though the models' forward takes any keyword.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        self.names = [config.id2label[number] for number in range(config.num_labels)]
        self.augmentation = self.normalize
        if self.args.color_jitter:
            require("kornia", "augmentation")
            from ..classification.augmentation import BatchAugmentation  # other runs do without kornia

            self.augmentation = BatchAugmentation(None, self.args.color_jitter, 0.0, self.scaling)
        self.predictions_folder: Path | None = None
        self.last_picture: str | None = None

    def pixels_to_look_at(self, image: torch.Tensor) -> np.ndarray:
        """An image as it was read, `(channels, height, width)` -> uint8 `(height, width, 3)`."""
        chosen = drawn_channels(self.args.picture_channels, image.shape[0])
        pixels = (self.scaling.unit(image[chosen]) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)
