"""The script run_image_classification.py: data, three modes, flags, outputs, exact resumption, several processes."""

import json
import os
import shlex
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Value
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMForImageClassification
from tests.training_helpers import (
    OVERRIDES,
    assert_same_weights,
    classification_flags,
    classify,
    coloured_image,
    encoded,
    kill_after_checkpoint,
    messages,
    predictions_of,
    results_of,
    run_in_processes,
    start,
    state_of,
    weights,
    write_broken,
    write_class_folders,
    write_images,
    write_pretrained,
)
from training_greenmim.classification.recipes import RECIPES, recipe_defaults
from training_greenmim.data.transforms import EvalTransform
from training_greenmim.runs.arguments import ClassificationTrainingArguments, MIMTrainingArguments, parse_arguments


KINDS = (
    run_image_classification.ModelArguments,
    run_image_classification.DataArguments,
    ClassificationTrainingArguments,
)
NAMES = ["blue", "green", "red"]


def parse(argv: list) -> tuple:
    return parse_arguments(KINDS, [str(value) for value in argv], recipe_defaults)


def card_of(output: Path) -> str:
    return (output / "README.md").read_text()


def logged(output: Path, name: str) -> list[float]:
    return [entry[name] for entry in state_of(output)["log_history"] if name in entry]


def metrics_of(output: Path, prefix: str = "eval_") -> dict[str, float]:
    """What an evaluation found, without its times."""
    return {
        name.removeprefix(prefix): value
        for name, value in results_of(output).items()
        if name.startswith(prefix) and not name.endswith(("runtime", "_per_second", "preparation_time"))
    }


def probabilities_of(output: Path, names: list[str]) -> np.ndarray:
    return np.array([[float(line[name]) for name in names] for line in predictions_of(output)])


@pytest.fixture(scope="module", autouse=True)
def own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`train`: 21 images of three classes, `held-out`: 7 and an unreadable one, `unlabelled`: 3 and one."""
    folder = tmp_path_factory.mktemp("folders")
    write_class_folders(folder / "train", {"red": 9, "green": 7, "blue": 5})
    write_class_folders(folder / "held-out", {"red": 2, "green": 3, "blue": 2}, first_seed=500)
    write_broken(folder / "held-out" / "green" / "001-broken.png")
    write_images(folder / "unlabelled" / "deep", 3, first_seed=900)
    write_broken(folder / "unlabelled" / "broken.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A pre-training checkpoint: its weights are random, but its norms are not what they start as."""
    return write_pretrained(tmp_path_factory.mktemp("pretrained"))


def train_and_evaluate(folders: Path) -> tuple:
    return ("--train_dir", folders / "train", "--validation_dir", folders / "held-out", "--do_train", "--do_eval")


@pytest.fixture(scope="module")
def finetuned(folders, pretrained, tmp_path_factory) -> Path:
    """A run of three epochs with averaged weights."""
    return classify(
        tmp_path_factory.mktemp("finetuned"),
        *("--model_name_or_path", pretrained, *train_and_evaluate(folders), "--do_predict", "--num_train_epochs", 3),
        *("--learning_rate", 0.005, "--ema_decay", 0.8),
    )


# Fine-tuning and its outputs


def test_outputs_at_the_end(finetuned):
    expected = {
        *("README.md", "all_results.json", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("trainer_state.json", "loss_curve.png", "predictions.csv", "ema", "eval_confusion_matrix.png"),
        "eval_ema_confusion_matrix.png",
    }
    assert expected <= set(os.listdir(finetuned))
    assert state_of(finetuned)["global_step"] == 15, "five whole batches of 4 an epoch"
    for name in ("loss_curve.png", "eval_confusion_matrix.png"):
        Image.open(finetuned / name).load()


def test_metrics_suit_the_number_of_classes_and_leave_out_unreadable_images(finetuned):
    metrics = metrics_of(finetuned)
    names = {"accuracy", "balanced_accuracy", "macro_f1", "loss", "unreadable"}
    assert set(metrics) == {*names, *(f"ema_{name}" for name in names)} and metrics["unreadable"] == 1
    assert metrics["accuracy"] > 0.7, "colours are easy"


def test_predictions_are_those_that_were_evaluated(finetuned, folders):
    lines = predictions_of(finetuned)
    paths = sorted(str(path) for path in (folders / "held-out").rglob("*.png"))
    assert [line["image"] for line in lines] == paths and len(paths) == 8
    assert list(lines[0]) == ["image", "label", "prediction", *NAMES]
    assert [line["label"] for line in lines] == [Path(path).parent.name for path in paths]
    (broken,) = [line for line in lines if "broken" in line["image"]]
    assert (broken["label"], broken["prediction"], *(broken[name] for name in NAMES)) == ("green", "", "", "", "")
    readable = [line for line in lines if line is not broken]
    probabilities = np.array([[float(line[name]) for name in NAMES] for line in readable])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=3e-6)
    predictions = [NAMES[number] for number in probabilities.argmax(axis=1)]
    assert [line["prediction"] for line in readable] == predictions
    labels = [line["label"] for line in readable]
    metrics = metrics_of(finetuned)
    assert metrics["accuracy"] == np.mean([label == guess for label, guess in zip(labels, predictions)])
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    losses = -np.log([row[NAMES.index(label)] for row, label in zip(probabilities, labels)])
    assert metrics["loss"] == pytest.approx(losses.mean(), abs=1e-4)


def test_saved_models_have_the_label_names(finetuned):
    for folder in (finetuned, finetuned / "ema"):
        model, loading = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert isinstance(model, GreenMIMForImageClassification)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
        processor = AutoImageProcessor.from_pretrained(folder)
        assert dict(processor.size) == {"shortest_edge": 36} and processor.do_center_crop
        assert (processor.crop_size["height"], processor.crop_size["width"]) == (32, 32)
        assert processor.resample == Image.Resampling.BICUBIC


def test_pre_trained_encoder_is_where_fine_tuning_starts(pretrained, folders, tmp_path):
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", pretrained, "--train_dir", folders / "train", "--do_train", "--max_steps", 1),
        *("--learning_rate", 1e-30, "--weight_decay", 0),
    )
    before, after = weights(pretrained), weights(output)
    shared = [name for name in after if name.startswith("greenmim.")]
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)


def test_model_card(finetuned, folders):
    card = card_of(finetuned)
    assert "(GreenMIMForImageClassification) of 3 classes: blue, green, red." in card
    assert "`train`: 21 for training and 8 for evaluation. 1 of them could not be read." in card
    assert "| steps | 15 |" in card and "| layer_decay | 1.0 |" in card and "AdamW, betas 0.9/0.999" in card
    assert f"| eval_accuracy | {results_of(finetuned)['eval_accuracy']:.5g} |" in card
    assert "(eval_confusion_matrix.png)" in card and "(loss_curve.png)" in card
    loaded = ModelCard.load(finetuned / "README.md")
    assert loaded.data.pipeline_tag == "image-classification" and loaded.data.library_name == "transformers"
    assert loaded.data.tags == ["greenmim"] and loaded.data.license is None
    (command,) = [line for line in card.splitlines() if line.startswith("python run_image_classification.py ")]
    _, data, args = parse(shlex.split(command)[2:])
    assert data.train_dir == str(folders / "train") and args.output_dir == str(finetuned) and args.ema_decay == 0.8


def test_pipelines(finetuned):
    lines = [line for line in predictions_of(finetuned) if line["prediction"]]
    classifier = pipeline("image-classification", model=str(finetuned))
    for line, answer in zip(lines, classifier([line["image"] for line in lines])):
        assert answer[0]["label"] == line["prediction"]
        scores = {entry["label"]: entry["score"] for entry in answer}
        # Pillow resizes whole images there and crops of them here.
        assert scores == pytest.approx({name: float(line[name]) for name in NAMES}, abs=0.02)
    features = pipeline("image-feature-extraction", model=str(finetuned))(lines[0]["image"])
    assert np.shape(features) == (1, 16, 16)


def evaluated(output: Path, model: Path, *more) -> Path:
    return classify(output, "--model_name_or_path", model, "--do_eval", *more)


@pytest.mark.parametrize("prefix", ["", "ema_"])
def test_evaluation_alone_finds_the_same(finetuned, folders, tmp_path, prefix):
    again = evaluated(tmp_path / "out", finetuned / prefix[:-1], "--validation_dir", folders / "held-out")
    before = {name: value for name, value in metrics_of(finetuned, f"eval_{prefix}").items() if "ema_" not in name}
    assert metrics_of(again) == pytest.approx(before, rel=1e-6)
    assert not (again / "model.safetensors").exists()


def test_evaluation_goes_by_the_names_of_classes(finetuned, folders, tmp_path):
    # Without blue, green and red have other numbers in the folder.
    for name in ("green", "red"):
        shutil.copytree(folders / "held-out" / name, tmp_path / "data" / name)
    again = evaluated(tmp_path / "out", finetuned, "--validation_dir", tmp_path / "data", "--do_predict")
    expected = [line for line in predictions_of(finetuned) if line["label"] != "blue"]
    found = predictions_of(again)
    columns = ("label", "prediction", *NAMES)
    assert [[line[name] for name in columns] for line in found] == [[line[c] for c in columns] for line in expected]
    readable = [line for line in expected if line["prediction"]]
    metrics = metrics_of(again)
    assert metrics["accuracy"] == np.mean([line["label"] == line["prediction"] for line in readable])
    assert metrics["loss"] == pytest.approx(
        -np.mean([np.log(float(line[line["label"]])) for line in readable]), abs=1e-4
    )


def normalized(paths: list[str], share: float = 224 / 256) -> torch.Tensor:
    """Images as the script evaluates them."""
    images = torch.stack([EvalTransform((32, 32), 3, share)(path) for path in paths])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (images / 255 - mean) / std


def test_images_without_labels_are_predicted(finetuned, folders, tmp_path):
    output = classify(
        tmp_path / "out", "--model_name_or_path", finetuned, "--test_dir", folders / "unlabelled", "--do_predict"
    )
    lines = predictions_of(output)
    assert list(lines[0]) == ["image", "prediction", *NAMES]
    assert [Path(line["image"]).name for line in lines] == ["broken.png", "000.png", "001.png", "002.png"]
    assert [bool(line["prediction"]) for line in lines] == [False, True, True, True]
    model = AutoModelForImageClassification.from_pretrained(finetuned).eval()
    with torch.no_grad():
        expected = model(normalized([line["image"] for line in lines[1:]])).logits.softmax(dim=1)
    found = [[float(line[name]) for name in NAMES] for line in lines[1:]]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_whole_images_are_evaluated_on_request(finetuned, folders, tmp_path):
    given = ("--model_name_or_path", finetuned, "--test_dir", folders / "unlabelled", "--do_predict")
    lines = predictions_of(classify(tmp_path / "out", *given, "--crop_pct", 1))[1:]
    model = AutoModelForImageClassification.from_pretrained(finetuned).eval()
    with torch.no_grad():
        expected = model(normalized([line["image"] for line in lines], share=1.0)).logits.softmax(dim=1)
    found = [[float(line[name]) for name in NAMES] for line in lines]
    np.testing.assert_allclose(found, expected, atol=2e-6)


# Probes


def test_linear_probe(pretrained, folders, tmp_path):
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", pretrained, "--mode", "linear", *train_and_evaluate(folders)),
        *("--num_train_epochs", 4, "--learning_rate", 0.5, "--ema_decay", 0.5),
    )
    before, after = weights(pretrained), weights(output)
    encoder = [name for name in after if name.startswith("greenmim.")]
    assert len(encoder) == len(after) - 2 and all(torch.equal(before[name], after[name]) for name in encoder)
    assert after["classifier.weight"].shape == (3, 16)
    for prefix, folder in (("eval_", output), ("eval_ema_", output / "ema")):
        again = evaluated(tmp_path / prefix, folder, "--validation_dir", folders / "held-out")
        found = {name: value for name, value in metrics_of(output, prefix).items() if "ema_" not in name}
        assert metrics_of(again) == pytest.approx(found, rel=1e-4), "the folded head computes the same"
    assert "| optimizer | LARS |" in card_of(output)


def brute_force_neighbours(bank, labels, queries, k, temperature):
    rows = []
    for query in queries:
        similarities = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-similarities)[:k]
        votes = np.exp(similarities[nearest] / temperature)
        rows.append([votes[labels[nearest] == number].sum() / votes.sum() for number in range(3)])
    return np.array(rows)


@torch.no_grad()
def pooled_features(model, paths: list[str]) -> np.ndarray:
    return model.greenmim(normalized(paths)).last_hidden_state.mean(dim=1).numpy().astype(np.float64)


def test_nearest_neighbours(finetuned, folders, tmp_path):
    shutil.copytree(folders / "train", tmp_path / "train")
    write_broken(tmp_path / "train" / "red" / "broken.png")  # takes no part
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", finetuned, "--mode", "knn", "--train_dir", tmp_path / "train"),
        *("--validation_dir", folders / "held-out", "--do_eval", "--do_predict", "--knn_k", 5),
    )
    model = AutoModelForImageClassification.from_pretrained(finetuned).eval()
    bank = sorted(str(path) for path in (folders / "train").rglob("*.png"))
    labels = np.array([NAMES.index(Path(path).parent.name) for path in bank])
    lines = [line for line in predictions_of(output) if line["prediction"]]
    queries = pooled_features(model, [line["image"] for line in lines])
    expected = brute_force_neighbours(pooled_features(model, bank), labels, queries, 5, 0.07)
    found = np.array([[float(line[name]) for name in NAMES] for line in lines])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    guesses = [NAMES[number] for number in expected.argmax(axis=1)]
    assert metrics_of(output)["accuracy"] == np.mean([line["label"] == guess for line, guess in zip(lines, guesses)])
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_features_of_an_early_stage_make_a_model_that_reloads(pretrained, folders, tmp_path, mode):
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", pretrained, "--mode", mode, "--feature_stage", 1, *train_and_evaluate(folders)),
        *("--max_steps", 4, "--learning_rate", 0.01),
    )
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.depths == [2] and model.classifier.in_features == 8
    again = evaluated(tmp_path / "again", output, "--validation_dir", folders / "held-out")
    assert metrics_of(again) == pytest.approx(metrics_of(output), rel=1e-4)
    stage, before = weights(output), weights(pretrained)
    untouched = [torch.equal(before[name], stage[name]) for name in stage if ".layers." in name]
    assert all(untouched) if mode == "linear" else not any(untouched)


def test_features_of_an_early_stage_have_neighbours(pretrained, folders, tmp_path):
    # Nine classes, which are more than there are features.
    write_class_folders(tmp_path / "data", {f"class {number}": 3 for number in range(9)})
    options = ("--model_name_or_path", pretrained, "--mode", "knn", "--feature_stage", 1, "--knn_k", 3)
    data = ("--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "data")
    output = classify(tmp_path / "out", *options, *data, "--do_eval")
    assert {"accuracy", "top_5_accuracy", "loss"} <= set(metrics_of(output))


# Other architectures


@pytest.fixture(scope="module", params=["swin", "vit"])
def other(request, tmp_path_factory) -> Path:
    """A small classifier of Transformers for two other classes."""
    torch.manual_seed(0)
    if request.param == "swin":
        values = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
        model = SwinForImageClassification(SwinConfig(image_size=32, **values))
    else:
        values = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = ViTForImageClassification(ViTConfig(image_size=32, intermediate_size=32, **values))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_other_architectures_learn(other, folders, tmp_path, mode):
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", other, "--mode", mode, "--train_dir", folders / "train", "--do_train"),
        *("--test_dir", folders / "unlabelled", "--do_predict", "--max_steps", 3),
        *("--learning_rate", 0.01, "--ignore_mismatched_sizes", "true"),
    )
    before, after = weights(other), weights(output)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed > {"classifier.weight", "classifier.bias"} if mode == "finetune" else len(changed) == 2
    again = classify(
        tmp_path / "again", "--model_name_or_path", output, "--test_dir", folders / "unlabelled", "--do_predict"
    )
    first, second = (
        [[float(line[name] or "nan") for name in NAMES] for line in predictions_of(folder)]
        for folder in (output, again)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert AutoModelForImageClassification.from_pretrained(output).config.id2label == dict(enumerate(NAMES))


def test_other_architectures_have_neighbours(other, folders, tmp_path):
    options = ("--model_name_or_path", other, "--mode", "knn", "--knn_k", 3, "--train_dir", folders / "train")
    output = classify(tmp_path / "out", *options, "--test_dir", folders / "train" / "red", "--do_predict")
    assert [line["prediction"] for line in predictions_of(output)] == ["red"] * 9, "its nearest neighbour is itself"


def test_layers_of_vit_and_swin_have_rates_of_their_own(other, folders, tmp_path):
    options = ("--model_name_or_path", other, "--ignore_mismatched_sizes", "true", "--do_train", "--max_steps", 3)
    options += ("--train_dir", folders / "train")
    alike, by_layer = (
        load_file(classify(tmp_path / str(decay), *options, "--layer_decay", decay) / "model.safetensors")
        for decay in (1.0, 0.5)
    )
    first = next(name for name in alike if name.endswith("embeddings.patch_embeddings.projection.weight"))
    start = load_file(other / "model.safetensors")[first]
    moved, moved_less = ((weights[first] - start).abs().mean() for weights in (alike, by_layer))
    assert 0 < moved_less < 0.5 * moved


def test_stages_of_other_architectures_are_not_known(other, folders, tmp_path):
    options = ("--model_name_or_path", other, "--mode", "knn", "--train_dir", folders / "train", "--do_eval")
    with pytest.raises(ValueError, match=r"`feature_stage` is 1, which needs a GreenMIM model"):
        classify(tmp_path / "out", *options, "--feature_stage", 1)


# Data


def write_parquet(folder: Path, labels: list, feature, split: str = "train", columns=("photo", "species")) -> Path:
    """A data set of images whose colour tells the label."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {value: number for number, value in enumerate(sorted(set(labels)))}
    photos = [
        {"path": f"{split}-{index}.png", "bytes": encoded(coloured_image(index, numbers[label] % 3))}
        for index, label in enumerate(labels)
    ]
    features = datasets.Features({columns[0]: ImageFeature(), columns[1]: feature})
    data = datasets.Dataset.from_dict({columns[0]: photos, columns[1]: labels}, features)
    data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_data_set_with_labels_that_are_numbers(pretrained, tmp_path):
    feature, values, names = Value("int64"), [2, 10], ["2", "10"]
    data = write_parquet(tmp_path / "data", values * 5, feature)
    write_parquet(data, values * 2, feature, "test")
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", pretrained, "--dataset_name", data, "--image_column_name", "photo"),
        *("--label_column_name", "species", "--do_train", "--do_eval", "--do_predict", "--max_steps", 2),
    )
    lines = predictions_of(output)
    assert [line["label"] for line in lines] == names * 2 and list(lines[0])[3:] == names
    assert [line["image"] for line in lines] == [f"test-{index}.png" for index in range(4)]
    assert {"roc_auc", "accuracy"} <= set(metrics_of(output)) and "10 for training and 4 for" in card_of(output)


def test_test_part_may_keep_its_labels_secret(finetuned, tmp_path):
    feature = ClassLabel(names=["blue", "green", "red"])
    data = write_parquet(tmp_path / "data", [2, 0, 1], feature, "validation")
    write_parquet(data, [-1, -1], feature, "test")
    output = evaluated(tmp_path / "out", finetuned, "--dataset_name", data, "--do_predict")
    assert list(predictions_of(output)[0]) == ["image", "prediction", *NAMES]
    assert [line["image"] for line in predictions_of(output)] == ["test-0.png", "test-1.png"]
    assert "loss" in metrics_of(output)


def load_data_of(*more) -> object:
    _, data, args = parse(classification_flags(Path("nowhere"), "--config_name", "tiny", *more))
    return run_image_classification.load_data(data, args)


def paths_of(records) -> set[str]:
    return {image["path"] for image in records["image"]}


def test_a_share_is_held_out_of_the_training_images(folders):
    options = ("--train_dir", folders / "train", "--do_train", "--do_eval", "--train_val_split", 0.3)
    first, again, other = (load_data_of(*options, "--seed", seed) for seed in (1, 1, 2))
    train, held_out = paths_of(first.train.records), paths_of(first.validation.records)
    assert len(train) == 14 and len(held_out) == 7 and not train & held_out
    assert Counter(first.validation.records["label"]) == {0: 2, 1: 2, 2: 3}
    assert paths_of(again.validation.records) == held_out != paths_of(other.validation.records)
    alone = load_data_of("--train_dir", folders / "train", "--do_eval", "--train_val_split", 0.3, "--seed", 1)
    assert paths_of(alone.validation.records) == held_out, "evaluation alone finds the same images"


def test_all_images_train_when_nothing_is_evaluated(folders):
    parts = load_data_of("--train_dir", folders / "train", "--do_train")
    assert len(parts.train.records) == 21 and parts.validation is None and parts.test is None


def test_default_data_are_the_elpv_photographs_of_which_none_is_trained_and_tested_on():
    parts = load_data_of("--do_train", "--do_eval", "--do_predict")
    train, test = paths_of(parts.train.records), paths_of(parts.validation.records)
    assert len(train) + len(test) == 2624 and not train & test and abs(len(test) - 656) <= 1
    assert paths_of(parts.test.records) == test
    folder = Path(next(iter(test))).parents[1]
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    defective = {str(folder / name): float(probability) >= 0.5 for name, probability, _ in lines}
    for part in (parts.train, parts.validation):
        labels = [part.records.features["label"].names[number] == "defective" for number in part.records["label"]]
        assert labels == [defective[image["path"]] for image in part.records["image"]]
        assert np.mean(labels) == pytest.approx(np.mean(list(defective.values())), abs=1e-3), "the same share"
    kinds = (run_mim.ModelArguments, run_mim.DataArguments, MIMTrainingArguments)
    _, data, args = parse_arguments(kinds, ["--output_dir", "nowhere", "--do_train", "--use_cpu", "true"])
    assert paths_of(run_mim.load_data(data, args)[0]) == train


def test_a_few_elpv_photographs(tmp_path):
    output = classify(
        tmp_path / "out",
        *("--config_name", "tiny", "--config_overrides", OVERRIDES, "--do_train", "--do_eval", "--do_predict"),
        *("--max_train_samples", 8, "--max_eval_samples", 6, "--max_steps", 1),
    )
    card = card_of(output)
    assert "ELPV" in card and "8 for training and 6 for evaluation" in card and "The split is fixed" in card
    assert ModelCard.load(output / "README.md").data.license == "cc-by-nc-sa-4.0"
    lines = predictions_of(output)
    assert len(lines) == 6 and {line["label"] for line in lines} == {"functional", "defective"}
    assert "roc_auc" in metrics_of(output) and list(lines[0])[3:] == ["functional", "defective"]


# Arguments and recipes


PUBLISHED = {
    "swin-base": (1.25e-3, 0.9, 0.1, 2.5e-7, 2.5e-7),
    "swin-large": (1e-3, 0.8, 0.3, 3.5e-7, 2e-7),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    rate, layer_decay, drop_path_rate, lowest, first = PUBLISHED[name]
    flags = ["--recipe", name, "--config_name", "base", "--per_device_train_batch_size", 96]
    model, _, args = parse(classification_flags(Path("nowhere"), *flags, "--gradient_accumulation_steps", 8))
    assert args.total_batch_size == 768 and args.learning_rate == pytest.approx(rate * 768 / 512)
    assert (args.layer_decay, model.drop_path_rate) == (layer_decay, drop_path_rate)
    assert (args.min_learning_rate, args.warmup_learning_rate) == (lowest, first)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.05, 5.0)
    assert (args.num_train_epochs, args.warmup_steps, args.get_warmup_steps(1000)) == (100, 0.2, 200)
    assert (args.rand_augment, args.color_jitter, args.random_erasing) == ("m9-n2-mstd0.5-inc1", 0.4, 0.25)
    assert (args.mixup, args.cutmix, args.mixup_switch_probability) == (0.8, 1.0, 0.5)
    assert args.label_smoothing_factor == 0.1 and args.min_crop_scale == 0.08 and not args.balance and not args.lars


def test_recipe_reaches_the_optimizer(pretrained, folders, tmp_path):
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", pretrained, "--train_dir", folders / "train", "--do_train"),
        *("--recipe", "swin-base", "--max_steps", 5, "--warmup_steps", 2),
    )
    scale = 4 / 512
    rates = logged(output, "learning_rate")
    assert rates[0] == pytest.approx(2.5e-7 * scale) and rates[-1] == pytest.approx(2.5e-7 * scale)
    assert max(rates) == rates[2] == pytest.approx(1.25e-3 * scale)
    assert AutoModelForImageClassification.from_pretrained(output).config.drop_path_rate == 0.1
    card = card_of(output)
    for line in ("layer_decay | 0.9", "mixup | 0.8", "cutmix | 1.0", "rand_augment | m9-n2-mstd0.5-inc1"):
        assert f"| {line} |" in card


def test_flags_win_over_files_which_win_over_recipes(tmp_path):
    values = {"recipe": "swin-large", "config_name": "tiny", "mixup": 0.3, "layer_decay": 0.5, "use_cpu": True}
    values |= {"output_dir": str(tmp_path / "out"), "do_train": True, "train_dir": "photos", "metrics": ["accuracy"]}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    model, data, args = parse([path, "--layer_decay", 0.7, "--num_train_epochs", 7])
    assert (args.mixup, args.layer_decay, args.num_train_epochs, args.cutmix) == (0.3, 0.7, 7, 1.0)
    assert (model.drop_path_rate, data.metrics, data.train_dir) == (0.3, ["accuracy"], "photos")
    assert parse([path, "--recipe", "small-data"])[2].cutmix == 0
    path.write_text(yaml.safe_dump({**values, "learning_rate": 0.02, "drop_path_rate": 0.0}))
    model, _, args = parse([path])
    assert args.learning_rate == 0.02 and args.base_learning_rate is None and model.drop_path_rate == 0


@pytest.mark.parametrize("name", [None, *RECIPES])
def test_learning_rate_wins_over_every_recipe(name):
    recipe = [] if name is None else ["--recipe", name]
    flags = classification_flags(Path("nowhere"), "--config_name", "tiny", *recipe, "--learning_rate", 0.03)
    assert parse(flags)[2].learning_rate == 0.03


def test_default_recipe_depends_on_the_mode():
    small, linear = (
        parse(classification_flags(Path("nowhere"), "--config_name", "tiny", "--mode", mode))[2]
        for mode in ("finetune", "linear")
    )
    assert (small.balance, small.layer_decay, small.lars) == (True, 1.0, False)
    assert (linear.balance, linear.layer_decay, linear.lars) == (False, 1.0, True)
    assert linear.learning_rate == pytest.approx(0.1 * 4 / 256), "MAE's 0.1 for 256 images"


@pytest.mark.parametrize("text", ["", "{}", "# nothing yet\n"])
def test_a_file_may_be_empty(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert parse([path, *classification_flags(tmp_path, "--config_name", "tiny")])[0].config_name == "tiny"


def test_help_tells_what_deviates_from_the_published_augmentation(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "swin-base and swin-large as published" in text and "Posterizing keeps at least one bit." in text


def test_overrides_of_the_configuration(pretrained, folders, tmp_path, caplog):
    options = ("--train_dir", folders / "train", "--do_train", "--max_steps", 1)
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", pretrained, *options, "--config_overrides", "image_size=64,window_size=8"),
    )
    log = messages(caplog)
    assert log.count("position bias tables were interpolated") == 1 and "stage1 4 -> 8, stage2 4 -> 8" in log
    model = AutoModelForImageClassification.from_pretrained(output)
    assert (model.config.image_size, model.config.window_size) == (64, 8)
    assert dict(AutoImageProcessor.from_pretrained(output).crop_size) == {"height": 64, "width": 64}
    overrides = f"{OVERRIDES},drop_path_rate=0.25"
    scratch = classify(tmp_path / "scratch", "--config_name", "tiny", "--config_overrides", overrides, *options)
    assert AutoModelForImageClassification.from_pretrained(scratch).config.drop_path_rate == 0.25


def test_balance_weighs_the_loss(pretrained, folders, tmp_path):
    losses = {}
    for balance in ("true", "false"):
        output = classify(
            tmp_path / balance,
            *("--model_name_or_path", pretrained, "--train_dir", folders / "train", "--do_train", "--max_steps", 1),
            *("--balance", balance, "--random_erasing", 0, "--drop_path_rate", 0, "--learning_rate", 0.001),
        )
        losses[balance] = logged(output, "loss")[0]
    assert losses["true"] != losses["false"]
    assert "| balance | True |" in card_of(tmp_path / "true")


# Bad input


def scratch(*more) -> tuple:
    return ("--config_name", "tiny", "--config_overrides", OVERRIDES, *more)


WRONG_ARGUMENTS = [
    (["--mode", "liner"], "`mode` is 'liner'; it must be one of finetune, linear, knn"),
    (["--recipe", "swin-bse"], "`recipe` is 'swin-bse'; it must be one of swin-base"),
    (["--rand_augment", "m9-n2-mstd0.5"], "`rand_augment` is 'm9-n2-mstd0.5'; it needs"),
    (["--model_name_or_path", "m"], r"`model_name_or_path` is 'm' and `config_name` is 'tiny';.*exactly one"),
    (["--drop_path_rate", "1"], r"`drop_path_rate` is 1\.0"),
    (["--knn_temperature", "0"], r"`knn_temperature` is 0\.0"),
    (["--dataset_name", "d"], "`dataset_name` is 'd' and `train_dir` is"),
    (["--train_val_split", "1"], r"`train_val_split` is 1\.0"),
    (["--mixup", "0.8", "--per_device_train_batch_size", "1"], r"`per_device_train_batch_size` is 1, but `mixup`"),
    (["--recipe", "swin-base", "--per_device_train_batch_size", "1"], "`per_device_train_batch_size` is 1"),
    (["--mixup", "-1"], r"`mixup` is -1\.0; it must be 0 or more"),
    (["--random_erasing", "1.5"], r"`random_erasing` is 1\.5; it must be in \[0, 1\]"),
    (["--label_smoothing_factor", "2"], r"`label_smoothing_factor` is 2\.0"),
    (["--layer_decay", "0"], r"`layer_decay` is 0\.0; it must be in \(0, 1\]"),
    (["--min_crop_scale", "1.1"], r"`min_crop_scale` is 1\.1"),
    (["--repeated_augmentation", "0"], "`repeated_augmentation` is 0"),
    (["--ema_decay", "1"], r"`ema_decay` is 1\.0"),
    (["--learning_rate", "1", "--base_learning_rate", "1"], r"`learning_rate` is.*`base_learning_rate` is"),
    (["--mode", "knn"], "`mode` is 'knn', in which nothing learns"),
    (["--do_train", "false"], "Nothing to do: give `do_train`"),
    (["--per_device_train_batch_size", "22"], r"`per_device_train_batch_size` is 22.*22 images.*there are 21"),
    (["--max_train_samples", "2"], "`max_train_samples` is 2, but the classes cannot be drawn so"),
    (["--config_overrides", "image_size=30"], "`image_size` is 30"),
    (["--config_overrides", "imagesize=32"], r"`config_overrides` names \['imagesize'\]"),
    (["--feature_stage", "3"], "`feature_stage` is 3; the model has the stages 1 to 2"),
]


@pytest.mark.parametrize(("more", "error"), WRONG_ARGUMENTS, ids=[" ".join(case[0]) for case in WRONG_ARGUMENTS])
def test_wrong_arguments_are_refused_before_anything_is_written(more, error, folders, tmp_path):
    options = scratch("--train_dir", folders / "train", "--do_train", "--max_steps", 1)
    with pytest.raises((ValueError, StrictDataclassError), match=error):
        classify(tmp_path / "out", *options, *more)
    assert not list(tmp_path.glob("out/*"))


def test_evaluation_needs_a_trained_classifier(pretrained, finetuned, folders, tmp_path):
    options = ("--validation_dir", folders / "held-out", "--do_eval")
    for more, error in (
        (("--model_name_or_path", pretrained), "`model_name_or_path` is .*, which has no trained classifier"),
        (scratch(), "`config_name` starts from scratch"),
        (("--model_name_or_path", finetuned, "--feature_stage", 1), "`feature_stage` is 1, on which no classifier"),
    ):
        with pytest.raises(ValueError, match=error):
            classify(tmp_path / "out", *options, *more)


def test_work_without_data_is_refused(finetuned, folders, tmp_path):
    for more, error in (
        (("--do_eval", "--test_dir", folders / "unlabelled"), "`do_eval` is set, but there is nothing to evaluate on"),
        (("--do_train", "--validation_dir", folders / "held-out"), "There are no training images: give `train_dir`"),
        (("--mode", "knn", "--do_eval", "--validation_dir", folders / "held-out"), "There are no training images"),
    ):
        with pytest.raises(ValueError, match=error):
            classify(tmp_path / "out", "--model_name_or_path", finetuned, *more)


@pytest.mark.parametrize("argument", ["train_dir", "validation_dir", "test_dir"])
def test_wrong_folders_are_refused_before_anything_is_written(argument, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in NAMES:
        write_broken(tmp_path / "broken" / name / "a.png")
    given = {
        "train_dir": folders / "train",
        "validation_dir": folders / "held-out",
        "test_dir": folders / "unlabelled",
    }
    wrong = [("nowhere", "not a folder"), ("empty", "holds no image file"), ("broken", "no readable image")]
    for name, error in wrong:
        options = [part for key, value in {**given, argument: tmp_path / name}.items() for part in (f"--{key}", value)]
        with pytest.raises(ValueError, match=f"`{argument}`.*{error}"):
            classify(tmp_path / "out", *scratch(*options, "--do_train", "--do_eval", "--do_predict", "--max_steps", 1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["train_dir", "validation_dir"])
def test_an_image_without_a_label_is_refused(argument, folders, tmp_path):
    data = write_class_folders(tmp_path / "data", {"red": 2, "green": 2, "blue": 2})
    write_images(data, 1)
    given = {"train_dir": folders / "train", "validation_dir": folders / "held-out", argument: data}
    options = [part for key, value in given.items() for part in (f"--{key}", value)]
    with pytest.raises(ValueError, match=rf"`{argument}` is .*1 images, such as '000\.png', have no label"):
        classify(tmp_path / "out", *scratch(*options, "--do_train", "--do_eval"))


def test_one_class_is_refused(tmp_path, pretrained):
    data = write_class_folders(tmp_path / "data", {"red": 8})
    for mode, work in (("finetune", "--do_train"), ("linear", "--do_train"), ("knn", "--do_eval")):
        options = ("--model_name_or_path", pretrained, "--mode", mode, work, "--train_dir", data)
        with pytest.raises(ValueError, match="`train_dir` has images of the class 'red' only; two or more"):
            classify(tmp_path / "out", *options)


def test_other_label_names_are_refused(folders, finetuned, tmp_path):
    data = write_class_folders(tmp_path / "data", {"Red": 2, "green": 2})
    error = r"`validation_dir` has the labels \['Red'\], which {} does not have; it has \['blue', 'green', 'red'\]"
    with pytest.raises(ValueError, match=error.format("`train_dir`")):
        classify(
            tmp_path / "out",
            *scratch("--train_dir", folders / "train", "--validation_dir", data, "--do_train", "--do_eval"),
        )
    with pytest.raises(ValueError, match=error.format("the model")):
        evaluated(tmp_path / "out", finetuned, "--validation_dir", data)
    assert not (tmp_path / "out").exists()


def test_a_model_for_text_is_refused(folders, tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"`model_name_or_path` is '.*bert', .*model type 'bert', which has no image"):
        classify(tmp_path / "out", "--model_name_or_path", tmp_path / "bert", *train_and_evaluate(folders))
    assert not (tmp_path / "out").exists()


def test_a_head_for_other_classes_is_replaced_when_asked_for(finetuned, tmp_path):
    data = write_class_folders(tmp_path / "data", {"red": 4, "green": 4})
    options = ("--model_name_or_path", finetuned, "--train_dir", data, "--do_train", "--max_steps", 1)
    with pytest.raises((ValueError, RuntimeError), match="ignore_mismatched_sizes"):
        classify(tmp_path / "out", *options)
    output = classify(tmp_path / "out", *options, "--ignore_mismatched_sizes", "true")
    assert weights(output)["classifier.weight"].shape == (2, 16)
    # Probes have a head of their own.
    assert weights(classify(tmp_path / "probe", *options, "--mode", "linear"))["classifier.weight"].shape == (2, 16)
    knn = ("--model_name_or_path", finetuned, "--train_dir", data, "--test_dir", data, "--mode", "knn", "--knn_k", 2)
    assert list(predictions_of(classify(tmp_path / "knn", *knn, "--do_predict"))[0])[2:] == ["green", "red"]


def test_a_head_for_classes_of_other_names_starts_anew(finetuned, tmp_path, caplog):
    counts = {"small": 4, "medium": 4, "large": 4}
    data = write_class_folders(tmp_path / "data", counts)
    options = ("--do_train", "--max_steps", 1, "--learning_rate", 1e-9, "--model_name_or_path", finetuned)
    output = classify(tmp_path / "out", *options, "--train_dir", data)
    assert "starts anew" in messages(caplog)
    before, after = weights(finetuned), weights(output)
    assert not torch.allclose(before["classifier.weight"], after["classifier.weight"], atol=1e-4)
    torch.testing.assert_close(before["greenmim.layernorm.weight"], after["greenmim.layernorm.weight"])


def test_a_head_for_the_same_classes_is_kept(finetuned, folders, tmp_path, caplog):
    options = ("--do_train", "--max_steps", 1, "--learning_rate", 1e-9, "--model_name_or_path", finetuned)
    output = classify(tmp_path / "out", *options, "--train_dir", folders / "train")
    assert "starts anew" not in messages(caplog)
    torch.testing.assert_close(weights(output)["classifier.weight"], weights(finetuned)["classifier.weight"])


def test_a_checkpoint_keeps_its_widths(pretrained, folders, tmp_path):
    options = ("--model_name_or_path", pretrained, "--train_dir", folders / "train", "--do_train")
    with pytest.raises(ValueError, match="`config_overrides` changes `embed_dim` from 8 to 16, which"):
        classify(tmp_path / "out", *options, "--config_overrides", "embed_dim=16", "--ignore_mismatched_sizes", "true")


def test_more_neighbours_than_images_are_refused(pretrained, folders, tmp_path):
    options = ("--model_name_or_path", pretrained, "--mode", "knn", "--do_eval", "--do_predict")
    with pytest.raises(ValueError, match="`knn_k` is 22, but there are 21 training images"):
        classify(
            tmp_path / "out",
            *(*options, "--train_dir", folders / "train", "--validation_dir", folders / "held-out", "--knn_k", 22),
        )
    assert not list(tmp_path.glob("out/*"))


def test_wrong_columns_are_refused(pretrained, tmp_path):
    data = write_parquet(tmp_path / "data", ["a", "b", "a", "b"], Value("string"))
    options = ("--model_name_or_path", pretrained, "--dataset_name", data, "--do_train")
    for more, error in (
        (("--label_column_name", "specie"), r"`label_column_name` is 'specie', but.*\['photo', 'species'\]"),
        ((), r"`label_column_name` is not given.*no label column among \['photo', 'species'\]"),
        (("--label_column_name", "photo"), "`label_column_name` is 'photo', the column of the images"),
        (
            ("--label_column_name", "species", "--image_column_name", "species"),
            "`label_column_name` is 'species', the",
        ),
        (
            ("--label_column_name", "photo", "--image_column_name", "species"),
            "`label_column_name` is 'photo', a column of",
        ),
    ):
        with pytest.raises(ValueError, match=error):
            classify(tmp_path / "out", *options, *more)
    numbers = write_parquet(tmp_path / "numbers", [3, 4], Value("int64"))
    options = ("--model_name_or_path", pretrained, "--dataset_name", numbers, "--do_train")
    with pytest.raises(ValueError, match="`image_column_name` is 'species', a column of"):
        classify(tmp_path / "out", *options, "--image_column_name", "species", "--label_column_name", "photo")
    assert not (tmp_path / "out").exists()


def test_missing_labels_of_a_data_set_are_refused(pretrained, tmp_path):
    data = write_parquet(tmp_path / "data", [0, 1, -1, 1], ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match=r"`dataset_name`: 1 of 4 images have no label in column 'species'.*image 2"):
        classify(tmp_path / "out", "--model_name_or_path", pretrained, "--dataset_name", data, "--do_train")


def test_unknown_metrics_are_refused_before_training(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("acuracy", "./nowhere/metric.py"):
        with pytest.raises(ValueError, match=f"`metrics` holds '{name}', which could not be loaded"):
            classify(tmp_path / "out", *scratch(*train_and_evaluate(folders), "--metrics", "accuracy", name))
    with pytest.raises(ValueError, match="`metrics` holds 'roc_auc', which cannot judge predictions of 3 classes"):
        classify(tmp_path / "out", *scratch(*train_and_evaluate(folders), "--metrics", "roc_auc"))
    assert not list(tmp_path.glob("out/*"))


def test_output_folder_that_holds_a_run_is_refused(finetuned, folders):
    before = {path: path.stat().st_mtime_ns for path in finetuned.rglob("*")}
    with pytest.raises(ValueError, match=r"`output_dir` is '.*', which already holds a run.*resume_from_checkpoint"):
        classify(finetuned, *scratch(*train_and_evaluate(folders)))
    assert {path: path.stat().st_mtime_ns for path in finetuned.rglob("*")} == before


# Exact resumption


RESUMED = {
    "everything": [
        *("--recipe", "swin-base", "--drop_path_rate", 0.4, "--random_erasing", 0.5, "--ema_decay", 0.9),
        *("--repeated_augmentation", 2, "--gradient_accumulation_steps", 2, "--base_learning_rate", 0.5),
        *("--balance", "true", "--min_crop_scale", 0.3),
    ],
    "color jitter": ["--color_jitter", 0.4, "--base_learning_rate", 0.5],
    "linear": ["--mode", "linear", "--ema_decay", 0.9, "--base_learning_rate", 50, "--random_erasing", 0.2],
    "linear with AdamW": ["--mode", "linear", "--lars", "false", "--base_learning_rate", 1],
}


@pytest.mark.parametrize(("case", "steps", "workers"), [
    ("everything", 4, 2), ("color jitter", 5, 0), ("linear", 7, 2), ("linear with AdamW", 3, 0),
])  # fmt: skip
def test_resumed_run_equals_one_that_was_not_stopped(pretrained, folders, tmp_path, case, steps, workers):
    # Five batches an epoch; checkpoints in an epoch and at its end.
    common = ["--model_name_or_path", pretrained, "--train_dir", folders / "train", "--do_train", *RESUMED[case]]
    common += ["--max_steps", 8]
    whole = classify(tmp_path / "whole", *common, "--save_strategy", "steps", "--save_steps", steps)
    checkpoint = tmp_path / "whole" / f"checkpoint-{steps}"
    resumed = classify(
        tmp_path / "resumed",
        *(*common, "--resume_from_checkpoint", checkpoint, "--dataloader_num_workers", workers),
        # The next run of this process would wait for the end of persistent ones.
        *("--dataloader_persistent_workers", "false"),
    )
    assert_same_weights(whole, resumed)
    if "--ema_decay" in RESUMED[case]:
        assert_same_weights(whole / "ema", resumed / "ema")
        assert weights(whole)["classifier.weight"].ne(weights(whole / "ema")["classifier.weight"]).any()
    assert logged(whole, "loss") == logged(resumed, "loss") and len(logged(whole, "loss")) == 8


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_evaluating_a_checkpoint_alone_tells_its_epoch(pretrained, folders, tmp_path, mode):
    common = ["--model_name_or_path", pretrained, "--train_dir", folders / "train", "--mode", mode, "--do_eval"]
    common += ["--validation_dir", folders / "held-out"]
    whole = classify(tmp_path, *common, "--do_train", "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 2)
    before = results_of(whole)
    after = results_of(classify(tmp_path, *common, "--resume_from_checkpoint", "true"))
    assert before["epoch"] == after["epoch"] > 0
    assert before["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-6)


def test_evaluating_and_saving_do_not_change_the_run(pretrained, folders, tmp_path):
    folder = ("--train_dir", folders / "train", "--validation_dir", folders / "held-out")
    common = ("--model_name_or_path", pretrained, *folder, "--do_train", "--max_steps", 6, "--ema_decay", 0.9)
    plain = classify(tmp_path / "plain", *common)
    busy = classify(
        tmp_path / "busy",
        *(*common, "--eval_strategy", "steps", "--eval_steps", 3, "--save_strategy", "steps", "--save_steps", 2),
    )
    assert_same_weights(plain, busy)
    assert_same_weights(plain / "ema", busy / "ema")
    assert len(logged(busy, "eval_loss")) == len(logged(busy, "eval_ema_loss")) == 3


@pytest.mark.slow
def test_killed_and_resumed_run_equals_one_that_was_not(pretrained, folders, tmp_path):
    common = ["--model_name_or_path", pretrained, "--train_dir", folders / "train", "--do_train", "--max_steps", 18]
    common += [*RESUMED["everything"], "--gradient_accumulation_steps", 1]
    whole = classify(tmp_path / "whole", *common)
    killed = tmp_path / "killed"
    saving = ["--save_strategy", "steps", "--save_steps", 3, "--dataloader_num_workers", 2]
    process = start(classification_flags(killed, *common, *saving), "run_image_classification.py")
    kill_after_checkpoint(process, killed / "checkpoint-6")
    assert not (killed / "model.safetensors").exists()
    classify(killed, *common, "--resume_from_checkpoint", "true")
    assert_same_weights(whole, killed)
    assert_same_weights(whole / "ema", killed / "ema")
    assert logged(killed, "loss") == logged(whole, "loss")


# Several processes

TWO_RUNS = """
import json, sys
import run_image_classification
from training_greenmim.runs.processes import leave_processes

for argv in json.loads(sys.argv[1]):
    run_image_classification.main(argv)
leave_processes()
"""


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(pretrained, folders, tmp_path):
    data = ("--model_name_or_path", pretrained, *train_and_evaluate(folders), "--do_predict", "--max_steps", 5)
    plain = (*data, "--learning_rate", 0.01, "--random_erasing", 0, "--drop_path_rate", 0, "--balance", "false")
    # Biases of keys have no gradient but rounding, which Adam would make as large as any other.
    plain += ("--adam_epsilon", 1e-5)
    halves = ("--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 3, "--ddp_backend", "gloo")
    # Large weights make much of the statistics of batch norm.
    linear = (*data, "--mode", "linear", "--lars", "false", "--learning_rate", 0.5, "--ema_decay", 0.5)
    runs = [
        classification_flags(tmp_path / "two", *plain, *halves),
        classification_flags(tmp_path / "linear", *linear, *halves),
    ]
    script = tmp_path / "runs.py"
    script.write_text(TWO_RUNS)
    run_in_processes(script, [json.dumps(runs)])

    one, two = classify(tmp_path / "one", *plain), tmp_path / "two"
    first, second = weights(one), weights(two)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4, msg=name)
    assert metrics_of(two) == pytest.approx(metrics_of(one), rel=1e-3)
    assert "| batch | 4 |" in card_of(two) and "1 of them could not be read" in card_of(two)

    for folder, prefix in ((tmp_path / "linear", "eval_"), (tmp_path / "linear" / "ema", "eval_ema_")):
        again = evaluated(tmp_path / prefix, folder, "--validation_dir", folders / "held-out", "--do_predict")
        found = metrics_of(tmp_path / "linear", prefix)
        found = {name: value for name, value in found.items() if not name.startswith("ema_")}
        assert metrics_of(again) == pytest.approx(found, rel=1e-4), "of both processes, all images once"
    columns = ("image", "label", "prediction")
    lines = predictions_of(tmp_path / "linear")
    assert [[line[name] for name in columns] for line in lines] == [
        [line[name] for name in columns] for line in predictions_of(tmp_path / "eval_")
    ]
