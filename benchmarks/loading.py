"""Images a second of the data loading alone, on one core: ours against that of Transformers' run_mim.py.

    python benchmarks/loading.py

Both read the same JPEG files, of 500x375 px as ImageNet's mostly are, crop and flip them at random and end in 224x224
px with a mask. The peer does what the script does (decode, RandomResizedCrop, flip, float, normalise, MaskGenerator),
with torchvision where it can be imported and else with the same calls of Pillow that torchvision makes. Ours decodes
JPEGs at a reduced size where the crop allows it, and leaves uint8 images that are normalised on the device; its mask
comes with all plans. The files are photographs of ELPV, enlarged, with noise as of a camera, which makes them about as
large as those of ImageNet.
"""

import argparse
import functools
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_greenmim import GreenMIMConfig
from training_greenmim.data.image_dataset import ImageDataset
from training_greenmim.data.images import open_image
from training_greenmim.data.readers import elpv, load_folder
from training_greenmim.data.transforms import TrainTransform
from training_greenmim.pretraining.collator import MaskedCollator


MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> float:
    """Writes JPEG files; returns their mean size in KB."""
    photographs, generator = elpv()[0], np.random.default_rng(0)
    for index in range(count):
        image = open_image(photographs[index]["image"]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image) + generator.normal(0, 10, (image.height, image.width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.jpg", quality=90)
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1000


def peer_transform(size: int):
    """The transforms of Transformers' run_mim.py."""
    try:
        from torchvision import transforms
    except ImportError:
        return lambda image: with_pillow(image, size)
    return transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.RandomResizedCrop(size, scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN.flatten().tolist(), std=STD.flatten().tolist()),
        ]
    )


def with_pillow(image: Image.Image, size: int, scale: tuple[float, float] = (0.67, 1.0)) -> torch.Tensor:
    """The same by the calls of Pillow and torch that torchvision makes."""
    image = image.convert("RGB")
    area = image.width * image.height * random.uniform(*scale)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, round(math.sqrt(area * ratio))), min(image.height, round(math.sqrt(area / ratio)))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(MEAN).div_(STD)


def peer_mask(size: int, unit: int = 32, patch: int = 4, ratio: float = 0.6) -> torch.Tensor:
    """MaskGenerator of Transformers' run_mim.py."""
    side, scale = size // unit, unit // patch
    mask = np.zeros(side**2, dtype=int)
    mask[np.random.permutation(side**2)[: math.ceil(side**2 * ratio)]] = 1
    return torch.tensor(mask.reshape(side, side).repeat(scale, axis=0).repeat(scale, axis=1).flatten())


def load_peer(paths: list[str], transform, size: int, batch_size: int) -> None:
    """One pass in batches."""
    for start in range(0, len(paths), batch_size):
        part = paths[start : start + batch_size]
        torch.stack([transform(Image.open(path)) for path in part])
        torch.stack([peer_mask(size) for _ in part])


def load_ours(dataset: ImageDataset, collator: MaskedCollator, epoch: int, batch_size: int) -> None:
    """One pass in batches, with masks and plans."""
    for start in range(0, len(dataset), batch_size):
        keys = range(start, min(start + batch_size, len(dataset)))
        collator([dataset[epoch, index, index] for index in keys])


def main() -> None:
    """Measures both in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photograph", type=int, nargs=2, default=[500, 375], help="width and height in pixels")
    parser.add_argument("--min_crop_scale", type=float, default=0.2, help="of ours; the script's own is 0.67")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = GreenMIMConfig()
    size, collator = config.image_size, MaskedCollator(config, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_photographs(Path(folder), args.images, tuple(args.photograph))
        paths, transform = sorted(str(path) for path in Path(folder).iterdir()), peer_transform(size)
        records = load_folder(folder, "folder")
        datasets = {
            scale: ImageDataset(records, "image", TrainTransform((size, size), 3, (scale, 1.0)), seed=0)
            for scale in (0.67, args.min_crop_scale)
        }
        seconds: dict[str, list[float]] = {}
        for epoch in range(args.rounds + 1):
            passes = {
                "Transformers' run_mim.py, crops from 0.67": functools.partial(
                    load_peer, paths, transform, size, args.batch_size
                )
            }
            for scale, dataset in datasets.items():
                ours = functools.partial(load_ours, dataset, collator, epoch, args.batch_size)
                passes[f"GreenMIM, crops from {scale}"] = ours
            for name, load in passes.items():
                start = time.perf_counter()
                load()
                if epoch:  # the first round warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    width, height = args.photograph
    print(
        f"| {args.images} JPEG files of {width}x{height} px, {kilobytes:.0f} KB on average | images/s on one core | |"
    )
    print("| --- | --- | --- |")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peer = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"| {name} | {args.images / median:.0f} | {peer / median:.2f} x |")


if __name__ == "__main__":
    main()
