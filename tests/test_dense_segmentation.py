"""Semantic segmentation: pairs, windows, metrics, the script from training to predictions, and what it refuses."""

import importlib.util
import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from torch import nn

from modeling_greenmim.conversion import build_head
from tests.training_helpers import (
    ROOT,
    assert_same_weights,
    messages,
    noise_image,
    results_of,
    run_in_processes,
    state_of,
    weights,
    write_broken,
    write_pretrained,
)
from training_greenmim.dense.metrics import count_pixels, segmentation_metrics
from training_greenmim.dense.models import is_finished
from training_greenmim.dense.pairs import (
    ClassMaps,
    CropTransform,
    find_label_names,
    open_class_map,
    pairs_of,
)
from training_greenmim.dense.pictures import class_colours, overlay, prediction_names, save_class_map
from training_greenmim.dense.recipes import recipe_defaults
from training_greenmim.dense.windows import score_in_windows, window_starts
from training_greenmim.optimization import parameter_groups


SCRIPT = ROOT / "examples" / "dense" / "run_semantic_segmentation.py"
NAMES = ["ground", "disc", "square", "triangle"]
COLOURS = [(90, 90, 90), (200, 60, 60), (60, 190, 60), (70, 70, 210)]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_semantic_segmentation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn_shapes(seed: int, height: int, width: int, radius: tuple[float, float]) -> tuple[Image.Image, Image.Image]:
    """A disc, a square and a triangle on grey ground, each in shades of its colour, and their classes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    pixels, mask = rng.normal(COLOURS[0][0], 12, (height, width, 3)), np.zeros((height, width), np.uint8)
    for number in rng.permutation([1, 2, 3]):
        size = rng.uniform(*radius)
        down, across = rows - rng.uniform(size, height - size), columns - rng.uniform(size, width - size)
        inside = {
            1: down**2 + across**2 < size**2,
            2: (abs(down) < 0.8 * size) & (abs(across) < 0.8 * size),
            3: (abs(down) < size) & (abs(across) < (down + size) / 2),
        }[int(number)]
        shade = np.array(COLOURS[number]) + rng.uniform(-20, 20)
        pixels[inside] = shade + rng.normal(0, 12, (inside.sum(), 3))
        mask[inside] = number
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def write_shapes(folder: Path, count: int, seed: int = 0, size=(40, 48), radius=(8, 14), names=NAMES) -> Path:
    """A folder of pairs of drawn shapes, with the names of their classes."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index in range(count):
        image, mask = drawn_shapes(1000 * seed + index, *size, radius)
        image.save(folder / "images" / f"{index:03}.png")
        mask.save(folder / "masks" / f"{index:03}.png")
    if names:
        (folder / "labels.txt").write_text("\n".join(names))
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return write_shapes(folder / "train", 8), write_shapes(folder / "validation", 3, seed=1, size=(56, 44))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("start") / "pretrained", depths=[2, 2, 2], num_heads=[1, 2, 4])


def flags(output: Path, *more) -> list[str]:
    values = ["--output_dir", output, "--crop_size", 32, "--per_device_train_batch_size", 4]
    values += ["--per_device_eval_batch_size", 4, "--dataloader_num_workers", 0, "--use_cpu", "true"]
    values += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", 1]
    values += ["--max_steps", 2]
    start = more[more.index("--model_name_or_path") + 1] if "--model_name_or_path" in more else None
    if start is None or not is_finished(str(start)):
        values += ["--head_overrides", "hidden_size=8,auxiliary_channels=8"]
    return [str(value) for value in (*values, *more)]


def segment(script, output: Path, *more) -> Path:
    script.main(flags(output, *more))
    return output


def folders(shapes) -> list:
    return ["--train_dir", shapes[0], "--validation_dir", shapes[1]]


@pytest.fixture(scope="module")
def finished(script, shapes, pretrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "segmenter"
    work = ("--do_train", "--do_eval", "--do_predict", "--max_steps", 8, "--learning_rate", 0.01)
    return segment(script, output, "--model_name_or_path", pretrained, *folders(shapes), *work)


# Windows


@pytest.mark.parametrize("side, window, overlap", [(10, 4, 0.5), (11, 4, 0.25), (4, 4, 0.5), (3, 4, 0.5), (100, 7, 0)])
def test_windows_cover_a_side(side, window, overlap):
    starts = window_starts(side, window, overlap)
    covered = np.zeros(side, dtype=int)
    for start in starts:
        assert 0 <= start and (start + window <= side or side <= window)
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert len(set(starts)) == len(starts) and starts == sorted(starts)
    # Neighbours share what they should; the last one may share more.
    assert all(after - before <= window * (1 - overlap) + 0.5 for before, after in pairwise(starts))


def put_together(stripes, classes: int, size: tuple[int, int]) -> torch.Tensor:
    scores = torch.full((classes, *size), torch.nan)
    for (rows, columns), part in stripes:
        assert scores[:, rows, columns].isnan().all()  # each pixel comes once
        scores[:, rows, columns] = part
    return scores


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (33, 33), (8, 90), (16, 16)])
@pytest.mark.parametrize("overlap", [0, 1 / 3, 0.5])
def test_a_local_model_scores_in_windows_what_it_scores_at_once(size, overlap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 5, 1)).eval()
    image = torch.rand(3, *size)
    with torch.no_grad():
        expected = model(image[None])[0]
        stripes = score_in_windows(image, model, 16, overlap, batch_size=3)
        torch.testing.assert_close(put_together(stripes, 5, size), expected)


def test_overlapping_windows_are_averaged():
    # Scores are the mean of the window: a model that sees all of it.
    image = torch.rand(2, 37, 29)

    def mean(windows):
        return windows.mean((2, 3), keepdim=True).expand(windows.shape)

    total, count = torch.zeros(2, 37, 29), torch.zeros(37, 29)
    for top in window_starts(37, 12, 0.4):
        for left in window_starts(29, 12, 0.4):
            part = slice(top, top + 12), slice(left, left + 12)
            total[:, *part] += image[:, *part].mean((1, 2))[:, None, None]
            count[part] += 1
    stripes = score_in_windows(image, mean, 12, 0.4, batch_size=4)
    torch.testing.assert_close(put_together(stripes, 2, (37, 29)), total / count)
    turned = put_together(score_in_windows(image.transpose(1, 2), mean, 12, 0.4, 4), 2, (29, 37))
    torch.testing.assert_close(turned.transpose(1, 2), total / count)


def test_long_images_take_no_more_memory_than_a_stripe():
    seen = []

    def score(windows):
        seen.append(windows.shape)
        return windows

    for _, part in score_in_windows(torch.zeros(1, 10, 5000), score, 8, 0.5, 4):
        assert part.shape[1] == 10 and part.shape[2] <= 8
    assert all(shape[0] <= 4 and shape[2:] == (8, 8) for shape in seen)


def test_one_window_is_the_model_itself(pretrained):
    model = build_head(str(pretrained), "upernet", dict(enumerate(NAMES)), head_overrides={"hidden_size": 8})
    image = torch.randn(3, 41, 50)
    with torch.no_grad():
        expected = model(image[None]).logits[0]
        stripes = list(score_in_windows(image, lambda windows: model(windows).logits, 0, 0.5, 1))
    assert len(stripes) == 1
    assert torch.equal(put_together(stripes, 4, (41, 50)), expected)


# Metrics


def random_maps(seed: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes - 1, (3, 20, 30))  # the last class is never true
    predicted = np.where(rng.random(true.shape) < 0.6, true, rng.integers(0, classes, true.shape))
    true[rng.random(true.shape) < 0.2] = 255
    return predicted, true


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_scikit_learn(seed):
    predicted, true = random_maps(seed)
    counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(true), 6, 255).numpy()
    metrics = segmentation_metrics(counts, ["a", "b b", "c", "d", "e", "never"])
    flat_true, flat = true[true != 255], predicted[true != 255]
    iou = jaccard_score(flat_true, flat, labels=range(5), average=None)
    assert metrics["mean_iou"] == pytest.approx(iou.mean())
    assert metrics["iou_b_b"] == pytest.approx(iou[1]) and metrics["iou_e"] == 0
    assert "iou_never" not in metrics  # neither true nor predicted
    assert metrics["pixel_accuracy"] == pytest.approx(accuracy_score(flat_true, flat))
    recalls = recall_score(flat_true, flat, labels=range(4), average=None)
    assert metrics["mean_accuracy"] == pytest.approx(recalls.mean())


def test_the_module_takes_numbers_and_maps_alike():
    predicted, true = random_maps(7)
    metric = evaluate.load(str(ROOT / "metrics" / "mean_iou"))
    given = {"num_labels": 5, "ignore_index": 255}
    maps = metric.compute(predictions=predicted.tolist(), references=true.tolist(), **given)
    flat = metric.compute(predictions=predicted.ravel(), references=true.ravel(), **given)
    assert np.isnan(flat["per_class_accuracy"].pop()) and np.isnan(maps["per_class_accuracy"].pop())
    assert maps == flat and 0 < flat["mean_iou"] < 1 and len(flat["per_class_iou"]) == 5
    pairs, weights = np.unique(np.stack([predicted.ravel(), true.ravel()]), axis=1, return_counts=True)
    weighted = metric.compute(predictions=pairs[0], references=pairs[1], sample_weight=weights.tolist(), **given)
    weighted["per_class_accuracy"].pop()
    assert weighted == flat


def test_the_module_refuses_numbers_that_are_no_class():
    metric = evaluate.load(str(ROOT / "metrics" / "mean_iou"))
    with pytest.raises(ValueError, match="`num_labels` is 2, but there is the class number 3"):
        metric.compute(predictions=[0, 1], references=[0, 3], num_labels=2)


def test_no_labelled_pixel_has_no_metric():
    assert segmentation_metrics(np.zeros((3, 3), dtype=int), ["a", "b", "c"]) == {}


# Masks


def test_masks_of_every_kind(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 4, (6, 5)).astype(np.uint8)
    palette = Image.fromarray(numbers)
    palette.putpalette(class_colours(256).tobytes())
    for name, image in {
        "grey.png": Image.fromarray(numbers),
        "palette.png": palette,
        "deep.png": Image.fromarray(numbers.astype(np.uint16)),
    }.items():
        image.save(tmp_path / name)
        assert (open_class_map(str(tmp_path / name)) == numbers).all()
    np.save(tmp_path / "map.npy", numbers.astype(np.float32))
    assert (open_class_map(str(tmp_path / "map.npy")) == numbers).all()
    Image.fromarray(numbers > 1).save(tmp_path / "bits.png")
    assert (open_class_map(str(tmp_path / "bits.png")) == (numbers > 1)).all()


def test_masks_that_are_none(tmp_path):
    noise_image(0).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"it is a picture in colours .mode RGB.; a mask has class numbers"):
        open_class_map(str(tmp_path / "colours.png"))
    with pytest.raises(ValueError, match="its values are no whole numbers"):
        open_class_map(np.full((4, 4), 0.5))
    with pytest.raises(ValueError, match="it has the class number 9, but there are 4 classes"):
        ClassMaps(4, 255)(np.full((4, 4), 9))
    assert ClassMaps(4, 9)(np.full((4, 4), 9)).shape == (4, 4)


def test_image_and_mask_are_cropped_alike_and_padding_is_ignored():
    # A channel of the image holds the classes: the crop of the one is that of the other.
    classes = np.zeros((40, 30), np.uint8)
    classes[5:25, 8:22] = 100
    image = Image.fromarray(np.stack([classes] * 3, axis=-1))
    transform = CropTransform((48, 48), 3, (0.5, 2.0), 255)
    for seed in range(10):
        sample = transform(image, classes.astype(np.int32), np.random.default_rng(seed))
        labels, pixels = sample["labels"], sample["pixel_values"][0].int()
        inside = labels != 255
        assert (pixels[~inside] == 0).all()
        # Bicubic edges of the square are blurred; the far side of it is not.
        agree = ((pixels > 50) == (labels == 100))[inside]
        assert agree.float().mean() > 0.95


def test_crops_of_one_class_are_drawn_again():
    classes = np.zeros((200, 200), np.int32)
    classes[:, 100:] = 1
    image = Image.new("RGB", (200, 200))
    shares = []
    for limit in (1.0, 0.75):
        transform = CropTransform((32, 32), 3, (1.0, 1.0), 255, limit)
        drawn = [transform(image, classes, np.random.default_rng(seed))["labels"] for seed in range(40)]
        largest = [max((labels == number).float().mean() for number in (0, 1)) for labels in drawn]
        shares.append(np.mean([share > 0.75 for share in largest]))
    assert shares[0] > 0.6 and shares[1] < 0.5


def test_names_of_classes_lie_beside_the_data(tmp_path):
    data = SimpleNamespace(labels_file=None, train_dir=str(tmp_path), validation_dir=None, dataset_name=None)
    assert find_label_names(data) is None
    (tmp_path / "labels.txt").write_text("sky\nroad side\n\n")
    assert find_label_names(data) == ["sky", "road side"]
    data.labels_file = str(tmp_path / "one.txt")
    (tmp_path / "one.txt").write_text("sky\n")
    with pytest.raises(ValueError, match=r"`labels_file` is .*two or more"):
        find_label_names(data)


# The script


def test_a_run_writes_model_metrics_card_and_pictures(finished, shapes):
    results = results_of(finished)
    assert {"eval_mean_iou", "eval_pixel_accuracy", "eval_mean_accuracy", "eval_loss"} <= results.keys()
    assert {f"eval_iou_{name}" for name in NAMES} <= results.keys()
    # What the predicted masks score by another's hand.
    true, predicted = [], []
    for path in sorted((shapes[1] / "masks").iterdir()):
        true.append(np.asarray(Image.open(path)).ravel())
        mask = Image.open(finished / "predictions" / "masks" / path.name)
        assert mask.mode == "P" and mask.size == Image.open(path).size
        predicted.append(np.asarray(mask).ravel())
        assert Image.open(finished / "predictions" / "overlays" / path.name).size == mask.size
    true, predicted = np.concatenate(true), np.concatenate(predicted)
    iou = jaccard_score(true, predicted, labels=range(4), average=None, zero_division=0)
    for name, value in zip(NAMES, iou):
        assert results[f"eval_iou_{name}"] == pytest.approx(value)
    assert results["eval_mean_iou"] == pytest.approx(iou.mean())
    assert results["eval_pixel_accuracy"] == pytest.approx((true == predicted).mean())
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "![Predictions](predictions.png)" in card
    assert "ground, disc, square, triangle" in card and "mean_iou" in card
    assert (finished / "predictions.png").is_file()


def test_the_encoder_is_that_of_the_start_and_the_head_is_new(script, shapes, pretrained, tmp_path):
    output = segment(
        script, tmp_path, "--model_name_or_path", pretrained, *folders(shapes), "--do_train", "--learning_rate", 0
    )
    before, after = weights(pretrained), weights(output)
    encoder = [name for name in before if name.startswith("greenmim.")]
    assert encoder and all(torch.equal(before[name], after[f"backbone.{name}"]) for name in encoder)
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}


def test_a_finished_folder_evaluates_and_predicts_as_it_did(script, finished, shapes, tmp_path):
    model = ("--model_name_or_path", finished)
    again = segment(script, tmp_path / "again", *model, "--validation_dir", shapes[1], "--do_eval")
    for name, value in results_of(again).items():
        if name.startswith("eval_") and not name.endswith(("_per_second", "_time", "runtime")):
            assert value == pytest.approx(results_of(finished)[name])
    alone = segment(script, tmp_path / "alone", *model, "--test_dir", shapes[1] / "images", "--do_predict")
    for path in (finished / "predictions" / "masks").iterdir():
        mask = np.asarray(Image.open(alone / "predictions" / "masks" / path.name))
        assert (mask == np.asarray(Image.open(path))).all()


def test_a_finished_folder_goes_on_with_its_classes(script, finished, tmp_path):
    common = ("--model_name_or_path", finished, "--do_train", "--train_dir")
    unnamed = segment(script, tmp_path / "run", *common, write_shapes(tmp_path / "unnamed", 5, names=None))
    assert json.loads((unnamed / "config.json").read_text())["id2label"] == {str(i): n for i, n in enumerate(NAMES)}
    with pytest.raises(ValueError, match="in another order"):
        segment(script, tmp_path / "refused", *common, write_shapes(tmp_path / "data", 5, names=[*reversed(NAMES)]))


def test_a_finished_folder_is_seen_in_windows_of_its_crops(finished):
    chosen = {"model_name_or_path": str(finished), "recipe": None, "head": None, "learning_rate": None}
    assert recipe_defaults(chosen)["crop_size"] == 32 and "eval_window" not in recipe_defaults(chosen)


def test_a_finished_folder_is_seen_in_the_windows_of_its_evaluation(script, shapes, pretrained, tmp_path):
    work = ("--do_train", "--do_eval", "--learning_rate", 0.01, "--eval_window", 0)
    whole = segment(script, tmp_path / "whole", "--model_name_or_path", pretrained, *folders(shapes), *work)
    common = ("--model_name_or_path", whole, "--validation_dir", shapes[1], "--do_eval")
    again = segment(script, tmp_path / "again", *common)
    assert results_of(again)["eval_loss"] == pytest.approx(results_of(whole)["eval_loss"])
    windows = segment(script, tmp_path / "windows", *common, "--eval_window", 32)
    assert results_of(windows)["eval_loss"] != pytest.approx(results_of(whole)["eval_loss"])


def test_predictions_of_images_of_one_name_are_kept_apart():
    records = [{"image": {"path": path, "bytes": None}} for path in ("a/img.png", "a/img_2.png", "b/img.png")]
    dataset = type("Images", (list,), {"records": records, "column": "image"})(records)
    assert len(set(prediction_names(dataset))) == 3


def test_a_folder_with_code_of_its_own_is_refused_and_not_run(script, shapes, tmp_path):
    evil = tmp_path / "evil"
    evil.mkdir()
    values = {"model_type": "evil", "backbone_config": {}, "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (evil / "config.json").write_text(json.dumps(values))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="evil"):
        segment(script, tmp_path / "run", "--model_name_or_path", evil, *folders(shapes), "--do_eval")
    assert not (tmp_path / "ran").exists()


def test_a_finished_folder_for_other_classes_needs_a_word(script, finished, tmp_path):
    data = write_shapes(tmp_path / "data", 5, names=[*NAMES, "star"])
    common = ("--model_name_or_path", finished, "--train_dir", data, "--do_train")
    with pytest.raises(ValueError, match="another shape than the model wants; --ignore_mismatched_sizes true"):
        segment(script, tmp_path / "refused", *common)
    output = segment(script, tmp_path / "output", *common, "--ignore_mismatched_sizes", "true")
    assert weights(output)["decode_head.classifier.weight"].shape[0] == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(script, shapes, pretrained, tmp_path, workers):
    common = ("--model_name_or_path", pretrained, *folders(shapes), "--do_train", "--max_steps", 4)
    common += ("--drop_path_rate", 0.2, "--color_jitter", 0.3, "--save_strategy", "steps", "--save_steps", 2)
    whole = segment(script, tmp_path / "whole", *common)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    segment(script, resumed, *common, "--resume_from_checkpoint", "true", "--dataloader_num_workers", workers)
    assert_same_weights(whole, resumed)
    losses = [[entry["loss"] for entry in state_of(run)["log_history"] if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_class_numbers_are_names_where_there_are_none(script, pretrained, tmp_path):
    data = write_shapes(tmp_path / "data", 6, names=None)
    output = segment(script, tmp_path / "run", "--model_name_or_path", pretrained, "--train_dir", data, "--do_train")
    assert json.loads((output / "config.json").read_text())["id2label"] == {str(n): str(n) for n in range(4)}


def test_data_sets_with_columns_of_images_and_annotations(script, shapes, pretrained, tmp_path):
    columns = {part: [str(path) for path in sorted((shapes[0] / part).iterdir())] for part in ("images", "masks")}
    records = datasets.Dataset.from_dict({"picture": columns["images"], "annotation": columns["masks"]})
    records = records.cast_column("picture", datasets.Image()).cast_column("annotation", datasets.Image())
    (tmp_path / "data").mkdir()
    records.to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "data" / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    common = ("--model_name_or_path", pretrained, "--do_train", "--train_val_split", 0.25)
    run = segment(script, tmp_path / "run", *common, "--dataset_name", tmp_path / "data", "--do_eval")
    assert json.loads((run / "config.json").read_text())["id2label"]["1"] == "disc"
    # The same pairs from folders, divided by the same seed, make the same model.
    same = segment(script, tmp_path / "same", *common, "--train_dir", shapes[0], "--do_eval")
    assert_same_weights(run, same)
    assert results_of(run)["eval_mean_iou"] == results_of(same)["eval_mean_iou"]


def test_images_of_other_channels_and_depths(script, pretrained, tmp_path):
    data = write_shapes(tmp_path / "data", 6)
    for path in sorted((data / "images").iterdir()):
        values = np.asarray(Image.open(path)).astype(np.uint16) * 40
        np.save(path.with_suffix(".npy"), np.concatenate([values, values[..., :2]], axis=-1))
        path.unlink()
    common = ("--train_dir", data, "--do_train", "--do_eval", "--do_predict")
    start = ("--model_name_or_path", pretrained, "--config_overrides", "num_channels=5")
    output = segment(script, tmp_path / "run", *start, *common)
    processor = json.loads((output / "preprocessor_config.json").read_text())
    assert len(processor["image_mean"]) == len(processor["image_range"]) == 5
    name = "greenmim.embeddings.patch_embeddings.projection.weight"
    old, new = weights(pretrained)[name], weights(output)[f"backbone.{name}"]
    assert new.shape[1] // 5 == old.shape[1] // 3
    assert "eval_mean_iou" in results_of(output)
    assert len(list((output / "predictions" / "overlays").iterdir())) == 1


def test_from_scratch(script, shapes, tmp_path):
    scratch = ("--config_name", "tiny", "--config_overrides", "image_size=32,embed_dim=8,depths=[1,1],num_heads=[1,2]")
    output = segment(script, tmp_path, *scratch, *folders(shapes), "--do_train", "--do_eval")
    config = json.loads((output / "config.json").read_text())
    assert config["backbone_config"]["depths"] == [1, 1] and not config["use_auxiliary_head"]
    assert "starts from" not in (output / "README.md").read_text()


def test_mask2former_trains_and_comes_back(script, shapes, pretrained, tmp_path, caplog):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    for path in sorted((data / "masks").iterdir())[4:]:
        Image.new("L", Image.open(path).size, 255).save(path)
    sizes = "hidden_dim=32,feature_size=32,mask_feature_size=32,num_queries=5,encoder_layers=1,decoder_layers=2"
    sizes += ",num_attention_heads=2,encoder_feedforward_dim=16,dim_feedforward=16,train_num_points=64"
    output = segment(
        script,
        tmp_path / "run",
        *("--model_name_or_path", pretrained, "--train_dir", data, "--validation_dir", shapes[1], "--do_train"),
        *("--do_eval", "--head", "mask2former", "--head_overrides", sizes, "--max_steps", 8),
        *("--per_device_train_batch_size", 2),
    )
    losses = [entry["loss"] for entry in state_of(output)["log_history"] if "loss" in entry]
    assert len(losses) == 8 and np.isfinite(losses).all() and max(losses) > 1
    again = segment(
        script, tmp_path / "again", "--model_name_or_path", output, "--validation_dir", shapes[1], "--do_eval"
    )
    assert results_of(again)["eval_mean_iou"] == pytest.approx(results_of(output)["eval_mean_iou"])


def test_frozen_stages_learn_nothing(script, shapes, pretrained, tmp_path):
    common = ("--model_name_or_path", pretrained, *folders(shapes), "--do_train", "--learning_rate", 0.01)
    output = segment(script, tmp_path / "run", *common, "--freeze_stages", 2)
    before, after = weights(pretrained), weights(output)
    changed = {name for name in before if f"backbone.{name}" in after}
    changed = {name for name in changed if not torch.equal(before[name], after[f"backbone.{name}"])}
    assert changed and all(name.startswith(("greenmim.encoder.layers.2.", "greenmim.layernorm")) for name in changed)
    with pytest.raises(ValueError, match="`freeze_stages` is 4; the model has 3 stages"):
        segment(script, tmp_path / "refused", *common, "--freeze_stages", 4)


def test_layers_of_the_backbone_learn_less_the_lower_they_are(pretrained):
    model = build_head(str(pretrained), "upernet", dict(enumerate(NAMES)), head_overrides={"hidden_size": 8})
    groups = parameter_groups(model, 1.0, 0.05, layer_decay=0.5)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    rates = {name: rate_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(rates) == len(rate_of)
    # Six blocks: the embedding is seven layers below the head.
    for part, expected in {
        "backbone.greenmim.embeddings.": 0.5**7,
        "backbone.greenmim.encoder.layers.0.blocks.0.": 0.5**6,
        "backbone.greenmim.encoder.layers.2.blocks.1.": 0.5,
        "backbone.greenmim.encoder.layers.0.downsample.": 0.5**5,
        "backbone.greenmim.layernorm.": 1,
        "backbone.hidden_states_norms.": 1,
        "decode_head.": 1,
        "auxiliary_head.": 1,
    }.items():
        found = {rate for name, rate in rates.items() if name.startswith(part)}
        assert found == {expected}, part


# Bad input


def test_what_has_no_counterpart_is_skipped_and_counted(shapes, tmp_path, caplog):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    (data / "masks" / "002.png").unlink()
    (data / "images" / "004.png").unlink()
    (data / "images" / "005.png").unlink()
    records = pairs_of(str(data), "train_dir")
    assert len(records) == 5
    assert all(Path(record["image"]["path"]).name == Path(record["mask"]["path"]).name for record in records)
    assert "skipped 1 image(s) without mask: 002." in messages(caplog)
    assert "skipped 2 mask(s) without image: 004, 005." in messages(caplog)


def test_folders_without_pairs(shapes, tmp_path):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    for path in sorted((data / "masks").iterdir()):
        path.rename(path.with_name(f"mask_{path.name}"))
    with pytest.raises(ValueError, match="no image in images/ has a mask of its name in masks/"):
        pairs_of(str(data), "train_dir")
    shutil.rmtree(data / "masks")
    with pytest.raises(ValueError, match=r"`train_dir` is .* which has no folder 'masks'"):
        pairs_of(str(data), "train_dir")
    shutil.copytree(shapes[0] / "masks", data / "masks")
    shutil.copy(data / "images" / "000.png", data / "images" / "000.jpg")
    with pytest.raises(ValueError, match=r"000.* have one name"):
        pairs_of(str(data), "train_dir")


def test_bad_pairs_are_skipped_and_counted(script, shapes, pretrained, tmp_path, caplog):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    Image.new("L", (9, 9)).save(data / "masks" / "001.png")
    write_broken(data / "masks" / "002.png")
    noise_image(0).save(data / "masks" / "003.png")
    common = ("--model_name_or_path", pretrained, "--train_dir", data, "--do_train")
    both = ("--validation_dir", data, "--do_eval")
    output = segment(script, tmp_path / "run", *common, *both, "--num_train_epochs", 2, "--max_steps", -1)
    assert "3 of 8 masks cannot be used" in messages(caplog)
    assert "its mask has 9x9 px, but it has 48x40 px" in messages(caplog)
    assert "it is a picture in colours" in messages(caplog)
    assert results_of(output)["eval_mean_iou"] > 0
    assert [e for e in state_of(output)["log_history"] if "loss" in e][-1]["unreadable_images"] == 3


def test_class_numbers_beyond_the_names(script, shapes, pretrained, tmp_path):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    (data / "labels.txt").write_text("ground\ndisc\nsquare")
    common = ("--model_name_or_path", pretrained, "--train_dir", data, "--do_train")
    with pytest.raises(ValueError, match=r"class number\(s\) 3, but there are 3 classes, 0 to 2"):
        segment(script, tmp_path / "run", *common)
    segment(script, tmp_path / "ignored", *common, "--ignore_index", 3)


def test_absent_classes_are_named(script, shapes, pretrained, tmp_path, caplog):
    (tmp_path / "labels.txt").write_text("\n".join([*NAMES, "star", "moon"]))
    common = ("--model_name_or_path", pretrained, *folders(shapes), "--do_train")
    segment(script, tmp_path / "run", *common, "--labels_file", tmp_path / "labels.txt")
    assert "`train_dir`: no pixel of 8 masks is of the class(es) star, moon." in messages(caplog)


def test_masks_in_which_everything_is_ignored(script, shapes, pretrained, tmp_path, caplog):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    for path in sorted((data / "masks").iterdir())[2:]:
        Image.new("L", Image.open(path).size, 255).save(path)
    common = ("--model_name_or_path", pretrained, "--train_dir", data, "--do_train", "--learning_rate", 0.01)
    more = ("--per_device_train_batch_size", 2, "--max_steps", 8, "--validation_dir", data, "--do_eval")
    output = segment(script, tmp_path / "run", *common, *more)
    assert "in 6 of 8 masks everything is ignored" in messages(caplog)
    losses = [entry["loss"] for entry in state_of(output)["log_history"] if "loss" in entry]
    # A batch without a labelled pixel has the loss 0 and breaks nothing.
    assert 0 in losses and max(losses) > 0.5 and np.isfinite(losses).all()
    assert all(value.isfinite().all() for value in weights(output).values() if value.is_floating_point())
    for path in sorted((data / "masks").iterdir()):
        Image.new("L", Image.open(path).size, 255).save(path)
    with pytest.raises(ValueError, match=r"in all masks everything is ignored. `ignore_index` is 255"):
        segment(script, tmp_path / "refused", *common)


@pytest.mark.parametrize(
    "given, message",
    [
        (("--crop_size", 0), "`crop_size` is 0"),
        (("--scale_range", 2, 1), r"`scale_range` is \[2.0, 1.0\]"),
        (("--eval_overlap", 1), "`eval_overlap` is 1.0"),
        (("--max_class_share", 0), "`max_class_share` is 0.0"),
        (("--per_device_train_batch_size", 1), "`per_device_train_batch_size` is 1"),
        (("--per_device_train_batch_size", 99), "`per_device_train_batch_size` is 99"),
        (("--head", "none"), "`head` is 'none'"),
        (("--recipe", "none"), "`recipe` is 'none'"),
        (("--head_overrides", "hidden=3"), "`head_overrides` names"),
        (("--tile", 64), "`tile` is 64"),
        (("--decode_once", "true"), "`decode_once` is True"),
        (("--config_name", "tiny"), "exactly one of them"),
    ],
)
def test_arguments_that_do_not_fit(script, shapes, pretrained, tmp_path, given, message):
    common = ("--model_name_or_path", pretrained, *folders(shapes), "--do_train")
    with pytest.raises(ValueError, match=message):
        segment(script, tmp_path, *common, *given)


def test_runs_that_lack_something(script, shapes, pretrained, finished, tmp_path):
    for argument in ("config_overrides", "head_overrides"):
        given = ("--model_name_or_path", finished, f"--{argument}", "window_size=4", *folders(shapes), "--do_eval")
        with pytest.raises(ValueError, match=f"`{argument}` is .* a finished model"):
            segment(script, tmp_path, *given)
    with pytest.raises(ValueError, match=r"`head` is 'mask2former', but .* a finished model, .* its head, 'upernet'"):
        mask2former = ("--head", "mask2former", "--validation_dir", shapes[1], "--do_eval")
        segment(script, tmp_path, "--model_name_or_path", finished, *mask2former)
    with pytest.raises(ValueError, match="Nothing to do"):
        segment(script, tmp_path, "--model_name_or_path", pretrained, *folders(shapes))
    with pytest.raises(ValueError, match="There are no images"):
        segment(script, tmp_path, "--model_name_or_path", pretrained, "--do_train")
    with pytest.raises(ValueError, match=r"`model_name_or_path` is .* which has no trained head"):
        segment(script, tmp_path, "--model_name_or_path", pretrained, "--validation_dir", shapes[1], "--do_eval")
    with pytest.raises(ValueError, match="no images for `do_train`: give `train_dir`"):
        segment(script, tmp_path, "--model_name_or_path", finished, "--validation_dir", shapes[1], "--do_train")


def test_every_mask_is_bad(script, shapes, pretrained, tmp_path):
    data = shutil.copytree(shapes[0], tmp_path / "data")
    for path in (data / "masks").iterdir():
        Image.new("L", (9, 9)).save(path)
    with pytest.raises(ValueError, match=r"`train_dir` has no pair that can be used: .*9x9 px"):
        segment(script, tmp_path / "run", "--model_name_or_path", pretrained, "--train_dir", data, "--do_train")
    transform = CropTransform((8, 8), 3, (1.0, 1.0), 255)
    with pytest.raises(ValueError, match="its mask has 5x4 px"):
        transform(noise_image(0), np.zeros((4, 5), np.int32), np.random.default_rng(0))


# Pictures


def test_maps_of_many_classes_keep_their_numbers(tmp_path):
    classes = np.arange(300).reshape(15, 20)
    save_class_map(classes, 300, tmp_path / "deep.png")
    assert (np.asarray(Image.open(tmp_path / "deep.png")) == classes).all()
    save_class_map(classes % 256, 256, tmp_path / "palette.png")
    mask = Image.open(tmp_path / "palette.png")
    assert mask.mode == "P" and (np.asarray(mask) == classes % 256).all()
    assert (np.asarray(mask.convert("RGB")) == class_colours(256)[classes % 256]).all()


def test_overlays_colour_classes_only():
    pixels = np.full((2, 2, 3), 100, np.uint8)
    drawn = np.asarray(overlay(pixels, np.array([[0, 1], [255, -1]]), 2))
    assert (drawn[1] == 100).all()
    assert np.abs(drawn[0].astype(int) - (class_colours(2).astype(int) + 100) / 2).max() <= 1


def test_colours_of_neighbouring_numbers_differ():
    colours = class_colours(20).astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1)[~np.eye(20, dtype=bool)]
    assert distances.min() > 20


# Processes, precision


@pytest.mark.slow
def test_processes_count_each_image_once(finished, shapes, tmp_path):
    # Three images for two processes: the sampler repeats one.
    more = ("--model_name_or_path", finished, "--validation_dir", shapes[1], "--do_eval", "--do_predict")
    run_in_processes(SCRIPT, flags(tmp_path, *more, "--per_device_eval_batch_size", 1))
    for name, value in results_of(tmp_path).items():
        if "iou" in name or "accuracy" in name or name == "eval_loss":
            assert value == pytest.approx(results_of(finished)[name])
    assert len(list((tmp_path / "predictions" / "masks").iterdir())) == 3


def test_gradient_checkpointing_changes_nothing(script, shapes, pretrained, tmp_path):
    common = ("--model_name_or_path", pretrained, *folders(shapes), "--do_train", "--drop_path_rate", 0.2)
    plain = segment(script, tmp_path / "plain", *common)
    saving = segment(script, tmp_path / "saving", *common, "--gradient_checkpointing", "true")
    first, second = weights(plain), weights(saving)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)


def test_mixed_precision_trains_and_evaluates(script, shapes, pretrained, tmp_path):
    common = ("--model_name_or_path", pretrained, *folders(shapes), "--do_train", "--do_eval", "--bf16", "true")
    output = segment(script, tmp_path, *common)
    assert weights(output)["decode_head.classifier.weight"].dtype == torch.float32
    assert np.isfinite(results_of(output)["eval_loss"])


# Learning


@pytest.mark.slow
def test_drawn_shapes_are_learned(script, tmp_path):
    """200 steps of a small encoder from scratch."""
    train = write_shapes(tmp_path / "train", 64, size=(96, 96), radius=(14, 24))
    validation = write_shapes(tmp_path / "validation", 16, seed=1, size=(96, 96), radius=(14, 24))
    scratch = "image_size=64,embed_dim=32,depths=[2,2],num_heads=[2,4]"
    output = segment(
        script,
        tmp_path / "run",
        *(
            "--config_name",
            "tiny",
            "--config_overrides",
            scratch,
            "--train_dir",
            train,
            "--validation_dir",
            validation,
        ),
        *("--head_overrides", "hidden_size=48", "--do_train", "--do_eval", "--max_steps", 200, "--crop_size", 64),
        *("--per_device_train_batch_size", 8, "--learning_rate", 3e-3, "--layer_decay", 1, "--drop_path_rate", 0),
    )
    assert results_of(output)["eval_mean_iou"] > 0.95
