"""Image classifiers of Transformers: pixels as their own processors make them, heads found and replaced, one step."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DonutImageProcessorPil,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessorPil,
    ImageGPTConfig,
    ImageGPTForImageClassification,
    ImageGPTImageProcessorPil,
    LevitConfig,
    LevitForImageClassification,
    LevitImageProcessorPil,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessorPil,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import GreenMIMImageProcessorPil, build_image_processor
from tests.training_helpers import classify, messages, predictions_of, smooth_image, tiny_config, write_class_folders
from training_greenmim.classification.models import as_evaluated
from training_greenmim.classification.probes import fold_head, freeze_encoder, head_name
from training_greenmim.data.scaling import scaling_of
from training_greenmim.runs.models import from_pretrained


NAMES = ["blue", "green", "red"]
OTHER_NAMES = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
SIZE = {"height": 32, "width": 32}


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **OTHER_NAMES)
    return ResNetForImageClassification(config), ConvNextImageProcessorPil(size={"shortest_edge": 32})


def convnext():
    config = ConvNextConfig(image_size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **OTHER_NAMES)
    return ConvNextForImageClassification(config), ConvNextImageProcessorPil(size={"shortest_edge": 32})


def mobilevit():
    config = MobileViTConfig(
        image_size=32,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8],
        num_attention_heads=2,
        **OTHER_NAMES,
    )
    return MobileViTForImageClassification(config), MobileViTImageProcessorPil(size={"shortest_edge": 36})


def efficientnet():
    config = EfficientNetConfig(
        image_size=32,
        width_coefficient=0.1,
        depth_coefficient=0.1,
        hidden_dim=128,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 2],
        depthwise_padding=[],
        **OTHER_NAMES,
    )
    return EfficientNetForImageClassification(config), EfficientNetImageProcessorPil(size=SIZE, rescale_offset=True)


def vit():
    values = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, intermediate_size=32, **values, **OTHER_NAMES)
    return ViTForImageClassification(config), ViTImageProcessorPil(size=SIZE)


def swin():
    values = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    config = SwinConfig(image_size=32, **values, **OTHER_NAMES)
    return SwinForImageClassification(config), ViTImageProcessorPil(size=SIZE, do_normalize=False)


CLASSIFIERS = {
    make.__name__: (make, head)
    for make, head in (
        (resnet, "classifier.1"),
        (convnext, "classifier"),
        (mobilevit, "classifier"),
        (efficientnet, "classifier"),
        (vit, "classifier"),
        (swin, "classifier"),
    )
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """8 images of three classes, smooth, so that roundings of resizing stay small, and not square."""
    folder = write_class_folders(tmp_path_factory.mktemp("photos"), {"red": 2, "green": 3, "blue": 3})
    for index, path in enumerate(sorted(folder.rglob("*.png"))):
        # 3 x 2 of the model's images, so that no crop is rounded.
        smooth_image(64, 200).crop((8 * index, 0, 8 * index + 96, 64)).save(path)
    return folder


@pytest.fixture(scope="module", params=CLASSIFIERS)
def checkpoint(request, tmp_path_factory):
    """Name of an architecture, and a folder with a random classifier and its image processor."""
    torch.manual_seed(0)
    model, image_processor = CLASSIFIERS[request.param][0]()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return request.param, folder


# Pixels


PROCESSORS = {
    "vit": (ViTImageProcessorPil(), 3),
    "no normalisation": (ViTImageProcessorPil(do_normalize=False), 3),
    "no rescaling": (ViTImageProcessorPil(do_rescale=False, image_mean=[100, 110, 120], image_std=[50, 60, 70]), 3),
    "another factor": (ViTImageProcessorPil(rescale_factor=1 / 127.5), 3),
    "bit": (BitImageProcessorPil(), 3),
    "convnext": (ConvNextImageProcessorPil(), 3),
    "mobilevit": (MobileViTImageProcessorPil(), 3),
    "mobilevit, RGB": (MobileViTImageProcessorPil(do_flip_channel_order=False), 3),
    "efficientnet": (EfficientNetImageProcessorPil(), 3),
    "efficientnet, offset": (EfficientNetImageProcessorPil(rescale_offset=True, rescale_factor=1 / 127.5), 3),
    "efficientnet, once": (EfficientNetImageProcessorPil(include_top=False), 3),
    "levit": (LevitImageProcessorPil(), 3),
    "poolformer": (PoolFormerImageProcessorPil(), 3),
    "greenmim": (build_image_processor(tiny_config()), 3),
    "greenmim, grey": (build_image_processor(tiny_config(num_channels=1)), 1),
    "other statistics": (GreenMIMImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]), 3),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_values_are_those_of_the_processor(name):
    image_processor, channels = PROCESSORS[name]
    pixels = np.random.default_rng(1).integers(0, 256, (3, 20, 24, channels), dtype=np.uint8)
    images = [Image.fromarray(image if channels == 3 else image[..., 0]) for image in pixels]
    expected = image_processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    found = scaling_of(image_processor, channels)(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


def test_values_by_hand():
    image = torch.rand(3, 2, 2)
    assert torch.equal(scaling_of(MobileViTImageProcessorPil(), 3)(image), image.flip(0)), "blue comes first"
    twice = scaling_of(EfficientNetImageProcessorPil(rescale_offset=True, rescale_factor=1 / 127.5), 3)
    torch.testing.assert_close(twice(image), ((2 * image - 1) - 0.5) / 0.5 / 0.5, rtol=1e-5, atol=1e-5)


class Squaring(ViTImageProcessorPil):
    def rescale(self, image, scale, **kwargs):
        return (image * scale) ** 2


class Grey(ViTImageProcessorPil):
    def rescale(self, image, scale, **kwargs):
        return np.repeat(image.mean(axis=0, keepdims=True) * scale, 3, axis=0)


@pytest.mark.parametrize(
    ("image_processor", "channels", "reason"),
    [
        (DonutImageProcessorPil(size={"height": 16, "width": 24}), 3, r"DonutImageProcessorPil, makes \(3, 16, 24\)"),
        (ImageGPTImageProcessorPil(clusters=[[0, 0, 0], [1, 1, 1]]), 3, "ImageGPTImageProcessorPil, makes None"),
        (ViTImageProcessorPil(do_convert_rgb=True), 1, r"ViTImageProcessorPil, makes .* of an image of \(1, 8, 8\)"),
        (Squaring(), 3, "Squaring, does more than scale values"),
        (Grey(), 3, "Grey, mixes channels"),
    ],
)
def test_other_processors_are_refused_by_name(image_processor, channels, reason):
    with pytest.raises(ValueError, match=f"The image processor of the model, {reason}"):
        scaling_of(image_processor, channels)


# Fine-tuning


def test_any_classifier_learns_other_classes_and_is_published_as_evaluated(checkpoint, photos, tmp_path, caplog):
    name, folder = checkpoint
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", folder, "--train_dir", photos, "--do_train", "--do_predict", "--max_steps", 1),
        *("--validation_dir", photos, "--learning_rate", 0.01, "--warmup_steps", 0, "--rand_augment", "m9-n2-inc1"),
        # Whole images: smaller crops of so few pixels are rounded differently.
        *("--crop_pct", 1),
    )
    head = CLASSIFIERS[name][1]
    log = messages(caplog)
    assert f"not for {NAMES}: it starts anew" in log and "crops images" not in log
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.id2label == dict(enumerate(NAMES)) and head_name(model) == head
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    body = {key for key in before if not key.startswith(head)}
    assert not torch.allclose(before[f"{head}.weight"], after[f"{head}.weight"], atol=0.02), "a new one"
    assert any(not torch.equal(before[key], after[key]) for key in body), "it learned"
    # What is published sees what was predicted.
    lines = predictions_of(output)
    answers = pipeline("image-classification", model=str(output))([line["image"] for line in lines])
    for line, answer in zip(lines, answers):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert scores == pytest.approx({label: float(line[label]) for label in NAMES}, abs=0.02)


def test_any_classifier_is_probed(checkpoint, photos, tmp_path):
    name, folder = checkpoint
    options = ("--model_name_or_path", folder, "--train_dir", photos, "--validation_dir", photos, "--do_predict")
    output = classify(tmp_path / "linear", *options, "--mode", "linear", "--do_train", "--max_steps", 2)
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    head = CLASSIFIERS[name][1]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and changed == {f"{head}.weight", f"{head}.bias"}
    lines = predictions_of(classify(tmp_path / "knn", *options, "--mode", "knn", "--knn_k", 8))
    votes = np.array([[float(line[label]) for label in NAMES] for line in lines])
    np.testing.assert_allclose(votes.sum(axis=1), 1, atol=1e-4)


def test_neighbours_are_searched_in_single_precision(photos, tmp_path):
    torch.manual_seed(0)
    model, image_processor = vit()
    model.save_pretrained(tmp_path / "model")
    image_processor.save_pretrained(tmp_path / "model")
    options = ("--model_name_or_path", tmp_path / "model", "--train_dir", photos, "--validation_dir", photos)
    options += ("--mode", "knn", "--knn_k", 1, "--do_eval", "--do_predict")
    for precision in ("--bf16", "--bf16_full_eval"):
        lines = predictions_of(classify(tmp_path / precision, *options, precision))
        assert [line["prediction"] for line in lines] == [line["image"].split("/")[-2] for line in lines]


# Heads


def test_the_head_is_what_has_the_classes():
    with torch.device("meta"):
        vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        clip = CLIPForImageClassification(CLIPConfig(vision_config=vision))
        levit = LevitForImageClassification(LevitConfig())
        pool = PoolFormerForImageClassification(PoolFormerConfig())
        greenmim = GreenMIMForImageClassification(tiny_config(num_labels=4))
    assert [head_name(model) for model in (clip, levit, pool, greenmim)] == [
        *("classifier", "classifier.linear", "classifier", "classifier"),
    ]


def test_a_head_inside_of_other_layers_is_probed_and_folded():
    torch.manual_seed(0)
    model, _ = resnet()
    freeze_encoder(model)
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == [
        *("classifier.1.1.weight", "classifier.1.1.bias"),
    ]
    images = torch.randn(4, 3, 32, 32)
    model.classifier.train()(torch.randn(8, 16, 1, 1) + 2)
    expected = model.eval()(images).logits
    fold_head(model)
    assert type(model.classifier[1]) is nn.Linear
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)


def save_deit_with_teacher(folder):
    values = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=32, patch_size=16, **values)).save_pretrained(folder)
    return "DeiTForImageClassificationWithTeacher, which ends with cls_classifier and distillation_classifier"


def save_image_gpt(folder):
    config = ImageGPTConfig(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=4)
    ImageGPTForImageClassification(config).save_pretrained(folder)
    return "ImageGPTForImageClassification, which takes input_ids and no images"


@pytest.mark.parametrize("save", [save_deit_with_teacher, save_image_gpt])
def test_what_cannot_be_served_is_refused_by_name(save, photos, tmp_path, monkeypatch):
    message = save(tmp_path / "model")
    if save is save_deit_with_teacher:  # Auto classes take its plain sibling; models of remote code may end so
        loading = DeiTForImageClassificationWithTeacher.from_pretrained
        monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", loading)
    with pytest.raises(ValueError, match=message):
        classify(tmp_path / "out", "--model_name_or_path", tmp_path / "model", "--train_dir", photos, "--do_train")


# What is published, and the report of loading


def test_a_processor_that_crops_in_its_own_way_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        processor = ConvNextImageProcessorPil(size={"shortest_edge": 400})
        as_evaluated(processor, ConvNextConfig(image_size=400), 0.875)
    assert "ConvNextImageProcessorPil crops images of other aspects than 400x400 px in its own way" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for share in (0.875, 1.0):
            as_evaluated(processor, ConvNextConfig(image_size=224), share)
            as_evaluated(PoolFormerImageProcessorPil(), ConvNextConfig(image_size=224), share)
            as_evaluated(build_image_processor(tiny_config()), tiny_config(), share)
    assert not caplog.text


def test_the_report_of_new_weights_is_one_line(tmp_path, caplog):
    torch.manual_seed(0)
    GreenMIMForImageClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        _, new = from_pretrained(GreenMIMForPreTraining, str(tmp_path))
    lines = [line for line in messages(caplog).splitlines() if str(tmp_path) in line]
    assert "LOAD REPORT" not in messages(caplog) and len(messages(caplog).splitlines()) == len(lines) == 1
    assert "new weights are decoder." in lines[0] and all(name.startswith("decoder") for name in new.missing)


def test_weights_of_another_shape_are_refused_unless_asked_for(tmp_path):
    GreenMIMForImageClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.bias, classifier\.weight have another shape"):
        from_pretrained(GreenMIMForImageClassification, str(tmp_path), num_labels=5)
    _, new = from_pretrained(GreenMIMForImageClassification, str(tmp_path), num_labels=5, ignore_mismatched_sizes=True)
    assert new.mismatched == ["classifier.bias", "classifier.weight"]


def test_saved_processors_load_again(checkpoint):
    _, folder = checkpoint
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert scaling_of(image_processor, 3).order == scaling_of(CLASSIFIERS[checkpoint[0]][0]()[1], 3).order
