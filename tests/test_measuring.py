"""The order of merging by losses of reconstruction: of a model that learned stripes, exported in either order."""

import argparse
import math
import re

import pytest
import torch
from PIL import Image

from modeling_greenmim import GreenMIMConfig, GreenMIMForPreTraining
from modeling_greenmim.conversion import CheckpointError, export_model, import_checkpoint, read_checkpoint
from modeling_greenmim.conversion.__main__ import main
from modeling_greenmim.conversion.importing import convert
from modeling_greenmim.conversion.measuring import MASKS, OrderLosses, measure_orders, read_photographs, square_views
from tests.golden import normalized
from tests.test_conversion import COLUMN, HEADS, ROW, TINY, official_shapes, random_weights, write_official


# Three lines of losses, those of the orders with two numbers each.
TABLE = r"order of merging +own place +scrambled\nrow +([\d.]+) +([\d.]+)\ncolumn +([\d.]+) +([\d.]+)"


def stripes(count: int, generator: torch.Generator, side: int = 32) -> torch.Tensor:
    """Waves of random direction and phase, `(count, 3, side, side)` bytes: what one unit shows tells the others."""
    angle, phase = (2 * math.pi * torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wave = torch.sin(2 * math.pi / 16 * (columns * angle.cos() + rows * angle.sin()) + phase)
    return (127.5 + 120 * wave).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the model, the photographs that it knows, and the file that it is exported to."""
    folder, generator = tmp_path_factory.mktemp("trained"), torch.Generator().manual_seed(0)
    config = GreenMIMConfig(
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        mask_ratio=0.5,
        decoder_hidden_size=64,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=300)
    for _ in range(300):
        noise = torch.rand(1, 16, generator=generator)
        model(normalized(stripes(32, generator)), noise=noise).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder / "model")
    export_model(str(folder / "model"), "original", str(folder / "column.pth"))
    (folder / "photographs").mkdir()
    for number, image in enumerate(stripes(8, generator)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "photographs" / f"{number}.png")
    return folder


def write_file(trained, path, order: str, name: str | None):
    """The trained model as an official file whose weights have an order, and whose name may tell another."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(trained / "column.pth", weights_only=True)
    if order == "row":
        for key, tensor in content["model"].items():
            if ".downsample." in key:
                first, below, beside, across = tensor.chunk(4, dim=-1)
                content["model"][key] = torch.cat([first, beside, below, across], dim=-1)
    content["args"].model = name
    torch.save(content, path)
    return path


def losses_in(text: str) -> dict[tuple[str, str], float]:
    keys = [(order, placement) for order in ("row", "column") for placement in ("own", "scrambled")]
    return dict(zip(keys, map(float, re.search(TABLE, text).groups())))


@pytest.mark.slow
@pytest.mark.parametrize(("order", "name", "other"), [("row", ROW, "column"), ("column", COLUMN, "row")])
def test_losses_tell_the_order_and_the_placement(order, name, other, trained, tmp_path, caplog):
    path, photographs = write_file(trained, tmp_path / "file.pth", order, name), str(trained / "photographs")
    command = ["import", "--checkpoint", str(path), "--photographs", photographs, "--output", str(tmp_path / "model")]
    main(command)
    assert f"The name tells {order}, the losses tell {order}." in caplog.text
    losses = losses_in(caplog.text)
    assert losses[order, "own"] < 0.95 * min(losses[other, "own"], losses[order, "scrambled"])
    expected = GreenMIMForPreTraining.from_pretrained(trained / "model").state_dict()
    found = GreenMIMForPreTraining.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "name", "told"), [("row", COLUMN, "column"), ("column", ROW, "row")])
def test_a_name_that_the_losses_contradict_is_refused(order, name, told, trained, tmp_path, capsys):
    path, photographs = write_file(trained, tmp_path / "file.pth", order, name), str(trained / "photographs")
    command = ["import", "--checkpoint", str(path), "--photographs", photographs, "--output", str(tmp_path / "model")]
    with pytest.raises(SystemExit) as end:
        main(command)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and not (tmp_path / "model").exists()
    assert f"`args.model` is '{name}', which tells the order {told}, but its losses tell {order}." in printed
    assert losses_in(printed)[order, "own"] < losses_in(printed)[told, "own"]
    main([*command, "--patch_merging_order", order])  # the flag says
    expected = GreenMIMForPreTraining.from_pretrained(trained / "model").state_dict()
    found = GreenMIMForPreTraining.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_losses_alone_do_not_choose(trained, tmp_path):
    path = write_file(trained, tmp_path / "file.pth", "row", None)
    message = rf"(?s)does not tell the order .*Give --patch_merging_order\. Its losses tell row\.\n.*{TABLE}"
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(path, tmp_path / "model", photographs=trained / "photographs")


@pytest.mark.slow
def test_the_losses_are_those_of_the_models(trained):
    """The public forward, under the masks of the measurement, for latents at their own place."""
    checkpoint = read_checkpoint(trained / "column.pth")
    models = {order: convert(checkpoint, order) for order in ("row", "column")}
    photographs = read_photographs(trained / "photographs")
    losses = measure_orders(models, photographs)
    images = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in photographs])
    pixel_values = normalized(images.view(8, 32, 32, 3).permute(0, 3, 1, 2))
    generator = torch.Generator().manual_seed(0)
    for number in range(MASKS):
        noise = torch.rand(1, 16, generator=generator)
        torch.randperm(8, generator=generator)  # where latents go when they are scrambled
        for order, model in models.items():
            with torch.no_grad():
                expected = model(pixel_values, noise=noise).loss
            torch.testing.assert_close(losses.of_masks[order, "own"][number], expected)


def test_what_has_learned_nothing_goes_by_its_name(tmp_path, caplog):
    """Of random weights either order is as bad; the photographs are those that are always there."""
    path = write_official(tmp_path / "official.pth", random_weights(official_shapes(**TINY)), model=ROW)
    import_checkpoint(path, tmp_path / "model", **HEADS)
    assert "6 views of photographs" in caplog.text
    assert "The name tells row, the losses tell neither." in caplog.text
    caplog.clear()
    import_checkpoint(path, tmp_path / "model", "row", **HEADS)
    assert "Loss of reconstruction" not in caplog.text


def test_losses_must_agree_under_every_mask():
    one = torch.ones(MASKS)

    def order(row, column):
        of_masks = {("row", "own"): row, ("column", "own"): column}
        of_masks |= {(order, "scrambled"): 2 * one for order in ("row", "column")}
        return OrderLosses(of_masks, one, 6).order()

    assert order(0.5 * one, 0.7 * one) == "row" and order(0.7 * one, 0.5 * one) == "column"
    assert order(0.5 * one, 0.501 * one) is None, "by too little"
    assert order(1.2 * one, 1.5 * one) is None, "neither is better than predicting nothing"
    mixed = 0.5 * one
    mixed[3] = 0.8
    assert order(mixed, 0.7 * one) is None
    assert order(one * math.nan, 0.5 * one) is None
    # The order shows whatever the placement that it was trained with.
    losses = {("row", "own"): 0.9 * one, ("row", "scrambled"): 0.5 * one}
    losses |= {("column", place): 0.7 * one for place in ("own", "scrambled")}
    assert OrderLosses(losses, one, 6).order() == "row"


def test_photographs(tmp_path):
    assert [image.size for image in read_photographs()] == [(640, 427)] * 2
    wide = Image.new("RGB", (10, 4))
    wide.paste((255, 0, 0), (6, 0, 10, 4))
    views = square_views(wide)
    assert [view.size for view in views] == [(4, 4)] * 3
    assert [view.getpixel((3, 0))[0] for view in views] == [0, 255, 255]
    assert len(square_views(Image.new("L", (5, 5)))) == 1
    with pytest.raises(CheckpointError, match="a folder without images"):
        read_photographs(tmp_path)
    with pytest.raises(CheckpointError, match=r"`photographs` '.*nowhere' cannot be read"):
        read_photographs(tmp_path / "nowhere")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"`photographs` .*broken\.png"):
        read_photographs(tmp_path)
