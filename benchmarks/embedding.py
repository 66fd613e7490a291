"""How much of the throughput of the bare network `--mode embed` keeps: reading, cropping and writing included.

    python benchmarks/embedding.py [--images 256] [--threads 1] [--workers 1]

A Swin-T (28 M parameters, 224 px) on made JPEGs of 500x375 px. The network alone, on images that are ready,
and the whole take turns; medians are printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification
from modeling_greenmim.image_processing_greenmim import build_image_processor
from training_greenmim.classification.embedding import EmbeddingTrainer, save_embeddings
from training_greenmim.data.image_dataset import EveryImage
from training_greenmim.data.readers import load_folder
from training_greenmim.data.transforms import EvalTransform
from training_greenmim.runs.arguments import ClassificationTrainingArguments


BATCH, ROUNDS = 32, 3


def write_photographs(folder: Path, count: int) -> None:
    """Smooth random images."""
    for number in range(count):
        blocks = np.random.default_rng(number).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{number:04}.jpg", quality=90
        )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = GreenMIMConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
    images = torch.randn(BATCH, 3, 224, 224)
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as parent:
        photographs = Path(parent, "photographs")
        photographs.mkdir()
        write_photographs(photographs, args.images)
        dataset = EveryImage(load_folder(str(photographs), "test_dir"), "image", EvalTransform((224, 224), 3), seed=0)
        for number in range(ROUNDS):
            arguments = ClassificationTrainingArguments(
                output_dir=str(Path(parent, str(number))),
                per_device_eval_batch_size=BATCH,
                dataloader_num_workers=args.workers,
                report_to="none",
                disable_tqdm=True,
            )
            model = GreenMIMForImageClassification(config).eval()
            processor = build_image_processor(config)
            trainer = EmbeddingTrainer(model, arguments, image_processor=processor, stages=[])
            start = time.perf_counter()
            with torch.no_grad():
                for _ in range(args.images // BATCH):
                    model(images)
            alone.append(args.images / (time.perf_counter() - start))
            start = time.perf_counter()
            save_embeddings(trainer, dataset, "test")
            whole.append(args.images / (time.perf_counter() - start))
            print(f"network {alone[-1]:.2f} images/s, with all else {whole[-1]:.2f}", flush=True)
    share = statistics.median(whole) / statistics.median(alone)
    print(f"median: {statistics.median(whole):.2f} of {statistics.median(alone):.2f} images/s, {share:.1%}")


if __name__ == "__main__":
    main()
