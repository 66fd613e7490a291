# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in and out: official GreenMIM, SimMIM, Microsoft's, timm's and Transformers' Swin, and Twins; releases;
heads for dense tasks.

python -m modeling_greenmim.conversion import --checkpoint FILE.pth --output DIR
python -m modeling_greenmim.conversion import --checkpoint swin-base --output DIR
python -m modeling_greenmim.conversion export --model DIR --to timm --output FILE.safetensors
python -m modeling_greenmim.conversion head --model DIR --head upernet --labels FILE --output DIR
python -m modeling_greenmim.conversion release --model DIR --repo OWNER/NAME
"""

import argparse
import sys
from pathlib import Path

from torch import nn

from . import HEADS, CheckpointError, export_model, import_checkpoint, release_model, write_head
from .formats import WRITABLE
from .importing import check_output
from .released import FILES, released_file


# Values of the configuration that the command line can give.
GIVEN = ("image_size", "layer_norm_eps", "decoder_num_attention_heads", "num_heads", "window_size")
OF_ENCODER = ("image_size", "window_size", "drop_path_rate")


def build_parser() -> argparse.ArgumentParser:
    """Arguments of `python -m modeling_greenmim.conversion`."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_greenmim.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="make a GreenMIM folder of a checkpoint")
    reading.add_argument(
        "--checkpoint",
        required=True,
        help="file, folder of Transformers' Swin, or a released model, whose official file is fetched:"
        f" {', '.join(FILES)}",
    )
    reading.add_argument("--output", required=True, help="folder to write")
    reading.add_argument(
        "--patch_merging_order",
        choices=("auto", "row", "column"),
        default="auto",
        help="how the checkpoint joins 2x2 patches; auto: by args.model of official files, checked by the losses of"
        " reconstruction where there is a decoder",
    )
    reading.add_argument(
        "--photographs", help="folder of images like those it was trained on, for that check; default: two photographs"
    )
    reading.add_argument("--image_size", type=int, help="side in pixels; default: what the file tells, or 224")
    reading.add_argument(
        "--decoder_num_attention_heads", type=int, help="no weight tells; default: one for 32 channels, as published"
    )
    reading.add_argument(
        "--num_heads", type=int, nargs="+", help="of each stage of a Twins, which no weight tells; default: likewise"
    )
    reading.add_argument("--window_size", type=int, help="of a Twins, which no weight tells; default: 7")
    reading.add_argument(
        "--layer_norm_eps", type=float, help="default: 1e-6 for official files and Twins, else the source's"
    )
    writing = commands.add_parser("export", help="write a GreenMIM model in another format")
    writing.add_argument("--model", required=True, help="folder or repository of a GreenMIM model")
    writing.add_argument("--to", required=True, choices=WRITABLE)
    writing.add_argument("--output", required=True, help="folder for transformers-swin, else a file")
    heading = commands.add_parser("head", help="put a new head for a dense task on the encoder of a checkpoint")
    heading.add_argument(
        "--model", required=True, help="folder or repository of a GreenMIM model, or a checkpoint that import reads"
    )
    heading.add_argument("--head", required=True, choices=HEADS)
    heading.add_argument(
        "--labels", required=True, help='names of the classes: a text file with one a line, or JSON {"0": "wall", ...}'
    )
    heading.add_argument("--output", required=True, help="folder to write; its head is untrained")
    heading.add_argument("--image_size", type=int, help="side in pixels; default: the encoder's")
    heading.add_argument("--window_size", type=int, help="of attention; default: the encoder's")
    heading.add_argument("--drop_path_rate", type=float, help="stochastic depth; default: the encoder's")
    releasing = commands.add_parser("release", help="publish a GreenMIM folder on the Hub, and load it back")
    releasing.add_argument("--model", required=True, help="folder with a model, its image processor and its card")
    releasing.add_argument("--repo", required=True, help="OWNER/NAME on the Hub")
    releasing.add_argument("--tag", default="v1.0", help="of this release; default: v1.0")
    releasing.add_argument("--private", action="store_true", help="a new repository is private")
    return parser


def size_of(model: nn.Module) -> str:
    """Such as "86.74 M parameters"."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"


def main(argv: list[str] | None = None) -> None:
    """Runs one command; an error of the checkpoint is one message, and exit code 2, as of the scripts."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "import":
            values = {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
            checkpoint = args.checkpoint
            if checkpoint in FILES and not Path(checkpoint).exists():
                check_output(args.output)  # which takes less time than fetching a file
                checkpoint = str(released_file(checkpoint))
            model = import_checkpoint(checkpoint, args.output, args.patch_merging_order, args.photographs, **values)
            print(f"{type(model).__name__} of {size_of(model)}: {args.output}")
        elif args.command == "head":
            overrides = {name: getattr(args, name) for name in OF_ENCODER if getattr(args, name) is not None}
            model = write_head(args.model, args.head, args.labels, args.output, **overrides)
            print(f"{type(model).__name__} of {size_of(model)}, {model.config.num_labels} classes: {args.output}")
        elif args.command == "release":
            difference = release_model(args.model, args.repo, args.tag, args.private)
            print(
                f"{args.repo}, tag {args.tag}: loaded back by name; relative difference of outputs: {difference:.1e}"
            )
        else:
            relative = export_model(args.model, args.to, args.output)
            print(f"{args.output}; largest relative difference of features, by layer_norm_eps: {relative:.1e}")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
