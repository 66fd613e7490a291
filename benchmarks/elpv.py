"""What pre-training brings on the ELPV photographs of solar cells: three studies, each over several seeds.

    python benchmarks/elpv.py methods      # from scratch, fine-tuned, linear, k-NN (make finetune)
    python benchmarks/elpv.py placement    # latents at their own place in the decoder, or scrambled
    python benchmarks/elpv.py peers        # GreenMIM, SimMIM and MAE, pre-trained for the same time

They start from the checkpoint of `make pretrain`; the others pre-train as it does what they compare with. Each
classifier is a run of run_image_classification.py with the arguments that are printed. Finished runs are kept under
--output_dir and not repeated: a study may be interrupted. Its table goes to docs/results/elpv.md, or
docs/results/elpv-<study>.md.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMConfig, GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from modeling_greenmim.masking import sample_noise, unit_mask, visible_units_from_noise
from training_greenmim.data.image_dataset import ImageDataset
from training_greenmim.data.transforms import EvalTransform, TrainTransform
from training_greenmim.pretraining.trainer import MIMTrainer
from training_greenmim.runs.arguments import MIMTrainingArguments, parse_arguments
from training_greenmim.runs.trainer import ImageTrainer


ROOT = Path(__file__).parent.parent
PRETRAINING = str(ROOT / "examples" / "pretrain_elpv.yaml")
# 10 % of the 1,968 photographs for training.
LABELS = {"all labels": [], "10 % of the labels": ["--max_train_samples", "197"]}
# Where pre-training counts most; what studies of pre-training go by.
FEW = ("10 % of the labels",)
EPOCHS = {"all labels": 8, "10 % of the labels": 20}
# A cell fills its photograph, and a defect may lie at its edge: nothing is cropped.
WHOLE_IMAGES = ["--min_crop_scale", "1", "--crop_pct", "1"]
TRAINING = ["--do_train", *WHOLE_IMAGES, "--learning_rate", "1e-3"]
# What is pre-trained changes less the further it is from the head.
GENTLE_TRAINING = ["--do_train", *WHOLE_IMAGES, "--learning_rate", "3e-3", "--layer_decay", "0.65"]
METRICS = {"eval_balanced_accuracy": "balanced accuracy", "eval_roc_auc": "ROC AUC"}
SIMMIM_MASK_RATIO = 0.6
# Patches of 16 px: MAE's.
VIT = {
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 768,
}


def classify(folder: Path, *flags) -> dict:
    """Results of a run of run_image_classification.py, made unless the folder holds them."""
    results = folder / "all_results.json"
    # Results of training are there before those of evaluation.
    if not results.exists() or "eval_loss" not in json.loads(results.read_text()):
        shutil.rmtree(folder, ignore_errors=True)
        common = ["--output_dir", folder, "--do_eval", "--report_to", "none", "--save_strategy", "no"]
        common += ["--per_device_train_batch_size", 32, "--per_device_eval_batch_size", 64, "--disable_tqdm", "true"]
        # Starting workers anew for each short epoch takes longer than they save.
        common += ["--dataloader_num_workers", 0, "--decode_once", "true"]
        argv = [str(value) for value in (*common, *flags)]
        print("python run_image_classification.py", *argv, flush=True)
        run_image_classification.main(argv)
    return json.loads(results.read_text())


def in_few_words(values: list[float]) -> str:
    """Mean and standard deviation of percentages."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(methods: dict[str, dict[str, Callable[[int], dict]]], seeds: list[int]) -> str:
    """Markdown: a row for each method, a column for each metric and number of labels.

    Args:
        methods: for each method and some of `LABELS` a function of the seed that returns results.
    """
    columns = [(labels, metric) for labels in next(iter(methods.values())) for metric in METRICS]
    lines = ["| | " + " | ".join(f"{METRICS[metric]}, {labels}" for labels, metric in columns) + " |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    for name, runs in methods.items():
        results = {labels: [run(seed) for seed in seeds] for labels, run in runs.items()}
        cells = [in_few_words([result[metric] for result in results[labels]]) for labels, metric in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def runs_of(
    root: Path, name: str, flags_for: Callable[[str], list], of_labels: tuple[str, ...] = tuple(LABELS)
) -> dict[str, Callable[[int], dict]]:
    """For each of some `LABELS` a function of the seed: the run of a method with the flags for these labels."""

    def run(labels: str, seed: int) -> dict:
        folder = root / f"{name}-{'all' if not LABELS[labels] else 'few'}-seed{seed}"
        return classify(folder, "--seed", seed, *LABELS[labels], *flags_for(labels))

    return {labels: lambda seed, labels=labels: run(labels, seed) for labels in of_labels}


def training(flags: list[str], *start) -> Callable[[str], list]:
    """Flags of training all weights, for each of `LABELS`."""
    return lambda labels: [*start, *flags, "--num_train_epochs", EPOCHS[labels]]


def quick_start(args) -> tuple[int, int, int]:
    """Steps, images in a step and seed of `make pretrain`."""
    state = json.loads((args.pretrained / "trainer_state.json").read_text())
    seed = torch.load(args.pretrained / "training_args.bin", weights_only=False).seed
    return state["global_step"], state["train_batch_size"], seed


def fine_tuned(
    args, start: Path, of_labels: tuple[str, ...] = tuple(LABELS), flags: list[str] = GENTLE_TRAINING
) -> dict[str, Callable[[int], dict]]:
    """Runs of fine-tuning a checkpoint; studies share those of the checkpoint of `make pretrain`."""
    name = "finetuned" if start == args.pretrained else f"finetuned-{start.name}"
    if flags is TRAINING:
        name += "-plain"
    return runs_of(args.output_dir, name, training(flags, "--model_name_or_path", start), of_labels)


def methods(args) -> tuple[str, str]:
    """From scratch, fine-tuned, linear probe and k-NN."""
    start, root = args.pretrained, args.output_dir

    def linear(labels):
        flags = ["--model_name_or_path", start, "--mode", "linear", "--do_train", "--balance", "true", *WHOLE_IMAGES]
        # Few images make few steps.
        return [*flags, "--lars", "false", "--learning_rate", "1e-2", "--num_train_epochs", EPOCHS[labels]]

    def neighbours(labels):
        return ["--model_name_or_path", start, "--mode", "knn", "--crop_pct", "1"]

    rows = {
        "from scratch": runs_of(root, "scratch", training(TRAINING, "--config_name", start)),
        "pre-trained, fine-tuned": fine_tuned(args, start),
        "pre-trained, linear probe": runs_of(root, "linear", linear),
        "pre-trained, k-NN": runs_of(root, "knn", neighbours),
    }
    text = (
        "A small GreenMIM ([examples/pretrain_elpv.yaml](../../examples/pretrain_elpv.yaml)), pre-trained on the 1,968"
        " photographs for training without their labels, classifies the 656 others as functional or defective. From"
        f" scratch and fine-tuned alike: {EPOCHS['all labels']} epochs of all labels, or"
        f" {EPOCHS['10 % of the labels']} of 10 % of them (drawn by the seed), whole images, recipe `small-data` with"
        f" `{' '.join(TRAINING[-2:])}` from scratch and `{' '.join(GENTLE_TRAINING[-4:])}` for what is pre-trained,"
        " the best of those tried for each. Linear probe: frozen encoder, AdamW, as many epochs. k-NN: 20 neighbours,"
        " nothing learns."
    )
    return table(rows, args.seeds), text


def pretrain(model, steps: int, folder: Path) -> Path:
    """Pre-trains with the data, optimizer and schedule of `make pretrain` for so many steps."""
    if (folder / "model.safetensors").exists():
        return folder
    dataclass_types = (run_mim.ModelArguments, run_mim.DataArguments, MIMTrainingArguments)
    argv = [PRETRAINING, "--output_dir", str(folder), "--max_steps", str(steps), "--eval_strategy", "no"]
    argv += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
    _, data_args, args = parse_arguments(dataclass_types, argv)
    images, test_images, _, _ = run_mim.load_data(data_args, args)
    size, channels = (model.config.image_size,) * 2, model.config.num_channels
    transform = TrainTransform(size, channels, (data_args.min_crop_scale, 1.0))
    is_greenmim = isinstance(model, GreenMIMForPreTraining)
    trainer = (MIMTrainer if is_greenmim else PeerTrainer)(
        model,
        args,
        train_dataset=ImageDataset(images, "image", transform, args.seed),
        eval_dataset=ImageDataset(test_images, "image", EvalTransform(size, channels), args.seed),
        image_processor=build_image_processor(GreenMIMConfig(image_size=size[0], num_channels=channels)),
    )
    print(f"pre-training {folder.name}: {steps} steps", flush=True)
    trainer.train()
    if is_greenmim:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    return folder


def scramble(decoder, inputs):
    """Sends each visible latent to the place of another visible unit, drawn anew in each forward."""
    latents, visible_units, unit_grid = inputs
    order = torch.randperm(visible_units.shape[1], device=visible_units.device)
    return latents, visible_units[:, order], unit_grid


def placement(args) -> tuple[str, str]:
    """Correct against scrambled placement of latents in the decoder, as the published code has it."""
    steps, _, seed = quick_start(args)
    set_seed(seed)
    model = GreenMIMForPreTraining(GreenMIMConfig.from_pretrained(args.pretrained))
    model.decoder.register_forward_pre_hook(scramble)
    folders = {
        "correct": args.pretrained,
        "scrambled": pretrain(model, steps, args.output_dir / "pretrained-scrambled"),
    }
    rows = {name: fine_tuned(args, folder, FEW) for name, folder in folders.items()}
    losses = [
        f"{name} {json.loads((folder / 'all_results.json').read_text())['eval_loss']:.3f}"
        for name, folder in folders.items()
    ]
    text = (
        f"Each visible latent at its own unit in the decoder, or at that of another visible one. {steps:,} steps"
        " of pre-training; everything else, seeds included, is the same. Loss of reconstruction on test photographs,"
        f" by the placement of each: {', '.join(losses)}. Fine-tuned alike:"
    )
    return table(rows, args.seeds), text


class PeerTrainer(ImageTrainer):
    """Pre-trains a peer with GreenMIM's data and optimizer; target and loss are its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch of uint8 images."""
        return loss_of_peer(model, self.normalize(inputs["pixel_values"]))


def loss_of_peer(model, images: torch.Tensor) -> torch.Tensor:
    """SimMIM masks random units of `encoder_stride` pixels, MAE and GreenMIM mask by themselves."""
    if not isinstance(model, SwinForMaskedImageModeling):
        return model(images).loss
    config, batch = model.config, len(images)
    side, factor = config.image_size // config.encoder_stride, config.encoder_stride // config.patch_size
    visible = visible_units_from_noise(sample_noise(side**2, batch), side**2, batch, SIMMIM_MASK_RATIO)
    units = unit_mask(visible, side**2).view(-1, side, side)
    patches = units.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)
    return model(images, bool_masked_pos=patches.bool()).loss


def peers_of(config: GreenMIMConfig) -> dict[str, torch.nn.Module]:
    """GreenMIM; SimMIM with the same Swin; MAE with a ViT of about as many parameters."""
    common = {"image_size": config.image_size, "num_channels": config.num_channels}
    swin = SwinConfig(
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        # Transformers' Swin cannot shrink its window to a smaller grid.
        window_size=min(config.window_size, *config.unit_grid),
        encoder_stride=config.encoder_stride,
        drop_path_rate=0.0,
        **common,
    )
    decoder = {name: value for name, value in config.to_dict().items() if name.startswith("decoder_")}
    vit = ViTMAEConfig(**common, **decoder, **VIT, norm_pix_loss=True)
    return {
        "GreenMIM": GreenMIMForPreTraining(config),
        "SimMIM (SwinForMaskedImageModeling)": SwinForMaskedImageModeling(swin),
        "MAE (ViTMAEForPreTraining)": ViTMAEForPreTraining(vit),
    }


def seconds_per_step(models: dict[str, torch.nn.Module], batch_size: int, rounds: int = 15) -> dict[str, float]:
    """Median time of a training step of each model, taking turns."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()}
    seconds = {name: [] for name in models}
    for round_index in range(rounds + 1):
        for name, model in models.items():
            side = model.config.image_size
            images = torch.randn(batch_size, model.config.num_channels, side, side)
            start = time.perf_counter()
            loss_of_peer(model, images).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if round_index:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def classifier_from_mae(folder: Path, target: Path) -> Path:
    """The encoder of a ViTMAE checkpoint as a ViT classifier, which Transformers does not make by itself."""
    mae = ViTMAEForPreTraining.from_pretrained(folder)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
    values = {name: getattr(mae.config, name) for name in (*names, "patch_size", "num_channels")}
    vit = ViTForImageClassification(ViTConfig(**values, num_labels=2))
    missing, unexpected = vit.vit.load_state_dict(mae.vit.state_dict(), strict=False)
    if missing or unexpected:
        raise RuntimeError(f"ViT and ViTMAE differ: {missing} are missing, {unexpected} are unexpected.")
    vit.save_pretrained(target)
    shutil.copy(folder / "preprocessor_config.json", target)
    return target


def peers(args) -> tuple[str, str]:
    """GreenMIM, SimMIM and MAE after the same time of pre-training."""
    steps, batch_size, seed = quick_start(args)
    set_seed(seed)
    models = peers_of(GreenMIMConfig.from_pretrained(args.pretrained))
    planned = args.output_dir / "peers.json"
    if not planned.exists():
        seconds = seconds_per_step(copy.deepcopy(models), batch_size)
        planned.parent.mkdir(parents=True, exist_ok=True)
        planned.write_text(
            json.dumps({name: round(steps * seconds["GreenMIM"] / value) for name, value in seconds.items()})
        )
    steps_of = json.loads(planned.read_text())
    rows, facts = {}, []
    for name, model in models.items():
        size = sum(parameter.numel() for parameter in model.base_model.parameters()) / 1e6
        facts.append(f"{name}: {steps_of[name]:,} steps, encoder of {size:.1f} M parameters")
        folder = args.pretrained
        if name != "GreenMIM":
            folder = pretrain(model, steps_of[name], args.output_dir / f"pretrained-{name.split()[0].lower()}")
        if isinstance(model, ViTMAEForPreTraining):
            folder = classifier_from_mae(folder, args.output_dir / "pretrained-mae-vit")
        for rates, flags in (("rates by layer", GENTLE_TRAINING), ("one rate", TRAINING)):
            rows[f"{name}, {rates}"] = fine_tuned(args, folder, FEW, flags)
    text = (
        f"Pre-trained for the time of {steps:,} steps of GreenMIM with {batch_size} images, by steps timed in"
        " turns in one process; same photographs, crops, optimizer and learning rate. "
        + "; ".join(facts)
        + f". Each was then fine-tuned in two ways, with rates by layer (`{' '.join(GENTLE_TRAINING[-4:])}`) and with"
        f" one rate (`{' '.join(TRAINING[-2:])}`): compare the better row of each. The first was chosen for GreenMIM;"
        " no further values were tried for the others."
    )
    return table(rows, args.seeds), text


STUDIES = {"methods": methods, "placement": placement, "peers": peers}


def main() -> None:
    """Runs a study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrained", type=Path, default=Path("outputs/elpv"), help="of make pretrain")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/elpv-studies"))
    args = parser.parse_args()
    if not (args.pretrained / "README.md").exists():
        parser.error(
            f"--pretrained is {str(args.pretrained)!r}, which is no finished pre-training; `make pretrain` first."
        )
    start = time.time()
    rows, text = STUDIES[args.study](args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    name = "elpv" if args.study == "methods" else f"elpv-{args.study}"
    page = ROOT / "docs" / "results" / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    title = f"# ELPV: {STUDIES[args.study].__doc__.strip().rstrip('.')}"
    seeds = f"Mean and standard deviation of percentages over the seeds {args.seeds}; {device}."
    command = f"`python benchmarks/elpv.py {args.study}`"
    page.write_text(f"{title}\n\n{text}\n\n{rows}\n\n{seeds} Made by {command}.\n")
    print(f"{rows}\n{page}, after {math.ceil((time.time() - start) / 60)} minutes")


if __name__ == "__main__":
    main()
