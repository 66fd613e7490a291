"""Models and example scripts of Transformers take our classes as they take its own."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerSwinConfig,
    SwinConfig,
    SwinModel,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_greenmim import GreenMIMBackbone, GreenMIMConfig, GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.oracle import assert_close, random_images, randomize, tiny_config
from tests.test_swin import copy_to_swin


SIZES = [(96, 96), (90, 70)]


def backbone_config(**changes) -> GreenMIMConfig:
    values = {"image_size": 96, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3}
    return GreenMIMConfig(**values, out_features=["stage1", "stage2", "stage3", "stage4"], **changes)


def assert_trains(model, loss) -> None:
    """Gradients reach the patch embedding of the backbone, through every output norm."""
    loss.backward()
    (backbone,) = (module for module in model.modules() if isinstance(module, GreenMIMBackbone))
    parameters = dict(backbone.named_parameters())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters.values())
    assert parameters["greenmim.embeddings.patch_embeddings.projection.weight"].grad.any()


@pytest.mark.parametrize("size", SIZES)
def test_upernet(size):
    config = UperNetConfig(
        backbone_config=backbone_config(), hidden_size=8, num_labels=3, use_auxiliary_head=True, auxiliary_channels=8
    )
    config.auxiliary_in_channels = 32
    model = UperNetForSemanticSegmentation(config).train()
    outputs = model(torch.randn(2, 3, *size), labels=torch.randint(0, 3, (2, *size)))
    assert outputs.logits.shape == (2, 3, *size)
    assert_trains(model, outputs.loss)


def test_upernet_learns_to_segment():
    """Dark squares on bright ground: a short fine-tuning on images made here."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 64, 64) * 0.1 + 1, torch.zeros(4, 64, 64, dtype=torch.long)
    for index, corner in enumerate((0, 16, 32, 8)):
        square = (index, slice(corner, corner + 32), slice(corner, corner + 32))
        labels[square] = 1
        images.movedim(1, -1)[square] -= 2
    config = UperNetConfig(backbone_config=backbone_config(), hidden_size=16, num_labels=2, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(images).logits.argmax(1) == labels).float().mean()
    assert right > 0.95


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["maskformer", "mask2former"])
def test_mask_transformers(kind, size):
    small = {"num_labels": 3, "num_queries": 4}
    if kind == "maskformer":
        decoder = DetrConfig(
            d_model=32, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, num_queries=4
        )
        config = MaskFormerConfig(backbone_config=MaskFormerSwinConfig(), decoder_config=decoder, num_labels=3)
        config.backbone_config = backbone_config()
        config.fpn_feature_size = config.mask_feature_size = 32
        model = MaskFormerForInstanceSegmentation(config)
    else:
        widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
        layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16}
        config = Mask2FormerConfig(
            backbone_config=backbone_config(), **widths, **layers, **small, train_num_points=32, common_stride=4
        )
        model = Mask2FormerForUniversalSegmentation(config)
    masks = [torch.randint(0, 2, (2, *size)).float() for _ in range(2)]
    classes = [torch.tensor([0, 2]), torch.tensor([1, 2])]
    outputs = model.train()(torch.randn(2, 3, *size), mask_labels=masks, class_labels=classes)
    assert outputs.class_queries_logits.shape[::2] == (2, 4)
    assert_trains(model, outputs.loss)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["detr", "deformable"])
def test_detection_transformers(kind, size):
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 3}
    config_class, model_class = DetrConfig, DetrForObjectDetection
    if kind == "deformable":
        config_class, model_class = DeformableDetrConfig, DeformableDetrForObjectDetection
    model = model_class(config_class(backbone_config=backbone_config(), **layers, **heads)).train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    outputs = model(torch.randn(2, 3, *size), labels=labels)
    assert outputs.pred_boxes.shape == (2, 5, 4)
    outputs.loss.backward()
    (backbone,) = (module for module in model.modules() if isinstance(module, GreenMIMBackbone))
    assert backbone.greenmim.embeddings.patch_embeddings.projection.weight.grad.any()


def test_maps_equal_those_of_swin_model_before_downsampling():
    """On all stages, those not larger than the window as well."""
    config = tiny_config(image_size=64, window_size=4, depths=[2, 2, 2], num_heads=[1, 2, 2])
    config.set_output_features_output_indices(out_features=["stage1", "stage2", "stage3"], out_indices=None)
    ours = randomize(GreenMIMBackbone(config))
    names = ("image_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "layer_norm_eps")
    swin = SwinConfig(**{name: getattr(config, name) for name in names}, drop_path_rate=0.0)
    theirs = SwinModel(swin).double().eval()
    copy_to_swin(ours.greenmim, theirs)
    before = {}
    for index, layer in enumerate(theirs.encoder.layers):
        block = layer.blocks[-1]
        block.register_forward_hook(lambda module, given, output, index=index: before.__setitem__(index, output))
    pixel_values = random_images(1, 64, 64)
    with torch.no_grad():
        states = ours(pixel_values, output_hidden_states=True).hidden_states[1:]
        theirs(pixel_values)
    assert len(before) == len(states) == 3
    for index, state in enumerate(states):
        expected = before[index][0] if isinstance(before[index], tuple) else before[index]
        assert_close(state.flatten(2).transpose(1, 2), expected.reshape(1, -1, expected.shape[-1]))


# What Transformers' example scripts do with a model. The scripts need torchvision, which not everybody can install.


class MaskGenerator:
    """As in examples/pytorch/image-pretraining/run_mim.py: units of `mask_patch_size` pixels, flags of patches."""

    def __init__(self, input_size: int, mask_patch_size: int, model_patch_size: int, mask_ratio: float):
        self.side, self.scale = input_size // mask_patch_size, mask_patch_size // model_patch_size
        self.count = round(self.side**2 * mask_ratio)

    def __call__(self) -> torch.Tensor:
        mask = torch.zeros(self.side**2, dtype=torch.int)
        mask[torch.randperm(self.side**2)[: self.count]] = 1
        mask = mask.view(self.side, self.side)
        return mask.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1).flatten()


def test_calls_of_run_mim(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    # The script writes sizes into the configuration, `encoder_stride` among them.
    config.update({"image_size": 96, "patch_size": config.patch_size, "encoder_stride": config.encoder_stride})
    model = AutoModelForMaskedImageModeling.from_config(config)
    assert isinstance(model, GreenMIMForPreTraining)
    generator = MaskGenerator(96, config.encoder_stride, config.patch_size, 0.75)
    examples = [{"pixel_values": torch.randn(3, 96, 96), "mask": generator()} for _ in range(3)]
    batch = {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "bool_masked_pos": torch.stack([example["mask"] for example in examples]),
    }
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.mask.sum(dim=1).tolist() == [27, 27, 27]
    with pytest.raises(Exception, match="encoder_stride"):
        copy.deepcopy(config).update({"encoder_stride": 7})


def test_calls_of_run_image_classification(tmp_path):
    GreenMIMForPreTraining(tiny_config()).save_pretrained(tmp_path)
    build_image_processor(tiny_config()).save_pretrained(tmp_path)
    label2id = {"cat": "0", "dog": "1", "owl": "2"}  # the script's numbers are strings
    id2label = {number: name for name, number in label2id.items()}
    config = AutoConfig.from_pretrained(
        tmp_path, num_labels=3, label2id=label2id, id2label=id2label, finetuning_task="image-classification"
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert "shortest_edge" in processor.size or (processor.size["height"], processor.size["width"]) == (96, 96)
    assert len(processor.image_mean) == len(processor.image_std) == 3
    examples = [{"pixel_values": torch.randn(3, 96, 96), "labels": label} for label in (0, 2, 1)]
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to="none", remove_unused_columns=False)

    def collate(batch):
        pixel_values = torch.stack([example["pixel_values"] for example in batch])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["labels"] for example in batch])}

    trainer = Trainer(
        model,
        args,
        data_collator=collate,
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())},
        processing_class=processor,
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    trainer.save_model()
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "cat", 1: "dog", 2: "owl"}
