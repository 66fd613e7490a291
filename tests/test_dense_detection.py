"""Object detection and instance segmentation: data, metric, geometry, training."""

import contextlib
import io
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as codes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from transformers import AutoModelForObjectDetection

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.drawn_objects import NAMES, box_of, draw_picture, run_lengths, write_objects
from tests.test_remote_code import run_elsewhere
from tests.training_helpers import (
    ROOT,
    assert_same_weights,
    encoded,
    messages,
    noise_image,
    results_of,
    state_of,
    tiny_config,
    weights,
    write_broken,
)
from training_greenmim.classification.metrics import load_shipped
from training_greenmim.dense.coco import (
    OBJECTS,
    box_of_mask,
    cut_box,
    decode_mask,
    encode_mask,
    read_coco_folder,
    read_objects_column,
)
from training_greenmim.dense.detecting import boxes_of, instances_of
from training_greenmim.dense.geometry import apply_to_map
from training_greenmim.dense.objects import CollateObjects, TrainObjects, WholeImage
from training_greenmim.randomness import AUGMENTATION, derived_generator


SCRIPT = "examples/dense/run_object_detection.py"
RT_DETR = (
    "num_queries=30,d_model=32,encoder_hidden_dim=32,decoder_in_channels=[32,32,32],decoder_layers=2,num_denoising=4,"
    "encoder_ffn_dim=64,decoder_ffn_dim=64,encoder_attention_heads=4,decoder_attention_heads=4"
)
MASK2FORMER = (
    "num_queries=20,hidden_dim=32,feature_size=32,mask_feature_size=32,encoder_layers=1,decoder_layers=3,"
    "num_attention_heads=4,dim_feedforward=64,encoder_feedforward_dim=64,train_num_points=512"
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small pre-training model of four stages, whose weights are those that it starts with."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_config(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2)
    GreenMIMForPreTraining(config).save_pretrained(folder)
    build_image_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Twelve and six pictures of 64 px."""
    parent = tmp_path_factory.mktemp("drawn")
    write_objects(parent / "train", 12, size=64)
    write_objects(parent / "validation", 6, seed=1, size=64)
    return parent


def detect(output: Path, *more) -> Path:
    """Runs the script in this process and returns its output folder."""
    values = ["--output_dir", output, "--per_device_train_batch_size", 4]
    values += ["--crop_size", 64] if "--do_train" in more else []  # finished models know it
    values += ["--per_device_eval_batch_size", 4, "--dataloader_num_workers", 0, "--use_cpu", "true"]
    values += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", 1]
    main = runpy.run_path(str(ROOT / SCRIPT))["main"]
    main([str(value) for value in (*values, *more)])
    return output


def new_head(pretrained: Path, overrides: str = RT_DETR) -> tuple:
    return "--model_name_or_path", pretrained, "--head_overrides", overrides


def changed(folder: Path, source: Path, change) -> Path:
    """A copy of a folder whose annotations a function changes."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "annotations.json").read_text())
    change(content)
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


# Reading


def test_folder_is_read_as_it_was_written(drawn):
    objects = read_coco_folder(str(drawn / "train"), None, "train_dir")
    assert objects.names == NAMES and objects.category_ids == [3, 5, 7] and not objects.skipped
    assert len(objects.records) == 12
    for index, record in enumerate(objects.records):
        _, numbers, classes = draw_picture(0, index, 64)
        assert record["image_id"] == 100 + index and Path(record["image"]["path"]).name == f"{index:03}.png"
        assert record[OBJECTS]["category"] == classes
        for number, (box, code) in enumerate(zip(record[OBJECTS]["bbox"], record[OBJECTS]["segmentation"]), 1):
            assert box == box_of(numbers == number)
            np.testing.assert_array_equal(decode_mask(json.loads(code), 64, 64), numbers == number)


def test_boxes_that_are_empty_or_outside_are_counted_and_others_cut(drawn, tmp_path, caplog):
    boxes = {"empty": [3, 4, 0, 9], "outside": [70, 3, 5, 5], "cut": [-4, 60, 10, 10], "touching": [0, 0, 64, 64]}

    def change(content):
        content["annotations"] = [
            {"id": number, "image_id": 101, "category_id": 3, "bbox": box} for number, box in enumerate(boxes.values())
        ]

    folder = changed(tmp_path / "train", drawn / "train", change)
    objects = read_coco_folder(str(folder), None, "train_dir")
    assert objects.skipped == {"empty boxes": 1, "boxes outside their image": 1, "boxes cut to their image": 1}
    kept = objects.records[1][OBJECTS]
    assert kept["bbox"] == [[0, 60, 6, 4], [0, 0, 64, 64]] and kept["area"] == [24, 64 * 64]
    text = messages(caplog)
    assert "1 empty boxes, left out" in text and "1 boxes cut to their image." in text
    assert [len(one["bbox"]) for one in objects.records[OBJECTS]] == [0, 2, *[0] * 10]


@pytest.mark.parametrize(
    "box, cut",
    [
        ([0, 0, 10, 20], [0, 0, 10, 20]),
        ([-5, -5, 10, 10], [0, 0, 5, 5]),
        ([8, 18, 10, 10], [8, 18, 2, 2]),
        ([0, 0, 10.0004, 20], [0, 0, 10.0004, 20]),
        ([10, 0, 5, 5], None),
        ([0, -7, 5, 5], None),
    ],
)
def test_box_is_cut_to_its_image(box, cut):
    assert cut_box(box, (10, 20)) == cut


def _without(key):
    return lambda content: content.pop(key)


def _first(part, **values):
    return lambda content: content[part][0].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (_without("categories"), r"lacks the lists \['categories'\]"),
        (_first("annotations", image_id=7), r"1 annotation\(s\) of images that it does not list, such as image_id 7"),
        (_first("annotations", category_id=4), r"1 annotation\(s\) of categories .* such as category_id 4"),
        (_first("annotations", bbox=[1, 2, 3]), r"`bbox` is \[1, 2, 3\]; four finite numbers"),
        (_first("annotations", bbox=[1, 2, 3, float("nan")]), r"four finite numbers"),
        (_first("images", file_name="gone.png"), r"1 of 12 images .* such as 'gone.png', are not in"),
        (_first("images", id=101), r"1 number\(s\) twice in 'images', such as 101"),
        (_first("categories", id="a"), r"without a whole `id`"),
        (_first("categories", name="disc"), r"categories of the same name"),
        (lambda content: content["annotations"].clear(), "12 images and not a single box"),
    ],
)
def test_annotations_that_are_wrong_are_refused(drawn, tmp_path, change, message):
    folder = changed(tmp_path / "train", drawn / "train", change)
    with pytest.raises(ValueError, match=message):
        read_coco_folder(str(folder), None, "train_dir")


def test_annotations_that_are_no_json_or_lack_are_named(drawn, tmp_path):
    (tmp_path / "notes.json").write_text("{")
    with pytest.raises(ValueError, match=r"`train_annotations` is '.*notes.json', which is not valid JSON"):
        read_coco_folder(str(drawn / "train"), str(tmp_path / "notes.json"), "train_dir")
    with pytest.raises(ValueError, match=r"`validation_dir` .* without annotations.*`validation_annotations`"):
        read_coco_folder(str(tmp_path), None, "validation_dir")
    (tmp_path / "annotations.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"`test_dir` has '.*', which lacks the lists \['categories'\]"):
        read_coco_folder(str(tmp_path), None, "test_dir")


def test_images_without_annotations_are_told_and_left_out(drawn, tmp_path, caplog):
    folder = changed(tmp_path / "train", drawn / "train", lambda content: None)
    shutil.copy(folder / "images" / "000.png", folder / "images" / "extra.png")
    assert len(read_coco_folder(str(folder), None, "train_dir").records) == 12
    assert "1 images, such as " in messages(caplog) and "extra.png" in messages(caplog)


def test_classes_take_the_numbers_of_the_model(drawn):
    objects = read_coco_folder(str(drawn / "train"), None, "validation_dir")
    before = [one["category"] for one in objects.records[OBJECTS]]
    objects.number_as(["triangle", "other", "square", "disc"], "the model")
    assert [one["category"] for one in objects.records[OBJECTS]] == [[(2, 3, 0)[n] for n in row] for row in before]
    assert objects.category_ids[0] == 7 and objects.category_ids[2:] == [3, 5]
    assert len(set(objects.category_ids)) == 4
    with pytest.raises(ValueError, match=r"`validation_dir` has classes that the model does not know: \['disc'"):
        read_coco_folder(str(drawn / "train"), None, "validation_dir").number_as(["square"], "the model")


@pytest.mark.parametrize("as_list", [False, True])
def test_column_of_objects_as_in_transformers_example(as_list):
    pixels = [{"path": None, "bytes": encoded(noise_image(seed))} for seed in range(2)]
    values = {"bbox": [[1, 2, 3, 4], [5, 5, 0, 1]], "category": [1, 0]}
    empty = {"bbox": [], "category": []}
    box, kind = datasets.List(datasets.Value("float32"), length=4), datasets.ClassLabel(names=["cat", "dog"])
    if as_list:
        feature = datasets.List({"bbox": box, "category": kind})
        values = [dict(zip(values, pair)) for pair in zip(*values.values())]
        empty = []
    else:
        feature = {"bbox": datasets.List(box), "category": datasets.List(kind)}
    features = datasets.Features({"image": datasets.Image(decode=False), "objects": feature})
    records = datasets.Dataset.from_dict({"image": pixels, "objects": [values, empty]}, features)
    objects = read_objects_column(records, "image", "objects", "dataset_name")
    assert objects.names == ["cat", "dog"] and objects.skipped == {"empty boxes": 1}
    assert objects.records[0][OBJECTS]["bbox"] == [[1, 2, 3, 4]] and objects.records[0][OBJECTS]["category"] == [1]
    assert objects.records[1][OBJECTS]["bbox"] == []
    nothing = datasets.Dataset.from_dict({"image": pixels, "objects": [values, None]}, features)
    assert nothing["objects"][1] is None
    records = read_objects_column(nothing, "image", "objects", "dataset_name").records
    assert records[:][OBJECTS] == objects.records[:][OBJECTS]
    with pytest.raises(ValueError, match=r"`objects_column_name` is 'boxes', but .* has the columns"):
        read_objects_column(records, "image", "boxes", "dataset_name")


def test_masks_of_polygons_and_codes_agree():
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:12, 6:21] = True
    polygon = [[6, 4, 21, 4, 21, 12, 6, 12]]
    for segmentation in (polygon, run_lengths(mask), encode_mask(mask)):
        np.testing.assert_array_equal(decode_mask(segmentation, 20, 30), mask)
    assert json.loads(json.dumps(encode_mask(mask))) == encode_mask(mask)
    assert box_of_mask(mask).tolist() == [6, 4, 21, 12] and box_of_mask(np.zeros((3, 3))) is None
    for wrong in (run_lengths(mask[:10]), [3], {"size": [20, 30]}):
        with pytest.raises(ValueError, match="`segmentation`"):
            decode_mask(wrong, 20, 30)


# The metric


def _random_objects(generator, count: int, scores: bool) -> dict:
    boxes, masks = [], []
    for _ in range(count):
        left, top = generator.integers(0, 60, 2)
        width, height = generator.integers(6, 40, 2)
        mask = np.zeros((100, 100), dtype=np.uint8)
        mask[top : top + height, left : left + width] = 1
        mask[top : top + height // 2, left : left + width // 3] = 0
        boxes.append([float(value) for value in (left, top, width, height)])
        masks.append(json.dumps(encode_mask(mask)))
    values = {"boxes": boxes, "labels": generator.integers(0, 3, count).tolist(), "segmentations": masks}
    if scores:
        return values | {"scores": generator.random(count).tolist()}
    areas = [float(codes.area(json.loads(mask))) for mask in masks]
    return values | {"areas": areas, "iscrowd": (generator.random(count) < 0.1).astype(int).tolist()}


def _jittered(generator, truth: dict) -> dict:
    """Most true objects a little elsewhere, some of another class, and one that is nowhere."""
    extra = _random_objects(generator, 1, scores=True)
    for box, label, code in zip(truth["boxes"], truth["labels"], truth["segmentations"]):
        if generator.random() < 0.8:
            shift = int(generator.integers(0, 3))
            mask = np.roll(codes.decode(json.loads(code)), shift, axis=1)
            extra["boxes"].append([box[0] + shift, *box[1:]])
            extra["labels"].append(label if generator.random() < 0.8 else (label + 1) % 3)
            extra["segmentations"].append(json.dumps(encode_mask(mask)))
            extra["scores"].append(float(generator.uniform(0.4, 1)))
    return extra


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_metric_equals_pycocotools_on_files(tmp_path, iou_type):
    generator = np.random.default_rng(0)
    references = [_random_objects(generator, count, scores=False) for count in (5, 0, 8, 3, 7)]
    predictions = [_jittered(generator, truth) for truth in references]
    values = load_shipped("coco_map").compute(
        predictions=predictions, references=references, iou_type=iou_type, label_names=["a", "b", "c"]
    )

    annotations, found = [], []
    for number, (truth, prediction) in enumerate(zip(references, predictions), 1):
        for index, box in enumerate(truth["boxes"]):
            entry = {"id": len(annotations) + 1, "image_id": number, "bbox": box, "area": truth["areas"][index]}
            entry |= {"category_id": truth["labels"][index] + 1, "iscrowd": truth["iscrowd"][index]}
            annotations.append(entry | {"segmentation": json.loads(truth["segmentations"][index])})
        for index, box in enumerate(prediction["boxes"]):
            entry = {"image_id": number, "category_id": prediction["labels"][index] + 1}
            entry |= {"score": prediction["scores"][index]}
            mask = json.loads(prediction["segmentations"][index])
            found.append(entry | ({"bbox": box} if iou_type == "bbox" else {"segmentation": mask}))
    images = [{"id": number, "width": 100, "height": 100} for number in range(1, 6)]
    categories = [{"id": number, "name": name} for number, name in enumerate("abc", 1)]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        judged = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), iou_type)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    for name, expected in (*zip(names, judged.stats[:6]), ("mar", judged.stats[8])):
        assert (name in values) == (expected > -1)
        if expected > -1:
            assert values[name] == pytest.approx(expected, abs=1e-12)
    assert 0.1 < values["map"] < 0.9  # neither trivial
    for number, name in enumerate("abc"):
        precision = judged.eval["precision"][:, :, number, 0, 2]
        assert values[f"map_of_{name}"] == pytest.approx(precision[precision > -1].mean(), abs=1e-12)


def test_metric_of_a_case_by_hand():
    """Class 0: two objects, one found exactly and before a wrong one: precision 1 up to recall 0.5, that is at 51 of
    101 recalls, and 0 beyond. Class 1: its object is found with an overlap of 0.9: right at 9 of 10 thresholds."""
    references = [
        {"boxes": [[0, 0, 10, 10], [20, 20, 10, 9]], "labels": [0, 1], "areas": [100, 90], "iscrowd": [0, 0]},
        {"boxes": [[1, 1, 5, 5]], "labels": [0], "areas": [25], "iscrowd": [0]},
    ]
    predictions = [
        {"boxes": [[0, 0, 10, 10], [20, 20, 10, 10]], "labels": [0, 1], "scores": [0.9, 0.8]},
        {"boxes": [[30, 30, 5, 5]], "labels": [0], "scores": [0.7]},
    ]
    for one in (*references, *predictions):
        one["segmentations"] = []
    values = load_shipped("coco_map").compute(predictions=predictions, references=references)
    assert values["map_of_0"] == pytest.approx(51 / 101) and values["map_50_of_0"] == pytest.approx(51 / 101)
    assert values["map_of_1"] == pytest.approx(0.9) and values["map_50_of_1"] == pytest.approx(1)
    assert values["map"] == pytest.approx((51 / 101 + 0.9) / 2)
    assert "map_large" not in values  # there is no large object


def test_metric_without_anything_found():
    reference = {"boxes": [[0, 0, 10, 10]], "labels": [1], "areas": [100], "iscrowd": [0], "segmentations": []}
    nothing = {"boxes": [], "labels": [], "scores": [], "segmentations": []}
    values = load_shipped("coco_map").compute(predictions=[nothing], references=[reference], label_names=["a", "b"])
    assert values["map"] == values["map_50"] == values["map_of_b"] == 0 and "map_of_a" not in values
    with pytest.raises(ValueError, match="`iou_type` is 'box'"):
        load_shipped("coco_map").compute(predictions=[nothing], references=[reference], iou_type="box")


# Geometry and batches


def _single(record: dict, index: int) -> dict:
    """A record of one of its objects."""
    return {**record, OBJECTS: {name: [values[index]] for name, values in record[OBJECTS].items()}}


@pytest.mark.parametrize("keeps_aspect", [False, True])
@pytest.mark.parametrize("size", [48, 150])
def test_boxes_and_masks_agree_with_a_map_that_is_carried_along(drawn, keeps_aspect, size):
    records = read_coco_folder(str(drawn / "train"), None, "train_dir").records
    boxes_only = TrainObjects(size, 3, scales=(0.5, 2.0), keeps_aspect=keeps_aspect)
    with_masks = TrainObjects(size, 3, scales=(0.5, 2.0), keeps_aspect=keeps_aspect, with_masks=True)
    compared, dropped = 0, 0
    for index, record in enumerate(records):
        _, numbers, classes = draw_picture(0, index, 64)
        key = (0, AUGMENTATION, index)
        geometry = boxes_only.draw(64, 64, derived_generator(*key))
        for number, kind in enumerate(classes, 1):
            left, top, width, height = map(int, box_of(numbers == number))
            filled = np.zeros((64, 64), dtype=np.uint8)
            filled[top : top + height, left : left + width] = 1
            expected = box_of_mask(apply_to_map(filled, geometry, 0))
            alone = _single(record, number - 1)
            found = boxes_only(record["image"], alone, derived_generator(*key))
            shown = with_masks(record["image"], alone, derived_generator(*key))
            assert torch.equal(found["pixel_values"], shown["pixel_values"])
            if not len(found["boxes"]):
                dropped += 1
                continue
            # The centre of a pixel lies in the box or beside it.
            assert np.abs(found["boxes"][0].numpy() - expected).max() <= 0.5 + 1e-4
            assert found["class_labels"].tolist() == [kind]
            carried = apply_to_map((numbers == number).astype(np.uint8), geometry, 0)
            if carried.any():
                np.testing.assert_array_equal(shown["masks"][0].numpy(), carried)
            compared += 1
    assert compared > 10 and dropped > 0


def test_crowds_and_slivers_are_not_trained_on(drawn):
    record = read_coco_folder(str(drawn / "train"), None, "train_dir").records[0]
    objects = {name: values[:1] * 3 for name, values in record[OBJECTS].items()}
    objects |= {
        "bbox": [[0, 0, 64, 64], [0, 0, 64, 0.5], [10, 10, 20, 20]],
        "iscrowd": [1, 0, 0],
        "category": [0, 1, 2],
    }
    sample = TrainObjects(64, 3, scales=(1, 1))(record["image"], {**record, OBJECTS: objects}, derived_generator(0))
    assert sample["class_labels"].tolist() == [2]


def test_image_of_another_size_than_its_annotations_is_refused(drawn):
    record = read_coco_folder(str(drawn / "train"), None, "train_dir").records[0]
    with pytest.raises(ValueError, match="it is 64x64 px upright, but its annotations are for an image of 64x32 px"):
        WholeImage(64, 3)(record["image"], {**record, "height": 32})


def test_batches_are_padded_to_whole_steps():
    samples = [
        {
            "pixel_values": torch.full((3, height, width), 200, dtype=torch.uint8),
            "filled": (height, width - 2),
            "class_labels": torch.tensor([1]),
            "boxes": torch.tensor([[8.0, 4.0, 16.0, 12.0]]),
            "unreadable": [],
        }
        for height, width in ((20, 30), (33, 16))
    ]
    batch = CollateObjects(16)(samples)
    assert batch["pixel_values"].shape == (2, 3, 48, 32) and batch["pixel_mask"].shape == (2, 48, 32)
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [20 * 28, 33 * 14]
    assert batch["pixel_values"][0, :, 20:].max() == 0 and batch["pixel_values"][1, :, :33, :16].min() == 200
    for labels in batch["labels"]:
        torch.testing.assert_close(labels["boxes"], torch.tensor([[12 / 32, 8 / 48, 8 / 32, 8 / 48]]))


@pytest.mark.parametrize("keeps_aspect", [False, True])
def test_boxes_come_back_to_the_pixels_of_their_image(tmp_path, keeps_aspect):
    Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
    sample = WholeImage(128, 3, keeps_aspect=keeps_aspect)({"path": str(tmp_path / "image.png"), "bytes": None})
    batch = CollateObjects(32)([{**sample, "unreadable": [], "index": 0, "readable": True}])
    canvas = batch["pixel_values"].shape[2:]
    assert tuple(canvas) == ((96, 128) if keeps_aspect else (128, 128))
    rows, columns = (85, 128) if keeps_aspect else (128, 128)
    box = np.array([18.0, 12.0, 45.0, 30.0])  # left, top, width, height in the image
    left, top, width, height = box * np.array([columns / 90, rows / 60] * 2) / np.array([canvas[1], canvas[0]] * 2)
    outputs = SimpleNamespace(
        logits=torch.tensor([[[-9.0, -9.0], [-9.0, 4.0]]]),
        pred_boxes=torch.tensor([[[0.5, 0.5, 1, 1], [left + width / 2, top + height / 2, width, height]]]),
    )
    found = boxes_of(outputs, batch["filled"], batch["size"], tuple(canvas))[0]
    assert found.labels[0] == 1 and found.scores[0] == pytest.approx(torch.tensor(4.0).sigmoid().item())
    np.testing.assert_allclose(found.boxes[0], box, atol=1e-3)
    assert found.boxes[:, :2].min() >= 0 and (found.boxes[:, 0] + found.boxes[:, 2]).max() <= 90 + 1e-6


def test_masks_come_back_to_the_pixels_of_their_image():
    """A query's mask fills a rectangle of the upper 3/4 of a padded canvas, the rest of which is no image."""
    masks = torch.full((1, 3, 32, 32), -8.0)
    masks[0, 1, 6:18, 8:24] = 8.0
    masks[0, 2, 24:, :] = 8.0  # in the padding alone
    classes = torch.full((1, 3, 3), -9.0)
    classes[0, :, 2] = 9.0
    classes[0, 1] = torch.tensor([-9.0, 9.0, 0.0])
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    found = instances_of(outputs, torch.tensor([[96, 128]]), torch.tensor([[64, 48]]), (128, 128))[0].above(0.5)
    assert found.labels.tolist() == [1] and found.boxes.tolist() == [[16, 12, 32, 24]]
    expected = np.zeros((48, 64), dtype=bool)
    expected[12:36, 16:48] = True
    np.testing.assert_array_equal(decode_mask(found.masks[0], 48, 64), expected)
    assert 0.9 < found.scores[0] < 1


def test_masks_end_where_the_image_does_on_a_padded_canvas():
    """An image fills 149 of 160 rows: no whole number of pixels of masks at a quarter of the canvas."""
    height, width, filled, canvas = 333, 500, (149, 224), (160, 224)
    true = np.zeros((height, width), dtype=np.uint8)
    true[300:324, 200:260] = 1
    on_canvas = torch.zeros(1, 1, *canvas)
    on_canvas[..., : filled[0], :] = nn.functional.interpolate(
        torch.from_numpy(true)[None, None].float(), filled, mode="area"
    )
    quarter = nn.functional.interpolate(on_canvas, scale_factor=0.25, mode="area")
    outputs = SimpleNamespace(
        class_queries_logits=torch.tensor([[[9.0, -9.0]]]), masks_queries_logits=16 * quarter - 8
    )
    found = instances_of(outputs, torch.tensor([filled]), torch.tensor([[width, height]]), canvas)[0]
    rows, expected = (np.nonzero(mask)[0] for mask in (decode_mask(found.masks[0], height, width), true))
    assert abs(rows.mean() - expected.mean()) < 1


@pytest.mark.parametrize("segmentation", [[[1, 2]], [[]], {"size": [4, 4]}, "no"])
def test_masks_that_cannot_be_read_are_told(segmentation):
    with pytest.raises(ValueError, match="segmentation"):
        decode_mask(segmentation, 4, 4)


# Runs


@pytest.mark.parametrize("task, head", [("detection", RT_DETR), ("instances", MASK2FORMER)])
def test_run_trains_evaluates_and_predicts(pretrained, drawn, tmp_path, task, head):
    parts = ("--train_dir", drawn / "train", "--validation_dir", drawn / "validation")
    output = detect(
        tmp_path / "run",
        *(*new_head(pretrained, head), *parts, "--task", task, "--max_steps", 2, "--do_train", "--do_eval"),
        "--do_predict",
    )
    results = results_of(output)
    assert {"eval_map", "eval_map_50", "eval_map_of_disc", "eval_map_50_of_square"} <= results.keys()
    assert f"# {output.name}" in (output / "README.md").read_text() and (output / "predictions.png").is_file()
    assert json.loads((output / "config.json").read_text())["id2label"] == {str(i): n for i, n in enumerate(NAMES)}

    # What was predicted is judged by pycocotools alone as evaluation judged it.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(drawn / "validation" / "annotations.json"))
        found = truth.loadRes(str(output / "predictions" / "predictions.json"))
        judged = COCOeval(truth, found, "segm" if task == "instances" else "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    # Boxes in the file are rounded to hundredths of a pixel.
    assert judged.stats[0] == pytest.approx(results["eval_map"], abs=0.01)
    overlays = sorted(path.name for path in (output / "predictions" / "overlays").iterdir())
    assert overlays == [f"{index:03}.png" for index in range(6)]
    images = json.loads((output / "predictions" / "images.json").read_text())
    assert [one["id"] for one in images["images"]] == list(range(100, 106))
    assert [one["id"] for one in images["categories"]] == [3, 5, 7]

    # A finished folder evaluates as it did at the end of its training, and predicts images without annotations.
    finished = ("--model_name_or_path", output, "--task", task)
    again = detect(tmp_path / "again", *finished, "--validation_dir", drawn / "validation", "--do_eval")
    assert results_of(again)["eval_map"] == results["eval_map"]
    images = drawn / "validation" / "images"
    plain = detect(tmp_path / "plain", *finished, "--test_dir", images, "--do_predict")
    entries = json.loads((plain / "predictions" / "predictions.json").read_text())
    assert {one["image_id"] for one in entries} <= set(range(1, 7)) and len(entries) > 0

    # A list of the images without annotations, as COCO has it for tests, gives them their numbers.
    listed = changed(tmp_path / "listed", drawn / "validation", lambda content: content.pop("annotations"))
    numbered = detect(tmp_path / "numbered", *finished, "--test_dir", listed, "--do_predict")
    predictions = [folder / "predictions" / "predictions.json" for folder in (output, numbered)]
    assert predictions[0].read_text() == predictions[1].read_text()


@pytest.mark.parametrize("task, head", [("detection", RT_DETR), ("instances", MASK2FORMER)])
def test_resumed_run_equals_one_that_was_not_stopped(pretrained, drawn, tmp_path, task, head):
    common = (*new_head(pretrained, head), "--train_dir", drawn / "train", "--validation_dir", drawn / "validation")
    common += ("--do_train", "--max_steps", 4, "--task", task, "--drop_path_rate", 0.3, "--color_jitter", 0.2)
    whole = detect(tmp_path / "whole", *common, "--save_strategy", "steps", "--save_steps", 2)
    resumed = detect(
        tmp_path / "resumed",
        *(*common, "--resume_from_checkpoint", whole / "checkpoint-2", "--dataloader_num_workers", 2),
    )
    assert_same_weights(whole, resumed)
    losses = [[one["loss"] for one in state_of(folder)["log_history"] if "loss" in one] for folder in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_other_annotations_are_another_run(pretrained, drawn, tmp_path):
    common = (*new_head(pretrained), "--do_train", "--max_steps", 2)
    whole = detect(
        tmp_path / "whole", *common, "--train_dir", drawn / "train", "--save_strategy", "steps", "--save_steps", 1
    )
    moved = changed(tmp_path / "moved", drawn / "train", _first("annotations", bbox=[1, 1, 9, 9]))
    with pytest.raises(ValueError, match="checksum of training images"):
        detect(
            tmp_path / "other",
            *(*common, "--train_dir", moved, "--resume_from_checkpoint", whole / "checkpoint-1"),
        )


def test_saved_folder_loads_where_the_project_is_not(pretrained, drawn, tmp_path):
    output = detect(
        tmp_path / "run",
        *(*new_head(pretrained), "--train_dir", drawn / "train", "--do_train", "--max_steps", 1),
    )
    image = drawn / "validation" / "images" / "000.png"
    code = f"""
from PIL import Image
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True).eval()
image = Image.open({str(image)!r})
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
print(outputs.pred_boxes[0, 0].tolist(), list(model.config.id2label.values()))
print(processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 64)])[0]["boxes"].shape[1])
"""
    found, columns = run_elsewhere(code, output, tmp_path).strip().splitlines()
    model = AutoModelForObjectDetection.from_pretrained(output).eval()
    pixels = WholeImage(64, 3)({"path": str(image), "bytes": None})["pixel_values"] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        box = model(pixel_values=((pixels - mean) / std)[None]).pred_boxes[0, 0]
    assert found.endswith(str(NAMES)) and columns == "4"
    torch.testing.assert_close(torch.tensor(json.loads(found.partition("]")[0] + "]")), box, atol=1e-3, rtol=0)


def test_frozen_stages_stay_as_they_were(pretrained, drawn, tmp_path):
    output = detect(
        tmp_path / "run",
        *(*new_head(pretrained), "--train_dir", drawn / "train", "--do_train", "--max_steps", 2),
        *("--freeze_stages", 2),
    )
    before, after = weights(pretrained), weights(output)
    names = {name.partition("greenmim.")[2]: name for name in after if "greenmim.e" in name}
    same = {
        name.partition("greenmim.")[2]: torch.equal(value, after[names[name.partition("greenmim.")[2]]])
        for name, value in before.items()
        if name.partition("greenmim.")[2] in names
    }
    frozen = ("embeddings.", "encoder.layers.0.", "encoder.layers.1.")
    assert all(same[name] for name in same if name.startswith(frozen))
    assert not any(value for name, value in same.items() if name.startswith("encoder.layers.3.") and "mlp" in name)


def test_unusable_images_are_counted_skips(pretrained, drawn, tmp_path, caplog):
    train = changed(tmp_path / "train", drawn / "train", _first("images", width=10, height=10))
    validation = changed(tmp_path / "validation", drawn / "validation", lambda content: None)
    write_broken(validation / "images" / "003.png")
    output = detect(
        tmp_path / "run",
        *(*new_head(pretrained), "--train_dir", train, "--validation_dir", validation, "--num_train_epochs", 1),
        *("--do_train", "--do_eval"),
    )
    assert results_of(output)["eval_unreadable"] == 1
    text = messages(caplog)
    assert "000.png (it is 64x64 px upright, but its annotations are for an image of 10x10 px" in text
    assert "003.png" in text


def test_images_of_16_bits_and_many_channels(pretrained, tmp_path):
    folder = write_objects(tmp_path / "train", 8, size=64)
    content = json.loads((folder / "annotations.json").read_text())
    for entry in content["images"]:
        path = folder / "images" / entry["file_name"]
        pixels = np.asarray(Image.open(path)).astype(np.uint16) * 16
        np.save(path.with_suffix(".npy"), np.concatenate([pixels, pixels[..., :2]], axis=2))
        path.unlink()
        entry["file_name"] = path.with_suffix(".npy").name
    (folder / "annotations.json").write_text(json.dumps(content))
    output = detect(
        tmp_path / "run",
        *(*new_head(pretrained), "--train_dir", folder, "--do_train", "--do_eval", "--do_predict", "--max_steps", 1),
        *("--config_overrides", "num_channels=5"),
    )
    processor = json.loads((output / "preprocessor_config.json").read_text())
    assert len(processor["image_range"]) == 5 and "eval_map" in results_of(output)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--task", "keypoints"), "`task` is 'keypoints'; it must be one of detection, instances"),
        (("--head", "upernet"), "`head` is 'upernet', but `task` is 'detection'"),
        (("--recipe", "best"), "`recipe` is 'best'; it must be one of"),
        (("--size_divisor", 0), "`size_divisor` is 0"),
        (("--validation_annotations", "x.json"), "`validation_annotations` is 'x.json', but `validation_dir`"),
        (("--freeze_stages", 9), "`freeze_stages` is 9; the model has 4 stages"),
        (("--test_dir", "nowhere", "--do_predict"), "`test_dir` is 'nowhere'"),
    ],
)
def test_arguments_that_are_wrong_are_refused(pretrained, drawn, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        detect(tmp_path, *new_head(pretrained), "--train_dir", drawn / "train", "--do_train", "--max_steps", 1, *more)


def test_model_of_another_task_or_without_a_head_is_refused(pretrained, drawn, tmp_path):
    data = ("--validation_dir", drawn / "validation", "--do_eval")
    with pytest.raises(ValueError, match="which has no trained head: give `do_train` too"):
        detect(tmp_path / "first", *new_head(pretrained), *data)
    train = ("--train_dir", drawn / "train", "--do_train", "--max_steps", 1)
    output = detect(tmp_path / "run", *new_head(pretrained), *train)
    with pytest.raises(ValueError, match="which is for another task"):
        detect(tmp_path / "second", "--model_name_or_path", output, "--task", "instances", *data)
    other = changed(tmp_path / "other", drawn / "validation", _first("categories", name="hexagon"))
    with pytest.raises(ValueError, match=r"`validation_dir` has classes that the model does not know: \['hexagon'\]"):
        detect(tmp_path / "third", "--model_name_or_path", output, "--validation_dir", other, "--do_eval")


@pytest.mark.slow
def test_drawn_shapes_are_found(tmp_path):
    """From scratch; a few minutes on two cores."""
    train, validation = (write_objects(tmp_path / str(seed), count, seed) for seed, count in ((0, 256), (1, 48)))
    encoder = "image_size=128,embed_dim=32,depths=[1,1,2,1],num_heads=[1,2,4,8],window_size=4"
    head = (
        "num_queries=30,d_model=64,encoder_hidden_dim=64,decoder_layers=3,num_denoising=20,encoder_ffn_dim=128,"
        "decoder_ffn_dim=128,encoder_attention_heads=4,decoder_attention_heads=4,hidden_expansion=0.5,encoder_layers=0,encode_proj_layers=[]"
    )
    output = detect(
        tmp_path / "run",
        *("--config_name", "tiny", "--config_overrides", encoder, "--head_overrides", head, "--crop_size", 128),
        *("--train_dir", train, "--validation_dir", validation, "--do_train", "--do_eval", "--num_train_epochs", 18),
        *("--per_device_train_batch_size", 8, "--learning_rate", 2e-3, "--layer_decay", 1, "--drop_path_rate", 0),
        *("--scale_range", 1, 1, "--weight_decay", 1e-4),
    )
    results = results_of(output)
    assert results["eval_map_50"] > 0.9 and min(results[f"eval_map_50_of_{name}"] for name in NAMES) > 0.8
