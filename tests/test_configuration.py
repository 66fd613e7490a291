"""GreenMIMConfig: defaults, derived values, saving, and refusal of values that contradict one another."""

import json
import math
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from configuration_greenmim import GreenMIMConfig
from modeling_greenmim import GreenMIMConfig as PackagedConfig
from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.configuration_greenmim import count_visible_units
from tests.oracle import tiny_config


def test_defaults_are_swin_base():
    config = GreenMIMConfig()
    assert (config.image_size, config.patch_size, config.num_channels, config.window_size) == (224, 4, 3, 7)
    assert (config.embed_dim, config.depths, config.num_heads) == (128, [2, 2, 18, 2], [4, 8, 16, 32])
    assert (config.mlp_ratio, config.qkv_bias, config.hidden_act, config.layer_norm_eps) == (4.0, True, "gelu", 1e-6)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.drop_path_rate) == (0, 0, 0)
    assert (config.mask_ratio, config.norm_pix_loss, config.initializer_range) == (0.75, True, 0.02)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 1)
    assert (config.decoder_num_attention_heads, config.decoder_intermediate_size) == (16, 2048)
    assert config.model_type == "greenmim"
    assert GreenMIMConfig is PackagedConfig


def test_derived_values():
    config = GreenMIMConfig()
    assert config.encoder_stride == 32
    assert config.hidden_size == 1024
    assert config.num_hidden_layers == 4
    assert config.num_attention_heads == [4, 8, 16, 32]
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.image_height_and_width == (224, 224)
    assert config.unit_grid == (7, 7)


def test_derived_values_of_another_shape():
    config = tiny_config(image_size=(96, 160), patch_size=2, depths=[1, 3, 1], num_heads=[2, 2, 2], embed_dim=12)
    assert config.encoder_stride == 8
    assert config.hidden_size == 48
    assert config.num_hidden_layers == 3
    assert config.unit_grid == (12, 20)
    assert config.image_height_and_width == (96, 160)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "stage_names", "unit_grid"])
def test_derived_values_cannot_be_set(name):
    with pytest.raises(ValueError, match=f"`{name}` is 5, but the other values give"):
        setattr(tiny_config(), name, 5)


@pytest.mark.parametrize(
    ("image_size", "window", "expected"),
    [(224, 7, (7, 7, 7, 7)), (224, 14, (14, 14, 14, 7)), ((96, 224), 9, (9, 9, 6, 3)), (64, 5, (5, 5, 4, 2))],
)
def test_windows_shrink_to_the_smaller_side(image_size, window, expected):
    assert GreenMIMConfig(image_size=image_size, window_size=window).stage_windows == expected


@pytest.mark.parametrize(
    ("num_units", "ratio", "expected"),
    [(49, 0.75, 12), (49, 0.6, 19), (100, 0.9, 10), (10, 0.7, 3), (36, 0.75, 9), (49, 0.0, 49), (49, 1.0, 0)],
)
def test_count_of_visible_units_absorbs_rounding(num_units, ratio, expected):
    assert count_visible_units(num_units, ratio) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": (96, 160), "mask_ratio": 0.6, "norm_pix_loss": False},
        {"out_features": ["stem", "stage2"], "drop_path_rate": 0.1, "id2label": {0: "crack", 1: "whole", 2: "dark"}},
    ],
)
def test_saving_and_loading_gives_an_equal_configuration(tmp_path, changes):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    loaded = GreenMIMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path) == loaded
    loaded.transformers_version = None  # only files have it
    assert loaded == config


def test_saved_file_holds_only_what_was_given(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["depths"] == [2, 2, 2]
    assert saved["model_type"] == "greenmim"
    assert not {"encoder_stride", "hidden_size", "num_hidden_layers", "unit_grid"} & saved.keys()


CONTRADICTIONS = [
    ({"backbone_type": "resnet"}, "`backbone_type` is 'resnet'"),
    ({"depths": []}, "`depths` is []"),
    ({"depths": [2, 2]}, "`num_heads` is [1, 2, 4]"),
    ({"depths": [2, 0, 2]}, "`depths` is [2, 0, 2]"),
    ({"num_heads": [1, 0, 4]}, "`num_heads` is [1, 0, 4]"),
    ({"num_heads": [1, 3, 4]}, "`num_heads` is [1, 3, 4], but 3 does not divide stage width 16"),
    ({"patch_size": 0}, "`patch_size` is 0"),
    ({"num_channels": 0}, "`num_channels` is 0"),
    ({"embed_dim": -8}, "`embed_dim` is -8"),
    ({"window_size": 0}, "`window_size` is 0"),
    ({"mlp_ratio": 0.0}, "`mlp_ratio` is 0.0"),
    ({"hidden_dropout_prob": 1.0}, "`hidden_dropout_prob` is 1.0"),
    ({"attention_probs_dropout_prob": -0.1}, "`attention_probs_dropout_prob` is -0.1"),
    ({"drop_path_rate": 1}, "`drop_path_rate` is 1"),
    ({"image_size": 100}, "`image_size` is 100"),
    ({"image_size": 0}, "`image_size` is 0"),
    ({"image_size": (96, 100)}, "`image_size` is [96, 100]"),
    ({"image_size": [96, 96, 96]}, "`image_size` is [96, 96, 96]"),
    ({"image_size": []}, "`image_size` is []"),
    ({"mask_ratio": 1.5}, "`mask_ratio` is 1.5"),
    ({"mask_ratio": -0.5}, "`mask_ratio` is -0.5"),
    ({"mask_ratio": 1.0}, "`mask_ratio` is 1.0, but of 36 units it leaves 0 visible"),
    ({"mask_ratio": 0.0}, "`mask_ratio` is 0.0, but of 36 units it leaves 36 visible"),
    ({"mask_ratio": 0.99}, "`mask_ratio` is 0.99, but of 36 units it leaves 0 visible"),
    ({"decoder_hidden_size": 18}, "`decoder_hidden_size` is 18"),
    ({"decoder_hidden_size": 0}, "`decoder_hidden_size` is 0"),
    ({"decoder_num_attention_heads": 3}, "`decoder_num_attention_heads` is 3"),
    ({"decoder_num_attention_heads": 0}, "`decoder_num_attention_heads` is 0"),
    ({"decoder_num_hidden_layers": 0}, "`decoder_num_hidden_layers` is 0"),
    ({"decoder_intermediate_size": 0}, "`decoder_intermediate_size` is 0"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=lambda value: str(value))
def test_contradictions_are_refused_naming_argument_and_value(changes, message):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"patch_size": "4"}, "patch_size"),
        ({"window_size": 3.5}, "window_size"),
        ({"depths": (2.5, 1, 1)}, "depths"),
        ({"norm_pix_loss": "yes"}, "norm_pix_loss"),
        ({"image_size": (96, 96, 96)}, "image_size"),
    ],
)
def test_wrong_types_are_refused_naming_the_field(changes, name):
    with pytest.raises(StrictDataclassError, match=f"'{name}'"):
        tiny_config(**changes)


def test_contradictions_made_later_are_refused_at_saving(tmp_path):
    config = tiny_config()
    config.depths = [2]
    with pytest.raises(StrictDataclassError, match="`num_heads`"):
        config.save_pretrained(tmp_path)


def test_image_of_one_unit_has_nothing_to_mask_but_is_accepted():
    assert tiny_config(image_size=16).unit_grid == (1, 1)


def test_update_of_run_mim():
    """Transformers' run_mim.py writes what it read, or what its arguments say."""
    config = tiny_config()
    config.update(
        {"image_size": config.image_size, "patch_size": config.patch_size, "encoder_stride": config.encoder_stride}
    )
    assert config == tiny_config()
    config.update({"image_size": 192, "patch_size": 8, "encoder_stride": 32})
    assert (config.image_size, config.encoder_stride, config.unit_grid) == (192, 32, (6, 6))
    config.validate()


def test_encoder_stride_that_contradicts_is_refused():
    config = tiny_config()
    with pytest.raises(ValueError, match="`encoder_stride` is 32, but the other values give 16"):
        config.update({"image_size": 96, "patch_size": 4, "encoder_stride": 32})
    with pytest.raises(ValueError, match="`encoder_stride` is 8, but the other values give 16"):
        tiny_config(encoder_stride=8)
    assert tiny_config(encoder_stride=16) == tiny_config()


def test_out_features_and_out_indices():
    assert (tiny_config().out_features, tiny_config().out_indices) == (["stage3"], [3])
    config = tiny_config(out_indices=[0, 2])
    assert (config.out_features, config.out_indices) == (["stem", "stage2"], [0, 2])
    config = tiny_config(out_features=["stage1", "stage3"])
    assert (config.out_features, config.out_indices) == (["stage1", "stage3"], [1, 3])
    config.out_features = ["stage2"]
    assert config.out_indices == [2]
    with pytest.raises(ValueError, match="stage9"):
        tiny_config(out_features=["stage9"])
    with pytest.raises(ValueError, match="out_indices"):
        tiny_config(out_indices=[7])


# Derived values as keywords, numbers without sense, and what hostile values come to


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 32), ("num_hidden_layers", 3), ("stage_widths", [8, 16, 32]), ("unit_grid", (6, 6))],
)
def test_derived_values_as_keywords_must_agree(name, value, tmp_path):
    assert tiny_config(**{name: value}) == tiny_config()
    values = tiny_config().to_dict() | {name: value}
    assert GreenMIMConfig.from_dict(values).to_dict() == tiny_config().to_dict()
    wrong = [*value, 1] if isinstance(value, (list, tuple)) else value + 1
    with pytest.raises(ValueError, match=rf"`{name}` is .*, but the other values give"):
        tiny_config(**{name: wrong})
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` is"):
        GreenMIMConfig.from_pretrained(tmp_path, **{name: wrong})
    assert GreenMIMConfig.from_pretrained(tmp_path, **{name: value}).hidden_size == 32


def test_contradictions_come_before_what_follows_from_them():
    with pytest.raises(StrictDataclassError, match="`num_heads`"):
        tiny_config(num_heads=[1, 3, 4], hidden_size=7)


NUMBERS = ("mlp_ratio", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range")
NUMBERS += ("layer_norm_eps", "mask_ratio")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(StrictDataclassError, match=f"`{name}` is {value}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializer_range": 0}, "`initializer_range` is 0, but it must be positive"),
        ({"initializer_range": 1e30}, "`initializer_range` is 1e+30, but it must be positive"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps` is 0.0, but it must be positive"),
        ({"layer_norm_eps": 1e-60}, "`layer_norm_eps` is 1e-60, but it must be positive"),
        ({"mlp_ratio": 0.1}, "`mlp_ratio` is 0.1, but it leaves the first stage, of width 8, no hidden value"),
        ({"reconstruction_target": "edges"}, "`reconstruction_target` is 'edges', but it must be one of \"pixels\""),
    ],
)
def test_numbers_without_sense_are_refused(changes, message):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**changes)
    assert message in str(error.value)


def test_units_of_a_single_value_cannot_be_normalised():
    values = {"patch_size": 1, "depths": [1], "num_heads": [1], "num_channels": 1, "image_size": 4}
    with pytest.raises(ValueError, match="`norm_pix_loss` is True, but a mask unit of one pixel and one channel"):
        GreenMIMForPreTraining(tiny_config(**values))
    model = GreenMIMForPreTraining(tiny_config(**values, norm_pix_loss=False))
    assert model(torch.rand(2, 1, 4, 4)).loss.isfinite()


INTEGERS = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 16]
REALS = [-1.0, 0, 0.0, 1e-300, 1e-12, 1e-6, 0.02, 0.25, 0.5, 0.75, 0.99, 1, 1.0, 4.0, math.inf, math.nan]
LISTS = [[], [0], [1], [2], [1, 1], [1, 2], (2, 1), [2, 2, 2], [1, -1], [1.5], "ab", None, 3]
# Values of each argument, sensible ones and others; what is not listed keeps to a tiny model.
HOSTILE = {
    "image_size": [*INTEGERS, 32, 48, 33, (32, 16), [16, 48], [16], (8, 8, 8), [], "32", None, -16, 16.0],
    **{key: [*INTEGERS, 2.0, "2", None, True] for key in ("patch_size", "num_channels", "embed_dim", "window_size")},
    **dict.fromkeys(("depths", "num_heads"), LISTS),
    **{key: [*REALS, 1e30, "0.5", None] for key in NUMBERS},
    "mlp_ratio": [*REALS, "2", None],  # no 1e30: how much memory there is no configuration knows
    "backbone_type": ["swin", "twins", "vit", "", None, 1],
    "reconstruction_target": ["pixels", "hog", "edges", None],
    "hidden_act": ["gelu", "relu", "silu", "tanh", "nothing", None],
    **{key: [True, False, "yes", None, 1] for key in ("norm_pix_loss", "qkv_bias")},
    **{key: [*INTEGERS, 12, 2.5, None] for key in ("decoder_hidden_size", "decoder_intermediate_size")},
    **{key: [*INTEGERS[:6], "1"] for key in ("decoder_num_hidden_layers", "decoder_num_attention_heads")},
    "hidden_size": [*INTEGERS, None],
    "num_hidden_layers": [*INTEGERS, None],
    "out_features": [["stem"], ["stage1"], ["stage9"], [], "stem"],
    "num_labels": [0, 1, 3],
}


def check_hostile_values(generator: random.Random, build: bool) -> bool:
    """Either a clear error that names one of the arguments, or, if asked for, finite outputs; whether it was valid."""
    values = {"image_size": 32, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2]}
    values |= {"window_size": 3, "decoder_hidden_size": 8, "decoder_num_attention_heads": 2}
    changed = generator.sample(sorted(HOSTILE), generator.randint(1, 3))
    values |= {name: generator.choice(HOSTILE[name]) for name in changed}
    try:
        config = GreenMIMConfig(**values)
        model = GreenMIMForPreTraining(config).eval() if build else None
    except (ValueError, TypeError, StrictDataclassError) as error:
        # The default of another one may be what contradicts.
        named = [name for name in (*values, "mask_ratio") if f"`{name}`" in str(error) or f"'{name}'" in str(error)]
        assert named or "out_features" in str(error), f"{values}: {error!r}"
        return False
    if build:
        pixel_values = torch.randn(2, config.num_channels, *config.image_height_and_width)
        try:
            loss = model(pixel_values).loss
        except ValueError as error:  # an image of a single unit can only be classified
            assert config.unit_grid == (1, 1) and "`mask_ratio`" in str(error), f"{values}: {error!r}"
            loss = model.greenmim(pixel_values).pooler_output
        assert loss.isfinite().all(), values
    return True


def test_hostile_values_are_refused_by_name_or_give_finite_outputs():
    torch.manual_seed(0)
    generator = random.Random(0)
    with torch.no_grad():
        valid = sum(check_hostile_values(generator, build=True) for _ in range(150))
    assert valid > 20


@pytest.mark.slow
def test_ten_thousand_hostile_configurations():
    torch.manual_seed(0)
    generator = random.Random(1)
    with torch.no_grad():
        valid = sum(check_hostile_values(generator, build=number % 8 == 0) for number in range(10_000))
    assert valid > 1500
