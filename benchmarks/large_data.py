"""Time and memory of a million files, and of crops from an image of 400 megapixels.

    python benchmarks/large_data.py files      # a folder of a million empty files is listed
    python benchmarks/large_data.py tiff       # crops of a tiled TIFF of 20,000 x 20,000 px, 16 bits

What they need is made in a temporary folder (below --folder) and removed. Each is measured in a new process, whose
peak of memory is told above that of the process before it begins.
"""

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from modeling_greenmim.array_image import FullDepth
from training_greenmim.data.readers import load_class_folders, load_folder
from training_greenmim.data.tiles import parts_of
from training_greenmim.data.transforms import EvalTransform, TrainTransform


FILES, FILES_OF_FOLDER = 1_000_000, 1000
SIDE, TILE = 20_000, 512
SIZE = (224, 224)
DEPTH = FullDepth(((0.0, 4095.0),))


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, work, count: int, before: float) -> None:
    """Does `work` for each of `count` numbers and prints its time and memory."""
    start = time.perf_counter()
    for number in range(count):
        work(number)
    seconds = (time.perf_counter() - start) / count
    print(f"{name}: {1000 * seconds:,.0f} ms each, {peak() - before:.0f} MB above the idle process", flush=True)


def list_files(folder: str) -> None:
    """Lists a folder as both scripts do."""
    before = peak()
    measure(f"{FILES:,} files without labels", lambda _: load_folder(folder, "train_dir"), 1, before)
    measure(
        f"{FILES:,} files in {FILES // FILES_OF_FOLDER} classes",
        lambda _: load_class_folders(folder, "train_dir"),
        1,
        before,
    )


def study_of_files(folder: Path) -> None:
    """A million empty files."""
    for number in range(FILES):
        path = folder / f"{number // FILES_OF_FOLDER:04}" / f"{number:07}.jpg"
        if number % FILES_OF_FOLDER == 0:
            path.parent.mkdir()
        path.touch()
    in_process(list_files, str(folder))


def crop(path: str) -> None:
    """Random crops of all sizes, and tiles."""
    before, generator = peak(), np.random.default_rng(0)
    tiles = parts_of(path, tile=TILE)
    whole = EvalTransform((TILE, TILE), 1, 1.0, DEPTH)
    measure(f"tiles of {TILE} px", lambda number: whole(tiles[number * 7 % len(tiles)]), 50, before)
    for scale in ((0.0001, 0.001), (0.2, 1.0)):
        transform = TrainTransform(SIZE, 1, scale, DEPTH)
        name = f"random crops of {scale[0]:g} to {scale[1]:g} of the area"
        measure(name, lambda _, transform=transform: transform(path, generator), 10, before)


def study_of_tiff(folder: Path) -> None:
    """A tiled and compressed TIFF of 400 megapixels."""
    import tifffile

    tile = np.random.default_rng(0).integers(0, 4096, (TILE, TILE)).astype(np.uint16)
    path, count = folder / "scan.tif", math.ceil(SIDE / TILE) ** 2
    tiles = (np.roll(tile, number) for number in range(count))
    tifffile.imwrite(path, tiles, shape=(SIDE, SIDE), dtype="uint16", tile=(TILE, TILE), compression="zlib")
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
    in_process(crop, str(path))


def in_process(work, argument: str) -> None:
    """Runs a measurement in a new process, whose memory nothing else has used."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(argument,))
    process.start()
    process.join()


STUDIES = {"files": study_of_files, "tiff": study_of_tiff}


def main() -> None:
    """Runs a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--folder", type=Path, default=None, help="where to write, a gigabyte; default: the system's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        STUDIES[args.study](Path(folder))


if __name__ == "__main__":
    main()
