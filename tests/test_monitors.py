"""Monitors of features against NumPy and scikit-learn; that they change nothing; where their numbers go."""

import math
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_mim
from tests.test_trainer import image_dataset, make_trainer
from tests.training_helpers import (
    ROOT,
    assert_same_weights,
    coloured_image,
    encoded,
    flags,
    noise_image,
    results_of,
    run,
    run_in_processes,
    state_of,
    subprocess_environment,
    write_broken,
    write_class_folders,
    write_images,
    write_webdataset,
)
from training_greenmim.data.transforms import EvalTransform
from training_greenmim.pretraining.monitors import MONITORS, linear_probe, measure, neighbours, rank, spread
from training_greenmim.pretraining.monitors.features import (
    MAX_IMAGES,
    FeatureReader,
    Features,
    affordable_images,
    spread_units,
)
from training_greenmim.pretraining.trainer import MIMTrainer


OF_LABELS = {"eval_knn_accuracy", "eval_knn_200_accuracy", "eval_probe_accuracy"}
OF_FEATURES = {"eval_rankme", "eval_feature_std"}


def clusters(count: int, width: int = 6, num_labels: int = 4, noise: float = 1.5) -> Features:
    """Features around a centre for each class, so noisy that neighbours are often wrong."""
    random = np.random.default_rng(0)
    labels = random.integers(0, num_labels, count)
    values = random.normal(size=(num_labels, width))[labels] + noise * random.normal(size=(count, width))
    return Features(torch.tensor(values).float(), labels=torch.tensor(labels))


# Nearest neighbours


def leave_one_out(values: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Accuracy of weighted votes, one image after the other."""
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    right = 0
    for index, value in enumerate(values):
        similarities = values @ value
        others = sorted((other for other in range(len(values)) if other != index), key=lambda i: -similarities[i])
        votes = np.zeros(labels.max() + 1)
        for other in others[:k]:
            votes[labels[other]] += np.exp(similarities[other] / 0.07)
        right += votes.argmax() == labels[index]
    return right / len(values)


@pytest.mark.parametrize(("count", "expected_k"), [(300, (20, 200)), (60, (20, 59)), (12, (11, 11))])
def test_neighbours_vote_leave_one_out_as_many_as_there_are(count, expected_k):
    features = clusters(count)
    values, labels = features.pooled.double().numpy(), features.labels.numpy()
    found = neighbours.measure(features)
    assert list(found) == ["knn_accuracy", "knn_200_accuracy"]
    assert 0.3 < found["knn_accuracy"] < 0.95, "neither trivial nor chance"
    for name, k in zip(found, expected_k):
        assert found[name] == pytest.approx(leave_one_out(values, labels, k), abs=1e-6)


def test_neighbours_agree_with_scikit_learn():
    features = clusters(150)
    values, labels = features.pooled.numpy(), features.labels.numpy()
    right = 0
    for index in range(len(values)):
        others = np.arange(len(values)) != index
        classifier = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        right += classifier.fit(values[others], labels[others]).predict(values[[index]])[0] == labels[index]
    assert neighbours.measure(features)["knn_accuracy"] == pytest.approx(right / len(values))


def test_an_image_does_not_vote_for_itself():
    features = Features(torch.eye(2).repeat_interleave(2, dim=0), labels=torch.tensor([0, 1, 2, 3]))
    assert neighbours.measure(features)["knn_accuracy"] == 0
    assert neighbours.measure(Features(torch.ones(1, 3), labels=torch.tensor([0]))) == {}


# Linear probe


def test_probe_is_judged_on_what_it_was_not_trained_on():
    features = clusters(120, noise=1.0)
    values, labels = features.pooled.double().numpy(), features.labels.numpy()
    right = 0
    for learned, held_out in StratifiedKFold(2, shuffle=True, random_state=0).split(values, labels):
        mean, deviation = values[learned].mean(axis=0), values[learned].std(axis=0)
        classifier = LogisticRegression(C=0.1, max_iter=1000).fit(
            (values[learned] - mean) / deviation, labels[learned]
        )
        right += (classifier.predict((values[held_out] - mean) / deviation) == labels[held_out]).sum()
    found = linear_probe.measure(features)["probe_accuracy"]
    assert found == pytest.approx(right / len(labels), abs=1 / len(labels)) and 0.4 < found < 0.99
    np.random.seed(1)  # what is drawn elsewhere plays no part
    assert linear_probe.measure(features)["probe_accuracy"] == found


def test_probe_of_labels_that_features_do_not_tell_is_near_chance():
    random = np.random.default_rng(1)
    values = torch.tensor(random.normal(size=(200, 30))).float()
    found = linear_probe.measure(Features(values, labels=torch.tensor(random.integers(0, 2, 200))))
    assert 0.35 < found["probe_accuracy"] < 0.65


def test_probe_leaves_out_classes_of_one_image():
    values = torch.cat([torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4)])
    values[:10, 0] += 20
    labels = torch.tensor([0] * 10 + [1] * 10 + [7])
    assert linear_probe.measure(Features(values, labels=labels)) == {"probe_accuracy": 1.0}
    assert linear_probe.measure(Features(values[9:], labels=torch.arange(12))) == {}


# RankMe and spread


def rank_by_svd(rows: torch.Tensor) -> float:
    singular = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    return float(np.exp(-np.sum(shares * np.log(shares))))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rankme_is_the_papers_formula(scale):
    """Features with a large mean, which is not subtracted, and directions of very different strength."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 16, generator=generator) * 0.5 ** torch.arange(16) + 2
    expected = rank_by_svd(scale * rows)
    assert 1.5 < expected < 8
    assert rank.measure(Features(scale * rows))["rankme"] == pytest.approx(expected, rel=1e-6)
    assert rank_by_svd(rows - rows.mean(dim=0)) > 1.2 * expected, "centring would tell"


def test_rankme_of_known_features():
    orthonormal, _ = torch.linalg.qr(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    assert rank.rankme(orthonormal) == pytest.approx(16, rel=1e-4)
    assert rank.rankme(torch.randn(200, 1) @ torch.randn(1, 16)) == pytest.approx(1, abs=1e-3)
    assert rank.rankme(orthonormal @ torch.diag((torch.arange(16) < 3).float())) == pytest.approx(3, rel=1e-3)


def test_rankme_takes_units_where_images_are_too_few_and_nothing_where_both_are():
    rows = torch.randn(160, 16, generator=torch.Generator().manual_seed(0))
    assert rank.measure(Features(rows[:40], units=rows))["rankme"] == pytest.approx(rank_by_svd(rows), rel=1e-6)
    assert rank.measure(Features(rows[:159])) == {}


def test_units_are_spread_and_make_ten_rows_for_each_dimension():
    assert spread_units(49, 1000, 100) == [], "the images suffice"
    assert spread_units(49, 999, 100) == [0, 24]
    assert spread_units(4, 100, 40) == [0, 1, 2, 3]
    assert spread_units(4, 99, 40) == [], "too few even with all units"


def test_spread_is_zero_for_equal_directions_and_one_for_random_ones():
    assert spread.measure(Features(torch.rand(50, 1) * torch.ones(50, 8)))["feature_std"] == pytest.approx(0, abs=1e-6)
    random = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert spread.measure(Features(random))["feature_std"] == pytest.approx(1, abs=0.02)
    values = random[:100, :8].numpy() + 1
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    expected = np.mean(np.std(values, axis=0, ddof=1)) * math.sqrt(8)
    assert spread.measure(Features(random[:100, :8] + 1))["feature_std"] == pytest.approx(expected, rel=1e-5)


def test_features_that_are_not_finite_are_not_measured():
    features = clusters(200)
    assert set(measure(features)) == {name for monitor in MONITORS for name in monitor.METRICS}
    features.pooled[3, 2] = torch.nan
    assert measure(features) == {}


# Features


def test_features_are_those_of_whole_images_without_a_mask(tmp_path):
    trainer = make_trainer(tmp_path)
    features = trainer.feature_reader.read(trainer)
    images = torch.stack([sample["pixel_values"] for sample in trainer.eval_dataset])
    with torch.no_grad():
        outputs = trainer.model.eval().greenmim(trainer.normalize(images))
    # As sets of rows: the order is drawn.
    assert features.labels is None and features.pooled.dtype == torch.float32
    torch.testing.assert_close(sorted_rows(features.pooled), sorted_rows(outputs.pooler_output), atol=1e-5, rtol=1e-4)
    # 6 images of 16 units and 16 dimensions are too few.
    assert features.units is None
    many = image_dataset(20, EvalTransform((32, 32), 3))
    features = FeatureReader(many).read(trainer)
    images = torch.stack([sample["pixel_values"] for sample in many])
    with torch.no_grad():
        tokens = trainer.model.greenmim(trainer.normalize(images)).last_hidden_state[:, ::2]
    torch.testing.assert_close(sorted_rows(features.units), sorted_rows(tokens.flatten(0, 1)), atol=1e-5, rtol=1e-4)


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows[rows[:, 0].argsort()]


def test_images_are_the_same_at_each_evaluation_and_for_every_seed(tmp_path):
    found = []
    for seed in (0, 1):
        trainer = make_trainer(tmp_path, seed=seed)
        reader = FeatureReader(image_dataset(300, EvalTransform((32, 32), 3)))
        trainer.args.eval_strategy, trainer.state.eval_steps = "steps", 5
        found += [reader.read(trainer).pooled, reader.read(trainer).pooled]
        assert len(found[-1]) == 256, "the least, of 5 steps of 4 images"
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("strategy", "steps", "images", "expected"),
    [("no", 1, 100, MAX_IMAGES), ("steps", 500, 100, 480), ("steps", 10, 100, 256), ("epoch", 1, 10**6, MAX_IMAGES)],
)
def test_number_of_images_follows_from_what_is_trained_between_evaluations(
    tmp_path, strategy, steps, images, expected
):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=64)
    trainer.args.eval_strategy, trainer.state.eval_steps, trainer.train_dataset = strategy, steps, range(images)
    assert affordable_images(trainer) == expected


def test_larger_sets_are_read_anew_and_alike(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    dataset = image_dataset(20, EvalTransform((32, 32), 3))
    kept = FeatureReader(dataset)
    first = [kept.read(trainer), kept.read(trainer)]
    monkeypatch.setattr("training_greenmim.pretraining.monitors.features.MAX_KEPT", 100)
    anew = FeatureReader(dataset)
    for features in (first[1], anew.read(trainer), anew.read(trainer)):
        assert torch.equal(features.pooled, first[0].pooled) and torch.equal(features.units, first[0].units)
    assert isinstance(kept._batches, list) and not isinstance(anew._batches, list)


def test_no_random_number_is_drawn_and_nothing_is_learned(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_num_workers=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1]
    trainer.measure_features()
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


# Runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Photos without labels, and a few with three classes, one of them unreadable."""
    folder = tmp_path_factory.mktemp("folders")
    write_images(folder / "photos", 24)
    write_class_folders(folder / "probe", {"red": 10, "green": 9, "blue": 8}, first_seed=500)
    write_broken(folder / "probe" / "red" / "broken.png")
    return folder


TRAINING = ("--do_train", "--do_eval", "--eval_strategy", "steps", "--eval_steps", 2, "--max_steps", 6)


def without_monitors(*args, **kwargs) -> MIMTrainer:
    trainer = MIMTrainer(*args, **kwargs)
    trainer.feature_reader = None
    return trainer


@pytest.fixture(scope="module")
def finished(folders) -> Path:
    """A run with monitors that keeps its checkpoints."""
    saving = ("--save_strategy", "steps", "--save_steps", 2)
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_knn_accuracy")
    options = ("--train_dir", folders / "photos", "--probe_dir", folders / "probe", *TRAINING, *saving, *best)
    return run(folders / "finished", *options, "--report_to", "tensorboard")


def evaluations_of(output: Path) -> dict[int, dict]:
    return {entry["step"]: entry for entry in state_of(output)["log_history"] if "eval_loss" in entry}


def test_monitors_do_not_influence_training(folders, tmp_path, monkeypatch):
    options = ("--train_dir", folders / "photos", *TRAINING, "--dataloader_num_workers", 1)
    watched = run(tmp_path / "watched", *options, "--probe_dir", folders / "probe")
    monkeypatch.setattr(run_mim, "MIMTrainer", without_monitors)
    plain = run(tmp_path / "plain", *options)
    assert set(evaluations_of(watched)[4]) - set(evaluations_of(plain)[4]) == {
        *OF_LABELS,
        *OF_FEATURES,
        "eval_monitors_runtime",
        "unreadable_images",  # of the probe
    }
    assert_same_weights(watched, plain)
    losses = [[entry.get("loss") for entry in state_of(output)["log_history"]] for output in (watched, plain)]
    assert losses[0] == losses[1]


def test_numbers_reach_log_results_card_and_tensorboard(finished):
    evaluations, results = evaluations_of(finished), results_of(finished)
    expected = {*OF_LABELS, *OF_FEATURES}
    assert all(expected <= set(entry) for entry in evaluations.values()) and expected <= set(results)
    card = (finished / "README.md").read_text()
    assert all(name in card for name in expected) and f"| {results['eval_knn_accuracy']:.5g} |" in card
    assert "type: monitors_runtime" not in card, "it is of the machine"
    (events,) = {path.parent for path in finished.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = {event.step: event.value for event in accumulator.Scalars("eval/knn_accuracy")}
    for step, entry in evaluations.items():
        assert logged[step] == pytest.approx(entry["eval_knn_accuracy"])


def test_best_model_is_the_one_whose_neighbours_are_best(finished):
    # The last entry of a step is of the best model, which is evaluated at the end.
    history = [entry for entry in state_of(finished)["log_history"] if "eval_loss" in entry]
    accuracies = {entry["step"]: entry["eval_knn_accuracy"] for entry in history[:3]}
    state = state_of(finished)
    assert list(accuracies) == [2, 4, 6]
    assert state["best_metric"] == max(accuracies.values()) == results_of(finished)["eval_knn_accuracy"]
    assert accuracies[state["best_global_step"]] == max(accuracies.values())
    assert_same_weights(finished, finished / f"checkpoint-{state['best_global_step']}")


def test_a_resumed_run_keeps_the_best_metric(finished, folders, tmp_path):
    saving = ("--save_strategy", "steps", "--save_steps", 2)
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_rankme")
    options = ("--train_dir", folders / "photos", "--probe_dir", folders / "probe", *TRAINING, *saving, *best)
    whole = run(tmp_path / "whole", *options)
    resumed = run(tmp_path / "resumed", *options, "--resume_from_checkpoint", whole / "checkpoint-4")
    states = state_of(whole), state_of(resumed)
    assert states[0]["best_metric"] == states[1]["best_metric"]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]
    ranks = [entry["eval_rankme"] for entry in states[1]["log_history"] if "eval_rankme" in entry][:3]
    assert states[1]["best_metric"] == max(ranks) and len(set(ranks)) == 3


def test_a_checkpoint_alone_is_measured_as_in_its_run(finished, folders, tmp_path):
    options = ("--train_dir", folders / "photos", "--probe_dir", folders / "probe", "--do_eval")
    again = results_of(run(tmp_path / "again", *options, "--resume_from_checkpoint", finished / "checkpoint-4"))
    expected = evaluations_of(finished)[4]
    for name in ("eval_loss", *OF_LABELS, *OF_FEATURES):
        assert again[name] == pytest.approx(expected[name], rel=1e-5), name


def write_labelled(folder: Path, labels: list, features) -> Path:
    for split, first in (("train", 0), ("test", 100)):
        images = [coloured_image(first + index, 0 if label in (1, "b") else 2) for index, label in enumerate(labels)]
        values = {"photo": images, "kind": labels, "other": [0, 1] * (len(labels) // 2)}
        types = {"photo": datasets.Image(), "kind": features, "other": datasets.ClassLabel(names=["x", "y"])}
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(values, datasets.Features(types)).to_parquet(folder / f"{split}.parquet")
    return folder


def test_labels_of_a_data_set_are_used_if_it_is_clear_which(tmp_path, folders):
    labelled = write_labelled(tmp_path / "data", [0, 1] * 6, datasets.ClassLabel(names=["a", "b"]))
    options = ("--dataset_name", labelled, "--do_eval")
    found = results_of(run(tmp_path / "named", *options, "--label_column_name", "kind"))
    assert OF_LABELS <= set(found) and found["eval_probe_accuracy"] > 0.8, "its classes have colours"
    assert not OF_LABELS & set(results_of(run(tmp_path / "two columns", *options)))
    assert OF_LABELS <= set(results_of(run(tmp_path / "folder", *options, "--probe_dir", folders / "probe")))
    texts = write_labelled(tmp_path / "texts", ["a", "b"] * 6, datasets.Value("string"))
    found = run(tmp_path / "text", "--dataset_name", texts, "--do_eval", "--label_column_name", "kind")
    assert OF_LABELS <= set(results_of(found))


def test_held_out_images_of_a_data_set_keep_their_labels(tmp_path):
    labelled = write_labelled(tmp_path / "data", [0, 1] * 12, datasets.ClassLabel(names=["a", "b"]))
    (labelled / "test.parquet").unlink()
    options = ("--label_column_name", "kind", "--do_eval", "--train_val_split", 0.5)
    assert OF_LABELS <= set(results_of(run(tmp_path / "out", "--dataset_name", labelled, *options)))


def test_runs_without_labels_have_what_needs_none(tmp_path, folders):
    found = results_of(run(tmp_path / "out", "--train_dir", folders / "probe", "--do_eval", "--train_val_split", 0.5))
    assert OF_FEATURES <= set(found) and not OF_LABELS & set(found)


def test_a_stream_is_measured_by_its_first_images(tmp_path, folders):
    contents = [encoded(noise_image(seed)) for seed in range(12)]
    data = write_webdataset(tmp_path / "data", contents)
    write_webdataset(tmp_path / "data", contents, split="validation")
    options = ("--dataset_name", data, "--streaming", "--do_train", "--do_eval", "--max_steps", 2)
    found = results_of(run(tmp_path / "out", *options))
    assert OF_FEATURES <= set(found) and not OF_LABELS & set(found)
    assert OF_LABELS <= set(results_of(run(tmp_path / "probed", *options, "--probe_dir", folders / "probe")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--do_eval", "--metric_for_best_model", "knn_accuracy"),
            "`metric_for_best_model` is 'knn_accuracy'.*probe_dir",
        ),
        (("--do_train", "--probe_dir", "{probe}"), "`probe_dir` is .*give `do_eval` too"),
        (("--do_eval", "--probe_dir", "{photos}"), "`probe_dir` is .*24 images.* have no label"),
        (("--do_eval", "--probe_dir", "{probe}/red/.."), None),
        (("--do_eval", "--probe_dir", "nowhere"), "`probe_dir` is 'nowhere', which is not a folder"),
        (("--do_eval", "--label_column_name", "kind"), "`label_column_name` is 'kind', which is for a `dataset_name`"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, folders, options, message):
    options = [str(option).format(probe=folders / "probe", photos=folders / "photos") for option in options]
    arguments = flags(tmp_path / "out", "--train_dir", folders / "photos", *options)
    if message is None:
        run_mim.main(arguments)
        return
    with pytest.raises(ValueError, match=message):
        run_mim.main(arguments)


def test_a_probe_of_one_class_and_columns_that_there_are_not_are_refused(tmp_path, folders):
    single = write_class_folders(tmp_path / "single", {"red": 4})
    with pytest.raises(ValueError, match="`probe_dir` has images of the class 'red' only"):
        run(tmp_path / "out", "--train_dir", folders / "photos", "--do_eval", "--probe_dir", single)
    labelled = write_labelled(tmp_path / "data", [0, 1] * 6, datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="`label_column_name` is 'sort'"):
        run(tmp_path / "out", "--dataset_name", labelled, "--do_eval", "--label_column_name", "sort")


# Processes


@pytest.mark.slow
def test_two_processes_measure_what_one_does(finished, folders, tmp_path):
    """An odd number of images, one of them unreadable."""
    options = ("--train_dir", folders / "photos", "--probe_dir", folders / "probe", "--do_eval")
    argv = flags(tmp_path / "two", *options, "--resume_from_checkpoint", finished / "checkpoint-4")
    run_in_processes(ROOT / "run_mim.py", [*argv, "--ddp_backend", "gloo"])
    found, expected = results_of(tmp_path / "two"), evaluations_of(finished)[4]
    for name in (*OF_LABELS, *OF_FEATURES):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


# Encodes whole images by a model whose weights lie in parts on two processes, before and after it was trained on.
SHARDED = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from modeling_greenmim import GreenMIMForPreTraining
from tests.training_helpers import leave_at_once, tiny_config
from training_greenmim.pretraining.monitors.features import encode

torch.manual_seed(0)
model = GreenMIMForPreTraining(tiny_config())
images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
expected = model.eval().greenmim(images).pooler_output
dist.init_process_group("gloo")
for module in (*(block for stage in model.greenmim.encoder.layers for block in stage.blocks), model):
    fully_shard(module)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
for _ in range(2):
    with torch.no_grad():
        torch.testing.assert_close(encode(model, images).pooler_output, expected)
    model.train()(images, noise=torch.rand(1, 16, generator=torch.Generator().manual_seed(2))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
leave_at_once()
"""


@pytest.mark.slow
def test_a_model_in_parts_encodes_as_it_does_whole(tmp_path):
    """FSDP2 by torch alone, since accelerate has none on CPUs."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "sharded.py")],
        env={**subprocess_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
