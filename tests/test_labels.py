"""Labels: folders of classes, columns of any type, agreement between the parts, stratified draws."""

from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Value
from datasets import Image as ImageFeature

from tests.training_helpers import encoded, messages, noise_image, write_class_folders, write_images
from training_greenmim.data.labels import (
    LabelledData,
    check_classes,
    class_weights,
    find_label_column,
    label_names,
    prepare,
    split,
    stratified_subset,
    with_names,
)
from training_greenmim.data.readers import LABEL, Part, load_class_folders


CONTENT = encoded(noise_image(0, 8, 8))


def labelled(labels: list, feature, column: str = "label", image_column: str = "image") -> datasets.Dataset:
    features = datasets.Features({image_column: ImageFeature(), column: feature})
    photos = [{"path": f"{index}.png", "bytes": CONTENT} for index in range(len(labels))]
    return datasets.Dataset.from_dict({image_column: photos, column: labels}, features)


def classes_of(records: datasets.Dataset) -> list[str]:
    return [label_names(records)[number] for number in records[LABEL]]


def paths_of(records: datasets.Dataset) -> list[str]:
    return [image["path"] for image in records["image"]]


# Folders


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    write_images(tmp_path / "tulip" / "deep" / "down", 2)
    write_images(tmp_path / "daisy", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image, no class")
    records = load_class_folders(str(tmp_path), "train_dir")
    assert label_names(records) == ["daisy", "tulip"]
    assert [Path(path).relative_to(tmp_path).parts[0] for path in paths_of(records)] == classes_of(records)
    assert Counter(classes_of(records)) == {"daisy": 3, "tulip": 2}


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_image_outside_the_class_folders_is_refused(tmp_path, slash):
    write_class_folders(tmp_path, {"a": 1, "b": 1})
    write_images(tmp_path, 2)
    with pytest.raises(ValueError, match=r"`validation_dir` is '.*': 2 images, such as '000\.png', have no label"):
        load_class_folders(f"{tmp_path}{slash}", "validation_dir")


# Columns


@pytest.mark.parametrize("column", ["label", "labels"])
def test_columns_called_label_are_found(column):
    records = labelled([0, 1], Value("int64"), column)
    assert find_label_column(records, None) == column


def test_a_column_of_classes_goes_before_one_called_label():
    records = labelled([0, 1], ClassLabel(names=["x", "y"]), "species").add_column("label", ["p", "q"])
    assert find_label_column(records, None) == "species" and find_label_column(records, "label") == "label"


def test_no_label_column_and_several_are_refused_with_the_columns():
    with pytest.raises(ValueError, match=r"`label_column_name` is not given.*no label column among \['image', 'kind'"):
        find_label_column(labelled([0], Value("int64"), "kind"), None)
    two = labelled([0, 1], Value("int64"), "label").add_column("labels", [1, 0])
    with pytest.raises(ValueError, match=r"`label_column_name` is not given.*\['label', 'labels'\]"):
        find_label_column(two, None)
    with pytest.raises(ValueError, match=r"`label_column_name` is 'lable', but.*\['image', 'label'\]"):
        find_label_column(labelled([0], Value("int64")), "lable")


COLUMNS = [
    (["b", "a", "b"], Value("string"), ["a", "b"], ["b", "a", "b"]),
    (["b", "a"], Value("large_string"), ["a", "b"], ["b", "a"]),
    ([10, 2, -5, 2], Value("int64"), ["-5", "2", "10"], ["10", "2", "-5", "2"]),  # by value, not by text
    ([3, 1], Value("uint8"), ["1", "3"], ["3", "1"]),
    ([True, False], Value("bool"), ["False", "True"], ["True", "False"]),
    ([1, 1], ClassLabel(names=["z", "y", "x"]), ["z", "y", "x"], ["y", "y"]),  # keeps classes without images
]


@pytest.mark.parametrize(("labels", "feature", "names", "expected"), COLUMNS, ids=[str(case[1]) for case in COLUMNS])
def test_labels_of_any_kind_become_classes(labels, feature, names, expected):
    for column, image_column in (("label", "image"), ("kind", "photo")):
        records = prepare(labelled(labels, feature, column, image_column), "dataset_name", image_column, column)
        assert set(records.features) == {"image", LABEL} and records.features["image"].decode is False
        assert label_names(records) == names and classes_of(records) == expected


def test_columns_may_have_each_others_names():
    records = labelled(["a", "b"], Value("string"), "kind", "label")
    assert classes_of(prepare(records, "dataset_name", "label", "kind")) == ["a", "b"]


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0.5, 1.0], Value("float32")),
        ([[0], [1]], datasets.List(ClassLabel(names=["a", "b"]))),
        ([{"x": 1}, {"x": 2}], {"x": Value("int64")}),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, feature):
    with pytest.raises(ValueError, match=r"`label_column_name` is 'label', a column of.*numbers or text"):
        prepare(labelled(labels, feature), "dataset_name", None, "label")


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        (["a", None, "b", None], Value("string")),
        ([0, None, 1, None], Value("int64")),
        ([0, -1, 1, None], ClassLabel(names=["a", "b"])),
    ],
)
def test_missing_labels_are_counted_and_named(labels, feature):
    records = labelled(labels, feature, "kind")
    for may_lack_labels in (False, True):
        with pytest.raises(ValueError, match=r"`dataset_name`: 2 of 4 images have no label in column 'kind'.*image 1"):
            prepare(records, "dataset_name", None, "kind", may_lack_labels)


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_test_part_may_keep_its_labels_secret(labels):
    records = labelled(labels, ClassLabel(names=["a", "b"]))
    assert set(prepare(records, "dataset_name", may_lack_labels=True).features) == {"image"}
    without = records.remove_columns(["label"])
    assert set(prepare(without, "dataset_name", None, "label", may_lack_labels=True).features) == {"image"}
    for secret in (records, without):
        with pytest.raises(ValueError, match=r"no label column|have no label"):
            prepare(secret, "dataset_name")


def test_an_image_column_of_numbers_is_refused():
    records = labelled([0, 1], Value("int64"), "label").add_column("size", [3, 4])
    with pytest.raises(ValueError, match=r"`image_column_name` is 'size', a column of.*images are needed"):
        prepare(records, "dataset_name", "size", "label")


# Agreement


def test_one_class_is_refused():
    for labels, names in (([1, 1], ["a", "b"]), ([0], ["a"])):
        records = prepare(labelled(labels, ClassLabel(names=names)), "train_dir")
        with pytest.raises(ValueError, match=f"`train_dir` has images of the class '{names[labels[0]]}' only; two"):
            check_classes(records, "train_dir")
    with pytest.raises(ValueError, match="`train_dir` has images of no class"):
        check_classes(labelled([], ClassLabel(names=["a", "b"])), "train_dir")


def test_classes_are_numbered_as_others(caplog):
    records = prepare(labelled(["b", "c", "b"], Value("string")), "validation_dir")
    renumbered = with_names(records, ["c", "a", "b"], "validation_dir", "`train_dir`")
    assert renumbered[LABEL][:] == [2, 0, 2] and label_names(renumbered) == ["c", "a", "b"]
    assert paths_of(renumbered) == paths_of(records)
    assert "`validation_dir` has no image of 1 of 3 classes, such as 'a'" in messages(caplog)


def test_other_names_are_refused():
    records = prepare(labelled(["cat", "Dog", "dog"], Value("string")), "validation_dir")
    with pytest.raises(
        ValueError, match=r"`validation_dir` has the labels \['Dog'\], which `train_dir` does not have"
    ):
        with_names(records, ["cat", "dog"], "validation_dir", "`train_dir`")


def test_a_class_without_images_is_no_other_name():
    records = prepare(labelled([0, 0], ClassLabel(names=["a", "unused"])), "validation_dir")
    assert with_names(records, ["b", "a"], "validation_dir", "the model")[LABEL][:] == [1, 1]


def test_all_parts_are_numbered_but_those_without_labels():
    train, other = (prepare(labelled(labels, Value("string")), "x") for labels in (["b", "a"], ["b", "b"]))
    unlabelled = train.remove_columns([LABEL])
    data = LabelledData(Part(train, "train_dir"), Part(other, "validation_dir"), Part(unlabelled, "test_dir"))
    assert len(data.parts()) == 3 and LabelledData().parts() == []
    data.number_as(["b", "a"], "the model")
    assert data.train.records[LABEL][:] == [0, 1] and data.validation.records[LABEL][:] == [0, 0]
    assert not data.test.is_labelled and data.train.is_labelled


# Draws


def unbalanced() -> datasets.Dataset:
    """80 images of a, 20 of b."""
    labels = [1 if index % 5 == 0 else 0 for index in range(100)]
    return prepare(labelled(labels, ClassLabel(names=["a", "b"])), "train_dir")


def test_draws_keep_shares_and_depend_on_the_seed_alone():
    records = unbalanced()
    first, again, other = (stratified_subset(records, 10, seed, "max_train_samples") for seed in (1, 1, 2))
    assert Counter(classes_of(first)) == Counter(classes_of(other)) == {"a": 8, "b": 2}
    assert paths_of(first) == paths_of(again) and set(paths_of(first)) != set(paths_of(other))
    assert len(set(paths_of(first))) == 10


@pytest.mark.parametrize("count", [None, 100, 1000])
def test_all_are_drawn_where_no_fewer_are_wanted(count):
    assert len(stratified_subset(unbalanced(), count, 0, "max_train_samples")) == 100


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_too_few_for_all_classes_are_refused(count):
    with pytest.raises(ValueError, match=f"`max_eval_samples` is {count}, but the classes cannot be drawn so"):
        stratified_subset(unbalanced(), count, 0, "max_eval_samples")


def test_parts_are_disjoint_with_equal_shares():
    records = unbalanced()
    train, test = split(records, 0.25, seed=3)
    assert Counter(classes_of(train)) == {"a": 60, "b": 15} and Counter(classes_of(test)) == {"a": 20, "b": 5}
    assert sorted(paths_of(train) + paths_of(test)) == sorted(paths_of(records))
    assert paths_of(split(records, 0.25, seed=3)[1]) == paths_of(test) != paths_of(split(records, 0.25, seed=4)[1])


def test_a_class_of_one_image_cannot_be_split():
    records = prepare(labelled([0, 0, 0, 1], ClassLabel(names=["a", "b"])), "train_dir")
    with pytest.raises(ValueError, match=r"`train_val_split` is 0\.5, but the classes are too small"):
        split(records, 0.5, seed=0)


def test_class_weights_are_inverse_shares():
    # 100 / (2 * 80) and 100 / (2 * 20): an average image has weight 1.
    assert class_weights(unbalanced()) == [0.625, 2.5]
    records = prepare(labelled([0, 0, 2], ClassLabel(names=["a", "unused", "c"])), "train_dir")
    assert class_weights(records) == [0.5, 1.0, 1.0]
