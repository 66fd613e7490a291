# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The README.md of a pre-trained model: data, recipe, results, pictures and the command."""

import os
import shutil
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from .pictures import loss_curve


TEMPLATE = """---
{metadata}
---

# {title}

A Swin transformer pre-trained with [GreenMIM](https://huggingface.co/papers/2205.13515): {mask_percent} % of each
image is hidden in units of {unit}x{unit} px, the encoder runs on the visible units only, and a small decoder predicts
the pixels of the hidden ones. It holds encoder and decoder; the encoder is what later tasks start from.

## Use

```python
import modeling_greenmim  # registers the model with the Auto classes
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{location}")
model = AutoModel.from_pretrained("{location}")
```

The model was not trained to classify anything. What it learned comes from the images below alone; on other kinds of
images it may be of no use.

## Data

{data}

## Recipe

| | |
| --- | --- |
{recipe}

```
{command}
```

## Results

| | |
| --- | --- |
{results}

![Loss over steps](loss_curve.png)

{pictures}

## Citation

```bibtex
@inproceedings{{huang2022green,
  title = {{Green Hierarchical Vision Transformer for Masked Image Modeling}},
  author = {{Huang, Lang and You, Shan and Zheng, Mingkai and Wang, Fei and Qian, Chen and Yamasaki, Toshihiko}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year = {{2022}}
}}
```
"""


def _table(rows: dict) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _recipe(trainer) -> dict:
    args, config = trainer.args, trainer.model.config
    height, width = config.image_height_and_width
    return {
        "encoder": f"embed_dim {config.embed_dim}, depths {config.depths}, heads {config.num_heads},"
        f" window {config.window_size}",
        "image size": f"{height}x{width} px, patches of {config.patch_size} px",
        "masks": f"ratio {config.mask_ratio}, one per {'image' if args.mask_per_sample else 'step and process'}",
        "target": "pixels normalised per unit" if config.norm_pix_loss else "pixels",
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "batch": args.total_batch_size,
        "optimizer": f"AdamW, betas {args.adam_beta1}/{args.adam_beta2}, weight decay {args.weight_decay}",
        "learning rate": f"{args.learning_rate:.3g}, {args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
    }


def _results(log_history: list[dict]) -> dict:
    """The last numbers of training and of evaluation."""
    results = {}
    for name in ("train_loss", "eval_loss"):
        entries = [entry for entry in log_history if name in entry]
        results |= entries[-1] if entries else {}
    return {name: f"{value:.5g}" for name, value in results.items() if name not in ("step", "epoch", "total_flos")}


@dataclass
class RunFacts:
    """What a trainer does not know of its run.

    Attributes:
        command: what started it.
        data: a sentence on the images.
        license_name: the Hub's name of the licence that the data asks for, if known.
    """

    command: str
    data: str
    license_name: str | None = None


def write_model_card(trainer, facts: RunFacts) -> None:
    """Writes README.md, the loss curve and the last reconstruction picture into the output folder of a trainer."""
    folder, config = trainer.args.output_dir, trainer.model.config
    loss_curve(trainer.state.log_history).savefig(os.path.join(folder, "loss_curve.png"), dpi=120)
    pictures = ""
    if trainer.last_picture:
        shutil.copy(trainer.last_picture, os.path.join(folder, "reconstruction.png"))
        pictures = (
            "Images that were not trained on: original, masked input, reconstruction (visible units pasted in, hidden"
            " ones scaled back by their own mean and variance).\n\n![Reconstructions](reconstruction.png)"
        )
    location = trainer.args.hub_model_id or folder
    metadata = ModelCardData(
        license=facts.license_name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["greenmim", "swin", "masked-image-modeling"],
    )
    unreadable = f" {len(trainer.unreadable)} of them could not be read." if trainer.unreadable else ""
    content = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=os.path.basename(os.path.normpath(location)),
        mask_percent=f"{100 * config.mask_ratio:g}",
        unit=config.encoder_stride,
        location=location,
        data=facts.data + unreadable,
        recipe=_table(_recipe(trainer)),
        command=facts.command,
        results=_table(_results(trainer.state.log_history)),
        pictures=pictures,
    )
    ModelCard(content).save(os.path.join(folder, "README.md"))
