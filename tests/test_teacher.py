"""Features of a teacher as a target: maps of any vision model, losses from formulas, cached views, whole runs."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

import run_mim
from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining, plan_mask
from modeling_greenmim.conversion.checkpoint import CheckpointError
from modeling_greenmim.conversion.exporting import export_model
from tests.oracle import DenseEncoder, assert_close, layer_norm, random_images, random_masks, randomize
from tests.oracle import tiny_config as wide_config
from tests.training_helpers import (
    OVERRIDES,
    assert_same_weights,
    flags,
    kill_after_checkpoint,
    noise_image,
    run,
    run_in_processes,
    start,
    state_of,
    tiny_config,
    weights,
    write_images,
    write_pretrained,
)
from training_greenmim.data.image_dataset import ImageDataset
from training_greenmim.data.readers import load_folder
from training_greenmim.data.scaling import scaling_of
from training_greenmim.data.transforms import TrainTransform
from training_greenmim.pretraining import trainer as pretraining
from training_greenmim.pretraining.masks import gumbel_noise, saliency, salient_units
from training_greenmim.pretraining.teacher import Teacher, TeacherFacts, TeacherTargets, load_teacher
from training_greenmim.pretraining.teacher_cache import FixedViews


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SMALL, "num_hidden_layers": 6, "image_size": 32, "patch_size": 8}
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
# For each kind of teacher its model, and rows and columns of the map of an image of 32x32 px.
TEACHERS = {
    "vit": (lambda: ViTModel(ViTConfig(**VIT)), 4),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**VIT)), 4),
    "registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, num_register_tokens=4)), 4),
    "clip": (lambda: CLIPModel(CLIPConfig(vision_config=VIT, text_config={**SMALL, "num_hidden_layers": 1})), 4),
    "siglip": (lambda: SiglipModel(SiglipConfig(vision_config=VIT, text_config={**SMALL, "num_hidden_layers": 1})), 4),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=4)), 4),
    "mae": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**VIT)), 4),
    "swin": (
        lambda: SwinModel(
            SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ),
        4,
    ),
    "convnext": (lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), 4),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        4,
    ),
}


def write_teacher(folder, kind: str = "vit"):
    torch.manual_seed(0)
    TEACHERS[kind][0]().save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def bytes_of(batch: int, height: int = 32, width: int = 32, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


# Feature maps


@pytest.mark.parametrize("kind", TEACHERS)
def test_any_vision_model_has_a_map(kind, tmp_path):
    teacher = load_teacher(str(write_teacher(tmp_path, kind)), 3, (32, 32), image_size=32)
    side = TEACHERS[kind][1]
    assert teacher.grid == (side, side) and teacher.width == 16
    features = teacher.features(bytes_of(2))
    assert features.shape == (2, side, side, 16) and not features.requires_grad
    assert (features[0] - features[1]).abs().max() > 0 and features.isfinite().all()
    assert not any(module.training for module in teacher.model.modules())


def test_a_masked_autoencoder_sees_the_whole_image(tmp_path):
    """As the encoder of another library's model without a mask: MAE's own, told to hide nothing and in which order."""
    folder = write_teacher(tmp_path, "mae")
    teacher, images = load_teacher(str(folder), 3, (32, 32)), bytes_of(2)
    model = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
    with torch.no_grad():
        order = torch.arange(16).expand(2, -1) / 16
        states = model((images / 255 - 0.4) / 0.2, noise=order, output_hidden_states=True).hidden_states[-5:]
    expected = torch.stack([torch.nn.functional.layer_norm(state[:, 1:], (16,)) for state in states]).mean(dim=0)
    torch.testing.assert_close(teacher.features(images).flatten(1, 2), expected, atol=1e-5, rtol=0)


def test_a_teacher_that_hides_at_random_is_refused(tmp_path):
    facts = TeacherFacts("masked", None, None)
    with pytest.raises(ValueError, match="`teacher` is 'masked', which gives other features of the same image"):
        Teacher(ViTMAEModel(ViTMAEConfig(**VIT)), scaling_of(PROCESSOR, 3), (32, 32), facts)


def test_features_of_blocks_are_their_mean_normalised_per_token(tmp_path):
    folder = write_teacher(tmp_path, "registers")
    teacher, images = load_teacher(str(folder), 3, (32, 32)), bytes_of(2)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model((images / 255 - 0.4) / 0.2, output_hidden_states=True).hidden_states[-5:]
    expected = torch.zeros(2, 16, 16)
    for state in states:
        tokens = state[:, 5:]  # a class token and four registers come first
        centred = tokens - tokens.mean(dim=2, keepdim=True)
        expected += centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt() / 5
    torch.testing.assert_close(teacher.features(images).flatten(1, 2), expected, atol=1e-5, rtol=0)


def test_features_of_a_convolutional_teacher_are_its_last_map(tmp_path):
    folder = write_teacher(tmp_path, "resnet")
    teacher, images = load_teacher(str(folder), 3, (32, 32)), bytes_of(2)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()((images / 255 - 0.4) / 0.2).last_hidden_state
    torch.testing.assert_close(teacher.features(images).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=0)


def test_our_own_checkpoints_are_teachers(tmp_path):
    teacher = load_teacher(str(write_pretrained(tmp_path)), 3, (32, 32))
    assert (teacher.grid, teacher.width) == ((4, 4), 16)


def test_grey_images_are_shown_to_a_teacher_of_rgb(tmp_path):
    folder, grey = str(write_teacher(tmp_path)), bytes_of(2, channels=1)
    expected = load_teacher(folder, 3, (32, 32)).features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(load_teacher(folder, 1, (32, 32)).features(grey), expected)


def test_images_of_another_size_and_aspect(tmp_path):
    """Positions of ViT are interpolated; the size keeps the student's aspect in whole patches."""
    teacher = load_teacher(str(write_teacher(tmp_path)), 3, (32, 48), image_size=64)
    assert teacher.size == (64, 96) and teacher.grid == (8, 12)
    assert teacher.features(bytes_of(1, 32, 48)).shape == (1, 8, 12, 16)


def test_what_is_no_teacher_is_refused(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL, num_hidden_layers=1, vocab_size=20)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"`teacher` is '.*bert', which cannot be loaded as a vision model"):
        load_teacher(str(tmp_path / "bert"), 3, (32, 32))
    PROCESSOR.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"`teacher` is '.*bert', a BertModel, which takes input_ids"):
        load_teacher(str(tmp_path / "bert"), 3, (32, 32))
    with pytest.raises(ValueError, match=r"`teacher` is '.*nowhere', which cannot be loaded"):
        load_teacher(str(tmp_path / "nowhere"), 3, (32, 32))
    vit = str(write_teacher(tmp_path / "vit"))
    with pytest.raises(ValueError, match=r"`teacher` is '.*vit', for images of 3 channel\(s\), but .* have 4"):
        load_teacher(vit, 4, (32, 32))
    with pytest.raises(ValueError, match=r"`teacher_image_size` is 4x4, which `teacher` '.*vit' cannot take"):
        load_teacher(vit, 3, (32, 32), image_size=4)


# Targets


def test_maps_are_resampled_to_the_units_and_centred_or_normalised():
    features = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    mean = features.mean(dim=(0, 1, 2))
    units = TeacherTargets((2, 2), mean)(features) + mean
    # Far from the edges an antialiased reduction is a weighted mean: a constant stays, and the order is raster.
    ramp = torch.arange(4.0)[:, None, None].expand(4, 4, 6)[None]
    top, _, bottom, _ = TeacherTargets((2, 2), torch.zeros(6))(ramp)[0, :, 0].tolist()
    assert units.shape == (2, 4, 6) and 0 < top < 1.5 < bottom < 3 and top + bottom == pytest.approx(3)
    assert torch.equal(TeacherTargets((4, 4), mean)(features), features.flatten(1, 2) - mean)
    normalised = TeacherTargets((4, 4), None)(features)
    torch.testing.assert_close(normalised.mean(dim=2), torch.zeros(2, 16), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalised.var(dim=2, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)


def plain_error(kind: str, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Errors of the last dimension, from their formulas."""
    if kind == "cosine":
        norms = predictions.square().sum(-1).sqrt() * targets.square().sum(-1).sqrt()
        return 1 - (predictions * targets).sum(-1) / norms
    size = (predictions - targets).abs()
    return (
        torch.where(size < 1, size.square() / 2, size - 0.5).mean(-1)
        if kind == "smooth_l1"
        else size.square().mean(-1)
    )


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("masks", ["none", "shared", "per sample"])
def test_alignment_equals_the_dense_network(kind, masks):
    """A linear decoder on visible units: the dense oracle's tokens, averaged over units, and the loss in formulas."""
    changes = {"target_width": 6, "target_loss": kind, "decoder_type": "linear", "pooled_loss_weight": 0.5}
    config = wide_config(reconstruction_target="features", mask_ratio=0.0, **changes)
    model = randomize(GreenMIMForPreTraining(config))
    images, targets = random_images(2, 96, 96), 2 * random_images(2, 36, 2, seed=5).reshape(2, 36, 6)
    mask = None if masks == "none" else random_masks(1 if masks == "shared" else 2, 36, 9)
    visible = None if mask is None else ~mask.view(-1, 6, 6)
    encoder = DenseEncoder(model.greenmim, images, visible)
    seen = torch.ones(2, 36, dtype=torch.bool) if mask is None else ~mask.expand(2, -1)
    expected = expected_alignment(model, encoder, seen)
    outputs = model(images, bool_masked_pos=mask, targets=targets)
    assert_close(outputs.logits, expected, 1e-9)
    local = plain_error(kind, expected, targets[seen].view(2, -1, 6)).mean()
    pooled = plain_error(kind, expected.mean(1), targets.mean(1)).mean()
    assert_close(outputs.loss, local + 0.5 * pooled, 1e-9)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def expected_alignment(model, encoder, seen: torch.Tensor) -> torch.Tensor:
    """Predictions of seen units from maps of the dense network, units cut from the maps by rows and columns."""
    decoder, eps = model.decoder, model.config.layer_norm_eps
    maps = encoder.outputs[-1 - len(decoder.stage_preds) :]
    norms = [*decoder.stage_norms, model.greenmim.layernorm]
    preds = [*decoder.stage_preds, decoder.decoder_pred]
    total = 0
    for states, norm, pred in zip(maps, norms, preds):
        side = states.shape[1] // 6
        units = states.unflatten(2, (6, side)).unflatten(1, (6, side)).mean(dim=(2, 4)).flatten(1, 2)
        units = units[seen].view(len(states), -1, units.shape[2])
        total = total + torch.nn.functional.linear(layer_norm(units, norm, eps), pred.weight, pred.bias)
    return total


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_prediction_counts_the_units_that_it_is_told(loss_on):
    config = wide_config(reconstruction_target="features", target_width=6, target_loss="smooth_l1", loss_on=loss_on)
    model = randomize(GreenMIMForPreTraining(config))
    mask, targets = random_masks(1, 36, 9), random_images(2, 36, 2, seed=5).reshape(2, 36, 6)
    outputs = model(random_images(2, 96, 96), bool_masked_pos=mask, targets=targets)
    errors = plain_error("smooth_l1", outputs.logits, targets)
    assert outputs.logits.shape == (2, 36, 6)
    assert_close(outputs.loss, errors[mask.expand(2, -1)].mean() if loss_on == "masked" else errors.mean(), 1e-12)


def test_the_prompting_decoder_leaves_visible_units_as_they_are():
    """Their predictions are the norm and the linear layer of what the encoder and positions made of them."""
    torch.manual_seed(0)
    model = randomize(GreenMIMForPreTraining(wide_config(decoder_type="prompting", decoder_num_hidden_layers=2)))
    plain = GreenMIMForPreTraining(wide_config(decoder_num_hidden_layers=2)).double()
    plain.load_state_dict(model.state_dict())
    mask, images = random_masks(1, 36, 9), random_images(2, 96, 96)
    prompted, usual = (each(images, bool_masked_pos=mask).logits for each in (model, plain))
    for decoder in (model.decoder, plain.decoder):
        decoder.decoder_layers = torch.nn.ModuleList()
    untouched = plain(images, bool_masked_pos=mask).logits
    visible = ~mask[0]
    assert_close(prompted[:, visible], untouched[:, visible], 1e-12)
    assert (prompted[:, mask[0]] - untouched[:, mask[0]]).abs().max() > 0.01
    assert (prompted - usual)[:, mask[0]].abs().max() > 1e-6, "what is attended to differs from the second block on"


def test_features_must_be_given_and_visible_units_predicted_of_features_only():
    model = GreenMIMForPreTraining(wide_config(reconstruction_target="features", target_width=6))
    with pytest.raises(ValueError, match="`targets` is None, but `reconstruction_target` is 'features'"):
        model(random_images(1, 96, 96, dtype=torch.float32))
    for changes, message in (
        ({"reconstruction_target": "features"}, "`target_width` is None, but features need their width"),
        ({"target_width": 6}, "`target_width` is 6, but other targets than features have their own width"),
        ({"decoder_type": "linear"}, "`reconstruction_target` must be 'features'"),
        ({"target_loss": "l7"}, '`target_loss` is \'l7\', but it must be one of "mse", "smooth_l1", "cosine"'),
        ({"loss_on": "some"}, '`loss_on` is \'some\', but it must be one of "masked", "all"'),
        ({"pooled_loss_weight": -1}, "`pooled_loss_weight` is -1"),
        ({"mask_ratio": 0.0}, "`mask_ratio` is 0.0"),
    ):
        with pytest.raises(Exception, match=message):
            wide_config(**changes)


@pytest.mark.parametrize("decoder_type", ["transformer", "prompting", "linear"])
def test_models_of_features_are_saved_loaded_and_compiled(decoder_type, tmp_path):
    config = tiny_config(reconstruction_target="features", target_width=6, decoder_type=decoder_type)
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(config).eval()
    images, targets = random_images(2, 32, 32, dtype=torch.float32), torch.randn(2, 16, 6)
    plan = plan_mask(config, torch.tensor([[1, 4, 9, 11]]), static=True)
    expected = model(images, plan=plan, targets=targets).loss
    model.save_pretrained(tmp_path)
    loaded = GreenMIMForPreTraining.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images, plan=plan, targets=targets).loss, expected)
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, plan=plan, targets=targets).loss, expected)
    classifier, report = GreenMIMForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"], "the decoder of any type is left aside"
    assert classifier(images).logits.shape == (2, 2)


def test_the_original_layout_is_for_pixels_only(tmp_path):
    write_pretrained(tmp_path / "model", reconstruction_target="features", target_width=6, decoder_type="linear")
    with pytest.raises(CheckpointError, match="the model predicts features by a linear decoder"):
        export_model(str(tmp_path / "model"), "original", str(tmp_path / "file.pth"))
    export_model(str(tmp_path / "model"), "timm", str(tmp_path / "file.safetensors"))


# Attentive masks


def test_units_are_drawn_in_proportion_to_their_scores():
    """Of 4 units with scores 1, 2, 3 and 4 the first one drawn is unit i with chance (i + 1) / 10."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([gumbel_noise(4, generator) for _ in range(20000)])
    drawn = salient_units(scores, 1, noise).flatten().bincount() / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012, rtol=0)
    several = salient_units(scores[:50], 3, noise[:50])
    assert (several.diff(dim=1) > 0).all() and several.shape == (50, 3)


def test_what_differs_from_the_rest_of_the_image_is_salient():
    features = torch.zeros(1, 4, 4, 6)
    features[0, 2, 1] = 5
    scores = saliency(features, (4, 4))
    assert scores.argmax() == 9 and (scores >= 0).all()


# Cached views


def test_views_are_the_whole_its_mirror_image_and_crops_of_the_seed():
    image = noise_image(0, 32, 32)
    views = FixedViews((32, 32), 3, 2, (0.2, 0.6), seed=3)
    whole, mirrored, crop, mirrored_crop = (views(image, 7, view) for view in range(4))
    assert len(views) == 6
    assert torch.equal(whole, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(mirrored, whole.flip(2)) and torch.equal(mirrored_crop, crop.flip(2))
    assert not torch.equal(crop, whole) and not torch.equal(crop, views(image, 7, 4))
    assert not torch.equal(crop, views(image, 8, 2)), "each image has crops of its own"
    assert torch.equal(crop, FixedViews((32, 32), 3, 9, (0.2, 0.6), seed=3)(image, 7, 2))
    small = views.of_size((16, 16))(image, 7, 2)
    reduced = torch.from_numpy(np.array(Image.fromarray(crop.permute(1, 2, 0).numpy()).resize((16, 16))))
    assert (small.permute(1, 2, 0).float() - reduced).abs().mean() < 25, "the same part of the image"


# Runs


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "data", 24)
    write_teacher(tmp_path / "teacher")
    return tmp_path


def teaching(folder, *more) -> tuple:
    options = ("--train_dir", folder / "data", "--target", "teacher", "--teacher", folder / "teacher")
    return (*options, "--do_train", "--max_steps", 6, "--dataloader_num_workers", 0, *more)


@pytest.mark.parametrize(
    "more",
    [
        ("--mask_ratio", 0),
        ("--mask_ratio", 0.75, "--teacher_loss", "smooth_l1", "--mask_strategy", "attentive"),
        ("--teacher_mode", "predict", "--loss_on", "all", "--recipe", "teacher-predict"),
        ("--teacher_mode", "predict", "--config_overrides", f"{OVERRIDES},decoder_type=prompting"),
        ("--cache_teacher", "cache", "--teacher_crops", 1, "--mask_strategy", "attentive", "--mask_per_sample"),
    ],
)
def test_runs_with_a_teacher(data, more, monkeypatch):
    monkeypatch.chdir(data)
    output = run(data / "out", *teaching(data, "--do_eval", "--logging_steps", 2, "--base_learning_rate", 1.5, *more))
    losses = [entry["loss"] for entry in state_of(output)["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] and all(np.isfinite(losses))
    shares = [entry["teacher_share"] for entry in state_of(output)["log_history"] if "teacher_share" in entry]
    is_cached = "--cache_teacher" in more
    assert shares and all((share == 0) == is_cached and share < 1 for share in shares)
    card = (output / "README.md").read_text()
    assert "teacher" in ModelCard.load(output / "README.md").content and "licence: unknown" in card
    assert not any("query" in name or "teacher" in name for name in weights(output)), "only the student is saved"
    AutoModel.from_pretrained(output)


def test_cached_features_are_the_teachers_own(data):
    """Whole images in the cache: the same loss at the same weights as features made on the fly from the same views."""
    run(data / "out", *teaching(data, "--cache_teacher", data / "cache"))
    (place,) = (data / "cache").iterdir()
    features = np.load(place / "features.npy")
    assert features.shape == (24, 2, 4, 4, 16) and features.dtype == np.float16
    teacher, views = load_teacher(str(data / "teacher"), 3, (32, 32)), FixedViews((32, 32), 3, 0, (0.2, 1), 42)
    names = sorted((data / "data").iterdir())
    for index, view in ((0, 0), (5, 1), (23, 0)):
        expected = teacher.features(views(Image.open(names[index]), index, view)[None])[0].numpy()
        np.testing.assert_allclose(features[index, view], expected, atol=2e-3)
    before = (place / "features.npy").stat().st_mtime_ns
    progress = json.loads((place / "progress.json").read_text())
    assert progress["images"] == progress["of"] == 24
    run(data / "again", *teaching(data, "--cache_teacher", data / "cache"))
    assert (place / "features.npy").stat().st_mtime_ns == before, "the teacher did not run again"
    assert_same_weights(data / "again", data / "out")


def test_a_teacher_of_the_same_name_with_other_weights_has_another_cache(data):
    run(data / "out", *teaching(data, "--cache_teacher", data / "cache"))
    torch.manual_seed(1)
    TEACHERS["vit"][0]().save_pretrained(data / "teacher")
    run(data / "again", *teaching(data, "--cache_teacher", data / "cache"))
    first, second = (np.load(place / "features.npy") for place in (data / "cache").iterdir())
    assert np.abs(first.astype(np.float32) - second).max() > 0.1


def test_the_mean_is_that_of_images_from_all_over_the_data_set(data, monkeypatch):
    """Every third one of 24, where 8 are to be taken."""
    monkeypatch.setattr(pretraining, "MEAN_OF", 8)
    run(data / "out", *teaching(data))
    mean = json.loads((data / "out" / "teacher_mean.json").read_text())
    teacher, total = load_teacher(str(data / "teacher"), 3, (32, 32)), torch.zeros(16)
    dataset = ImageDataset(load_folder(str(data / "data"), "train_dir"), "image", TrainTransform((32, 32), 3), 42)
    for index in range(0, 24, 3):
        total += teacher.features(dataset[index]["pixel_values"][None]).mean(dim=(0, 1, 2)) / 8
    torch.testing.assert_close(torch.tensor(mean), total, atol=1e-5, rtol=0)


def test_an_interrupted_cache_goes_on_where_it_was(data):
    run(data / "out", *teaching(data, "--cache_teacher", data / "cache"))
    (place,) = (data / "cache").iterdir()
    whole = np.load(place / "features.npy").copy()
    np.lib.format.open_memmap(place / "features.npy", "r+")[10:] = 0
    facts = json.loads((place / "progress.json").read_text())
    (place / "progress.json").write_text(json.dumps({**facts, "images": 10}))
    run(data / "again", *teaching(data, "--cache_teacher", data / "cache"))
    np.testing.assert_array_equal(np.load(place / "features.npy"), whole)


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(data, cached):
    more = ("--cache_teacher", data / "cache") if cached else ()
    saving = ("--save_strategy", "steps", "--save_steps", 3, "--mask_strategy", "attentive")
    run(data / "whole", *teaching(data, *saving, *more))
    run(data / "parts", *teaching(data, *saving, *more))
    (data / "parts" / "checkpoint-6").rename(data / "last")
    run(data / "parts", *teaching(data, *saving, *more, "--resume_from_checkpoint", data / "parts" / "checkpoint-3"))
    assert_same_weights(data / "parts", data / "whole")


def test_evaluation_of_a_checkpoint_gives_the_runs_loss(data):
    saving = ("--save_strategy", "steps", "--save_steps", 6)
    output = run(data / "out", *teaching(data, "--do_eval", *saving))
    expected = json.loads((output / "all_results.json").read_text())["eval_loss"]
    evaluating = [flag for flag in teaching(data, "--do_eval") if flag != "--do_train"]
    run(output, *evaluating, "--resume_from_checkpoint", output / "checkpoint-6")
    assert json.loads((output / "all_results.json").read_text())["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_going_on_from_weights_with_a_teacher(data):
    argv = flags(data / "out", *teaching(data, "--model_name_or_path", write_pretrained(data / "start")))
    place = argv.index("--config_overrides")
    run_mim.main(argv[:place] + argv[place + 2 :])
    config = GreenMIMForPreTraining.from_pretrained(data / "out").config
    assert (config.reconstruction_target, config.target_width, config.decoder_type) == ("features", 16, "linear")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", "teacher"), "`target` is 'teacher', but no `teacher` is given"),
        (("--teacher", "x"), "`teacher` is 'x', but `target` is 'pixels', not 'teacher'"),
        (("--target", "colours"), "`target` is 'colours'; it must be one of pixels, hog, teacher"),
        (("--target", "teacher", "--teacher", "x", "--loss_on", "all"), "`loss_on` is 'all', but with `teacher_mode`"),
        (("--target", "teacher", "--teacher", "x", "--teacher_crops", "2"), "`teacher_crops` is 2, but without"),
        (("--teacher_mode", "guess"), "`teacher_mode` is 'guess'; it must be one of align, predict"),
        (("--recipe", "nope"), "`recipe` is 'nope'; it must be one of teacher-align, teacher-predict, continue, auto"),
        (("--mask_strategy", "attentive"), "`mask_strategy` is 'attentive', but there is no `teacher`"),
        (
            ("--config_overrides", f"{OVERRIDES},reconstruction_target=features,target_width=5"),
            "so a `teacher` is needed",
        ),
    ],
)
def test_wrong_arguments_of_targets_are_named(tmp_path, more, message):
    write_images(tmp_path / "data", 8)
    argv = flags(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1, *more)
    with pytest.raises(ValueError, match=message):
        run_mim.main(argv)


def test_hog_is_a_target_of_the_script(data):
    output = run(data / "out", "--train_dir", data / "data", "--do_train", "--max_steps", 2, "--target", "hog")
    assert GreenMIMForPreTraining.from_pretrained(output).config.reconstruction_target == "hog"


@pytest.mark.slow
def test_two_processes_with_a_teacher_train_as_one(data):
    script = data / "script.py"
    script.write_text(
        "import sys, run_mim\nfrom training_greenmim.runs.processes import leave_processes\n"
        "run_mim.main(sys.argv[1:])\nleave_processes()\n"
    )
    # Plain distillation has no mask, which processes would draw for themselves.
    more = ("--mask_ratio", 0, "--adam_epsilon", 1e-3)
    run(data / "one", *teaching(data, *more, "--per_device_train_batch_size", 8))
    two = flags(data / "two", *teaching(data, *more, "--per_device_train_batch_size", 4, "--ddp_backend", "gloo"))
    run_in_processes(script, two, 2)
    expected, found = weights(data / "one"), weights(data / "two")
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp_min(1e-2), name


@pytest.mark.slow
def test_a_killed_run_with_a_teacher_goes_on_exactly(data):
    saving = ("--save_strategy", "steps", "--save_steps", 2)
    run(data / "whole", *teaching(data, *saving))
    kill_after_checkpoint(start(flags(data / "parts", *teaching(data, *saving))), data / "parts" / "checkpoint-2")
    run(data / "parts", *teaching(data, *saving, "--resume_from_checkpoint", "true"))
    assert_same_weights(data / "parts", data / "whole")
