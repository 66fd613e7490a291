# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Metrics: values counted by hand and by brute force, where modules come from, and the picture of confusions."""

import concurrent.futures
import http.server
import multiprocessing
import re
import socket
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import evaluate
import huggingface_hub
import numpy as np
import pytest
import transformers
from PIL import Image

from training_greenmim.classification import metrics as metrics_module
from training_greenmim.classification.metrics import (
    SAMPLES_AT_A_TIME,
    SHIPPED_METRICS,
    compute_metrics,
    confusion_matrix,
    default_metrics,
    load_metrics,
    save_confusion_matrix,
)


# Metrics that no classification has; their own tests are those of the tasks.
OF_DENSE_TASKS = ["coco_map", "mean_iou"]
METRICS = Path(__file__).parents[1] / "metrics"


@pytest.fixture(autouse=True)
def no_warning_of_libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def logits_of(predictions, num_labels):
    """Logits whose largest is that of the predicted class."""
    return np.eye(num_labels, dtype=np.float32)[predictions]


def evaluated(names, logits, labels):
    logits = np.asarray(logits, dtype=np.float32)
    return compute_metrics(load_metrics(names, logits.shape[1]), logits, np.asarray(labels))


# Values

LABELS = [0, 0, 0, 0, 0, 1, 1, 2]
PREDICTIONS = [0, 0, 0, 1, 2, 1, 0, 2]
COUNTS = [[3, 1, 1], [1, 1, 0], [0, 0, 1]]


def test_values_counted_by_hand():
    # Recall 3/5, 1/2, 1; F1 6/9, 2/4, 2/3.
    expected = {"accuracy": 5 / 8, "balanced_accuracy": 0.7, "macro_f1": 11 / 18}
    results = evaluated(None, logits_of(PREDICTIONS, 3), LABELS)
    assert results == pytest.approx(expected)
    assert all(type(value) is float for value in results.values())
    assert confusion_matrix(logits_of(PREDICTIONS, 3), np.array(LABELS)).tolist() == COUNTS


def test_a_class_without_samples():
    # Of four classes 1 and 3 have none, and 1 is predicted: recall 1/2, 1; F1 2/3, 0, 1.
    labels, predictions = [0, 0, 2, 2], [0, 1, 2, 2]
    results = evaluated(["balanced_accuracy", "macro_f1"], logits_of(predictions, 4), labels)
    assert results == pytest.approx({"balanced_accuracy": 3 / 4, "macro_f1": 5 / 9})
    counts = confusion_matrix(logits_of(predictions, 4), np.array(labels))
    assert counts.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("num_labels", [2, 3, 6, 11])
def test_values_by_brute_force(num_labels):
    generator = np.random.default_rng(num_labels)
    # More samples than are given at a time, and not a multiple.
    num_samples = SAMPLES_AT_A_TIME + 77
    # Rounded, so that scores of samples tie; between classes they do not.
    logits = generator.integers(-9, 9, (num_samples, num_labels)) + np.linspace(0, 0.5, num_labels)
    labels = generator.integers(0, num_labels, num_samples)
    labels[::3] = logits[::3].argmax(axis=1)
    predicted = [max(range(num_labels), key=row.__getitem__) for row in logits]
    pairs = list(zip(labels, predicted))
    recall, f1 = [], []
    for label in range(num_labels):
        hits = pairs.count((label, label))
        of_label, of_prediction = list(labels).count(label), predicted.count(label)
        recall.append(hits / of_label)
        f1.append(2 * hits / (of_label + of_prediction))
    expected = {
        "accuracy": sum(label == prediction for label, prediction in pairs) / num_samples,
        "balanced_accuracy": sum(recall) / num_labels,
        "macro_f1": sum(f1) / num_labels,
    }
    if num_labels == 2:
        scores = logits[:, 1] - logits[:, 0]
        differences = scores[labels == 1][:, None] - scores[labels == 0][None]
        expected["roc_auc"] = ((differences > 0) + 0.5 * (differences == 0)).mean()
    if num_labels > 5:
        better = [(row > row[label]).sum() for row, label in zip(logits, labels)]
        expected["top_5_accuracy"] = np.mean(np.array(better) < 5)
    results = evaluated(None, logits, labels)
    assert results == pytest.approx(expected)
    counts = [[pairs.count((row, column)) for column in range(num_labels)] for row in range(num_labels)]
    assert confusion_matrix(logits, labels).tolist() == counts


def test_area_under_the_curve_of_confident_predictions():
    # Of 4 pairs one is in the wrong order; probabilities of float32 would all round to 1 or 0.
    margins = np.array([30.0, 50.0, 40.0, 60.0])
    logits = np.stack([-margins, margins], axis=1)
    assert evaluated(["roc_auc"], logits, [0, 0, 1, 1]) == {"roc_auc": 0.75}
    assert evaluated(["roc_auc"], -logits, [0, 0, 1, 1]) == {"roc_auc": 0.25}


def test_an_undefined_metric_is_left_out_and_reported_once(caplog):
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="training_greenmim.classification.metrics"):
        for _ in range(2):
            results = evaluated(["accuracy", "roc_auc"], logits_of([1, 0, 1, 1], 2), [1, 1, 1, 1])
            assert results == {"accuracy": 0.75}
    assert [record.getMessage() for record in caplog.records] == [
        "roc_auc is left out: it is undefined for these labels and predictions."
    ]


def test_unreadable_images_and_predictions_that_are_not_finite_are_left_out_and_counted(caplog):
    logits = logits_of([*PREDICTIONS, 0, 0, 0], 3)
    labels = np.array([*LABELS, 2, 2, 2])
    readable = np.array([True] * 10 + [False])
    logits[-3, 1], logits[-2, 0] = np.nan, -np.inf
    metrics = load_metrics(None, 3)
    counted = compute_metrics(metrics, logits[:-3], labels[:-3])
    assert not {"unreadable", "non_finite"} & counted.keys()
    found = compute_metrics(metrics, logits, labels, readable)
    assert found == {"unreadable": 1.0, "non_finite": 2.0, **counted}
    assert "2 predictions are not finite numbers" in caplog.text
    assert confusion_matrix(logits, labels, readable).tolist() == COUNTS


def test_nothing_to_count():
    logits, labels = np.zeros((3, 4)), np.zeros(3, dtype=np.int64)
    unreadable = np.array([False, False, False])
    assert compute_metrics(load_metrics(None, 4), logits, labels, unreadable) == {"unreadable": 3.0}
    assert compute_metrics(load_metrics(None, 4), logits + np.nan, labels) == {"non_finite": 3.0}
    assert confusion_matrix(logits, labels, unreadable).tolist() == [[0] * 4] * 4


@pytest.mark.parametrize("shapes", [((4, 2), (3,)), ((4,), (4,)), ((4, 2), (4, 2))])
def test_shapes_that_do_not_fit(shapes):
    logits, labels = (np.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=re.escape(f"`logits` have the shape {shapes[0]}")):
        compute_metrics([], logits, labels)


def test_random_state_is_left_alone():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    evaluated(None, logits_of(PREDICTIONS, 3), LABELS)
    assert np.random.rand() == expected


# The modules by themselves


def test_the_folder_holds_what_is_shipped():
    modules = {path.parent.name: path.stem for path in METRICS.glob("*/*.py")}
    assert modules == {name: name for name in (*SHIPPED_METRICS, *OF_DENSE_TASKS)}
    assert not list(METRICS.glob("*.py"))  # a package of that name would hide others


@pytest.mark.parametrize("name", SHIPPED_METRICS)
def test_a_module_says_what_it_is(name):
    metric = evaluate.load(str(METRICS / name))
    assert metric.name == name
    assert metric.description.endswith(".") and "Returns:" in metric.inputs_description
    assert "references" in metric.features
    # `evaluate` shows them to who asks for help on `compute`.
    assert metric.inputs_description in metric.compute.__doc__


@pytest.mark.parametrize("k, expected", [(1, 0.25), (2, 0.75), (3, 1.0)])
def test_k_of_top_k_accuracy(k, expected):
    scores = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
    metric = evaluate.load(str(METRICS / "top_k_accuracy"))
    results = metric.compute(prediction_scores=scores, references=[0, 1, 2, 2], k=k)
    assert results == {f"top_{k}_accuracy": expected}


@pytest.mark.parametrize("k, classes", [(0, 4), (4, 4), (5, 4), (1, 2)])
def test_k_that_does_not_suit(k, classes):
    metric = evaluate.load(str(METRICS / "top_k_accuracy"), keep_in_memory=True)
    with pytest.raises(ValueError, match=f"`k` is {k} with scores of {classes} classes"):
        metric.compute(prediction_scores=np.eye(classes), references=range(classes), k=k)


def test_area_under_the_curve_of_other_classes():
    metric = evaluate.load(str(METRICS / "roc_auc"), keep_in_memory=True)
    with pytest.raises(ValueError, match=r"`references` hold the classes \[1, 2\]"):
        metric.compute(prediction_scores=[0.0, 1.0], references=[1, 2])


def test_the_order_of_classes_in_a_confusion_matrix():
    metric = evaluate.load(str(METRICS / "confusion_matrix"))
    inputs = {"predictions": [5, 5, 2], "references": [5, 2, 2]}
    assert metric.compute(**inputs)["confusion_matrix"].tolist() == [[1, 1], [0, 1]]
    assert metric.compute(**inputs, labels=[5, 2, 7])["confusion_matrix"].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_metrics_combine():
    combined = evaluate.combine([str(METRICS / "balanced_accuracy"), *load_metrics(["accuracy", "macro_f1"], 3)])
    results = combined.compute(predictions=PREDICTIONS, references=LABELS)
    assert results == pytest.approx({"balanced_accuracy": 0.7, "accuracy": 5 / 8, "macro_f1": 11 / 18})


# Choosing and loading


@pytest.mark.parametrize(
    "num_labels, more", [(2, ["roc_auc"]), (3, []), (5, []), (6, ["top_k_accuracy"]), (1000, ["top_k_accuracy"])]
)
def test_default_metrics(num_labels, more):
    assert default_metrics(num_labels) == ["accuracy", "balanced_accuracy", "macro_f1", *more]
    assert [metric.name for metric in load_metrics(None, num_labels)] == default_metrics(num_labels)


@pytest.mark.parametrize("name, num_labels", [("top_k_accuracy", 5), ("top_k_accuracy", 2), ("roc_auc", 3)])
def test_a_metric_that_does_not_suit_the_number_of_classes(name, num_labels):
    with pytest.raises(ValueError, match=f"`metrics` holds '{name}', which cannot judge predictions of {num_labels}"):
        load_metrics([name], num_labels)


OWN_METRIC = """
    import datasets
    import evaluate


    class Own(evaluate.Metric):
        def _info(self):
            features = {{"predictions": datasets.Value("{kind}"), "references": datasets.Value("{kind}")}}
            return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

        def _compute(self, predictions, references):
            return {{"own": {value}, "table": [predictions, references]}}
"""


def write_own_metric(folder, value="len(predictions)", kind="int32"):
    folder.mkdir(exist_ok=True)
    file = folder / f"{folder.name}.py"
    file.write_text(textwrap.dedent(OWN_METRIC).format(value=value, kind=kind))
    return file


def test_a_metric_of_the_users_own(tmp_path, monkeypatch):
    file = write_own_metric(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    # A name that the Hub may know as well; the folder goes first.
    for name in (str(file), str(file.parent), "own", "./own", "own/own.py"):
        assert evaluated([name, "accuracy"], logits_of(PREDICTIONS, 3), LABELS) == {"own": 8.0, "accuracy": 5 / 8}


@pytest.mark.parametrize("name", ["no/such/metric", "./none", "none.py", "/none/none.py", ""])
def test_a_path_without_a_metric(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"`metrics` holds '{re.escape(name)}', which could not be loaded: Couldn't"
    ) as e:
        load_metrics([name], 2)
    assert all(shipped in str(e.value) for shipped in SHIPPED_METRICS)


@pytest.mark.parametrize(
    "code, reason", [("no python", "invalid syntax"), ("import no_such_library", "no_such_library")]
)
def test_a_module_that_fails(tmp_path, code, reason):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(ValueError, match=f"`metrics` holds .*broken.py', which could not be loaded: .*{reason}"):
        load_metrics([str(tmp_path / "broken.py")], 2)


def test_a_metric_of_something_else(tmp_path):
    file = write_own_metric(tmp_path / "distance", value="references[0] - 1", kind="string")
    with pytest.raises(ValueError, match=r"distance\.py', which cannot judge predictions of 3 classes"):
        load_metrics([str(file)], 3)


# Caches and the network: each in processes of its own, whose cache is another folder


def use_cache(folder):
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != str(evaluate.config.HF_MODULES_CACHE)]
    evaluate.config.HF_MODULES_CACHE = folder / "modules"
    evaluate.config.HF_METRICS_CACHE = folder / "metrics"
    evaluate.config.HF_EVALUATE_CACHE = folder / "evaluate"
    evaluate.config.DOWNLOADED_EVALUATE_PATH = folder / "downloads"
    evaluate.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def processes(folder, number=1):
    """Processes that have read nothing from the cache in the folder, nor written to it."""
    return concurrent.futures.ProcessPoolExecutor(
        number, mp_context=multiprocessing.get_context("fork"), initializer=use_cache, initargs=(folder,)
    )


def evaluated_at_endpoint(names, endpoint=None, offline=False, timeout=30.0):
    if endpoint is not None:
        evaluate.config.HF_ENDPOINT = endpoint
        evaluate.config.HUB_EVALUATE_URL = endpoint + "/spaces/{path}/resolve/{revision}/{name}"
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    metrics_module.HUB_TIMEOUT = timeout
    return evaluated(names, logits_of(PREDICTIONS, 3), LABELS)


def evaluated_together(barrier_of_start, names):
    barrier_of_start.wait(60)
    return evaluated(names, logits_of(PREDICTIONS, 3), LABELS)


@pytest.mark.slow
def test_many_processes_fill_an_empty_cache(tmp_path):
    names = ["accuracy", "balanced_accuracy", "macro_f1", str(write_own_metric(tmp_path / "own"))]
    with multiprocessing.Manager() as manager, processes(tmp_path / "cache", 4) as pool:
        start = manager.Barrier(4)
        results = list(pool.map(evaluated_together, [start] * 4, [names] * 4))
    assert results == [evaluated(names, logits_of(PREDICTIONS, 3), LABELS)] * 4
    assert (tmp_path / "cache" / "modules" / "evaluate_modules" / "metrics" / "accuracy").is_dir()


def test_a_cache_that_holds_an_older_version(tmp_path):
    file = write_own_metric(tmp_path / "own", value=1)
    with processes(tmp_path / "cache") as pool:
        assert pool.submit(evaluated_at_endpoint, [str(file)]).result() == {"own": 1.0}
        write_own_metric(file.parent, value=2)
        assert pool.submit(evaluated_at_endpoint, [str(file)]).result() == {"own": 2.0}
    with processes(tmp_path / "cache") as pool:
        assert pool.submit(evaluated_at_endpoint, [str(file)]).result() == {"own": 2.0}


@pytest.fixture
def hub():
    """A server that knows the Hub's metric `theirs` and the community's `someone/table`, and keeps what was asked."""
    source = textwrap.dedent(OWN_METRIC).format(value="len(references) / 2", kind="int32").encode()
    paths = ["/spaces/evaluate-metric/theirs/resolve/main/theirs.py", "/spaces/someone/table/resolve/main/table.py"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.asked.append(self.path)
            self.send_response(200 if self.path in paths else 404)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(source) if self.path in paths else 0))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            if self.path in paths:
                self.wfile.write(source)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["theirs", "someone/table"])
def test_a_metric_of_the_hub(tmp_path, hub, name):
    with processes(tmp_path) as pool:
        assert pool.submit(evaluated_at_endpoint, [name], hub.url).result() == {"own": 4.0}
        asked = len(hub.asked)
        assert asked > 0
        # What was loaded once is there without the Hub.
        assert pool.submit(evaluated_at_endpoint, [name], hub.url, offline=True).result() == {"own": 4.0}
        assert len(hub.asked) == asked


def test_a_metric_that_the_hub_does_not_know(tmp_path, hub):
    with processes(tmp_path) as pool, pytest.raises(ValueError) as error:
        pool.submit(evaluated_at_endpoint, ["acuracy"], hub.url).result()
    assert "`metrics` holds 'acuracy', which could not be loaded" in str(error.value)
    assert "doesn't exist on the Hugging Face Hub" in str(error.value)
    assert "could not be reached" not in str(error.value)
    assert str(SHIPPED_METRICS) in str(error.value)


def test_offline(tmp_path, hub):
    with processes(tmp_path) as pool:
        assert pool.submit(evaluated_at_endpoint, ["accuracy"], hub.url, offline=True).result() == {"accuracy": 5 / 8}
        with pytest.raises(ValueError, match=f"'theirs', which .* the Hub at {hub.url} could not be reached"):
            pool.submit(evaluated_at_endpoint, ["theirs"], hub.url, offline=True).result()
    assert hub.asked == []


def test_a_shipped_metric_asks_nobody(tmp_path, hub):
    with processes(tmp_path) as pool:
        assert pool.submit(evaluated_at_endpoint, ["accuracy"], hub.url).result() == {"accuracy": 5 / 8}
    assert hub.asked == []


def test_no_network(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with processes(tmp_path) as pool, pytest.raises(ValueError, match=f"the Hub at {url} could not be reached"):
            pool.submit(evaluated_at_endpoint, ["theirs"], url).result()


def test_a_network_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with processes(tmp_path) as pool, pytest.raises(ValueError, match=f"the Hub at {url} could not be reached"):
            pool.submit(evaluated_at_endpoint, ["theirs"], url, timeout=0.2).result()
        # It is tried once, not again and again.
        server.settimeout(0.2)
        server.accept()[0].close()
        with pytest.raises(TimeoutError):
            server.accept()


# The picture


def texts_of(path):
    """Every text of an SVG picture with its place (x, y) in points."""
    found = re.findall(r"<!-- (.*?) -->\s*<g [^>]*?transform=\"translate\(([\d.]+) ([\d.]+)\)", path.read_text())
    return [(text, float(x), float(y)) for text, x, y in found]


def test_rows_of_the_picture_are_true_classes(tmp_path):
    matrix = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    save_confusion_matrix(matrix, ["cat", "dog", "owl"], tmp_path / "picture.svg")
    texts = texts_of(tmp_path / "picture.svg")
    names = [[(x, y) for text, x, y in texts if text == name] for name in ("cat", "dog", "owl")]
    columns = [max(places, key=lambda place: place[1])[0] for places in names]  # below the cells
    rows = [min(places, key=lambda place: place[0])[1] for places in names]  # left of the cells
    assert rows == sorted(rows) and columns == sorted(columns)
    for row, column in np.ndindex(3, 3):
        (place,) = [(x, y) for text, x, y in texts if text == str(matrix[row, column])]
        assert np.argmin(np.abs(np.array(columns) - place[0])) == column
        assert np.argmin(np.abs(np.array(rows) - place[1])) == row
    assert {"true class", "predicted class"} <= {text for text, *_ in texts}


@pytest.mark.parametrize("size, has_counts, has_names", [(2, True, True), (22, False, True), (23, False, False)])
def test_pictures_of_few_and_many_classes(tmp_path, monkeypatch, size, has_counts, has_names):
    monkeypatch.setattr(metrics_module, "MOST_CLASSES_WITH_NAMES", 22)
    matrix = np.full((size, size), 777)
    matrix[0] = 0
    save_confusion_matrix(matrix, [f"name {number}" for number in range(size)], tmp_path / "picture.svg")
    texts = [text for text, *_ in texts_of(tmp_path / "picture.svg")]
    assert texts.count("777") == (size * (size - 1) if has_counts else 0)
    assert texts.count("name 1") == (2 if has_names else 0)


def test_names_of_any_kind_in_a_png(tmp_path):
    save_confusion_matrix(
        np.eye(2, dtype=int), [r"$\frac$", "a very long name of a class" * 20], tmp_path / "picture.png"
    )
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        # The darkest blue, of the two cells on the diagonal: long names leave them room.
        pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == (8, 48, 107)).all(axis=-1).mean() > 0.05


def test_names_that_do_not_fit_the_matrix(tmp_path):
    with pytest.raises(ValueError, match=r"`matrix` has the shape \(3, 3\), but `label_names` holds 2 names"):
        save_confusion_matrix(np.eye(3), ["cat", "dog"], tmp_path / "picture.png")
