"""The cards of model_cards/: valid for the Hub, and every block of code in them runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import run_mim
from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification, GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.conversion import Checkpoint
from modeling_greenmim.conversion.__main__ import build_parser
from modeling_greenmim.conversion.cards import model_card
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.hub_server import serve
from tests.test_hub import execute
from tests.test_remote_code import PREAMBLE
from training_greenmim.runs.arguments import MIMTrainingArguments, parse_arguments
from training_greenmim.runs.models import MODEL_SIZES, build_config


FOLDER = Path(__file__).parent.parent / "model_cards"
NAMES = ["swin-base", "swin-base-win14", "swin-large-win14", "swin-small", "swin-tiny", "twins-large"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_there_is_a_card_for_each_model():
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted([*NAMES, "converted"])
    assert {name if name.startswith("twins") else f"swin-{name}" for name in MODEL_SIZES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_valid_and_honest(name):
    card = ModelCard.load(FOLDER / f"{name}.md")
    released = name in ("swin-base", "swin-base-win14", "swin-large-win14")
    assert card.data.license == ("cc-by-nc-4.0" if released else "apache-2.0")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    results = {"swin-base": 83.7, "swin-large-win14": 85.1}
    if name in results:
        (result,) = card.data.eval_results
        assert result.metric_value == results[name] and not result.verified and "paper" in result.source_name
    else:
        assert card.data.eval_results is None
    config = build_config(name.removeprefix("swin-"))
    depths, heads = (", ".join(map(str, values)) for values in (config.depths, config.num_heads))
    row = f"embed_dim {config.embed_dim}, depths {depths}, heads {heads}, window {config.window_size}"
    assert f"| encoder | {row} |" in card.text
    for section in ("Use", "Intended use", "Recipe", "Results", "Emissions", "Citation"):
        assert f"\n## {section}\n" in card.text


@pytest.mark.slow
def test_python_in_the_cards_runs(tmp_path):
    """All cards have the same code, but for the name of the model."""
    cards = {name: blocks((FOLDER / f"{name}.md").read_text(), "python") for name in NAMES}
    code, *others = ([block.replace(f"greenmim/{name}", "greenmim/NAME") for block in cards[name]] for name in cards)
    assert len(code) == 2 and all(other == code for other in others)
    hub, server = serve()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    values = {"image_size": 224, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    model = GreenMIMForPreTraining(GreenMIMConfig(**values, **decoder))
    model.save_pretrained(tmp_path / "model")
    build_image_processor(model.config).save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.create("greenmim/NAME")
    hub.commit("greenmim/NAME", files, {"model.safetensors": True})
    code += ["assert features.last_hidden_state.shape == (1, 49, 64)", "assert len(backbone.channels) == 4"]
    hide_our_packages = PREAMBLE.partition("import torch")[0]
    command = ["-I", "-c", hide_our_packages + "\n".join(code)]
    status, output = execute(hub, tmp_path, command, token=None, name="elsewhere")
    server.shutdown()
    server.server_close()
    assert status == 0, output


def test_commands_in_the_cards_are_understood():
    for name in NAMES:
        for block in blocks((FOLDER / f"{name}.md").read_text(), "bash"):
            words = shlex.split(block.replace("\\\n", " "))
            if words[1] == "run_mim.py":
                kinds = (run_mim.ModelArguments, run_mim.DataArguments, MIMTrainingArguments)
                argv = [word for word in words[2:] if word != "--bf16"]  # not every processor has it
                assert parse_arguments(kinds, argv)[0].config_name == name.removeprefix("swin-")
            else:
                assert words[:3] == ["python", "-m", "modeling_greenmim.conversion"]
                assert build_parser().parse_args(words[3:]).output == name


def test_imported_weights_get_the_right_card():
    released = Checkpoint("original", {}, merging_order="row")
    wide = {"window_size": 14, "embed_dim": 192, "num_heads": [6, 12, 24, 48]}
    with torch.device("meta"):
        base, large, other = (GreenMIMModel(GreenMIMConfig(**values)) for values in ({}, wide, {"image_size": 448}))
        classifier = GreenMIMForImageClassification(GreenMIMConfig())
    assert "# GreenMIM Swin-B, window 7\n" in model_card(base, released, "a.pth", "mine")
    assert "# GreenMIM Swin-L, window 14\n" in model_card(large, released, "a.pth", "mine")
    own = Checkpoint("original", {}, merging_order="column")
    with torch.device("meta"):
        twins = GreenMIMModel(GreenMIMConfig(backbone_type="twins"))
    text = model_card(twins, released, "a.pth", "mine")
    assert "A Twins transformer, converted" in text and "- twins\n" in text
    for model, checkpoint in ((base, own), (other, released), (base, Checkpoint("microsoft-swin", {}))):
        text = model_card(model, checkpoint, "a.pth", "mine", " --image_size 224")
        assert "# mine\n" in text and "`a.pth`" in text and "--output mine --image_size 224\n" in text
        assert 'AutoModel.from_pretrained("mine"' in text and "{" not in text.split("## Citation")[0]
        card = ModelCard(text)
        assert card.data.license is None and card.data.pipeline_tag == "image-feature-extraction"
    text = model_card(classifier, Checkpoint("timm", {}), "a.pth", "mine")
    assert "AutoModelForImageClassification.from_pretrained" in text
    assert ModelCard(text).data.pipeline_tag == "image-classification"
