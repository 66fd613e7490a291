"""Arguments of the scripts: files, ranges, precision by the device, and the help."""

import json
import re
from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments

import run_image_classification
import run_mim
from tests.training_helpers import ROOT, classification_flags, flags
from training_greenmim.runs.arguments import (
    ClassificationTrainingArguments,
    MIMTrainingArguments,
    parse_arguments,
)


def parse_run_mim(argv: list) -> tuple:
    dataclass_types = (run_mim.ModelArguments, run_mim.DataArguments, MIMTrainingArguments)
    return parse_arguments(dataclass_types, [str(value) for value in argv])


def training_arguments(*argv) -> MIMTrainingArguments:
    return parse_run_mim(["--output_dir", "nowhere", *argv])[2]


# Files

WRONG_FILES = {
    "text for a number": ("yaml", "max_steps: many", r"run\.yaml: `max_steps` is 'many'; a whole number is needed"),
    "a fraction for a count": ("yaml", "max_steps: 1.5", r"`max_steps` is 1\.5; a whole number"),
    "true for a count": ("yaml", "max_steps: true", "`max_steps` is True; a whole number"),
    "a number for text": ("yaml", "config_name: 7", r"`config_name` is 7; text \(in quotes\) or null is needed"),
    "a number for a flag": ("yaml", "do_train: 3", "`do_train` is 3; true or false is needed"),
    "a list for a number": ("yaml", "learning_rate: [1e-3]", r"`learning_rate` is \['1e-3'\]; a number or null"),
    "no such choice": ("yaml", "eval_strategy: weekly", "`eval_strategy` is 'weekly'; one of no, steps, epoch"),
    "a number in a list": ("json", '{"metrics": [1]}', r"run\.json: `metrics` is \[1\]; a list or null"),
    "a mapping for a number in JSON": ("json", '{"seed": {}}', r"run\.json: `seed` is \{\}; a whole number"),
    "YAML that ends early": ("yaml", "seed: 1\ndepths: [1, 2\n", r"run\.yaml: line 3: expected"),
    "a tab in YAML": ("yml", "seed: 1\n\tmax_steps: 2\n", r"run\.yml: line 2: found character"),
    "JSON with a comma too many": ("json", '{"seed": 1,}', r"run\.json: .*line 1 column"),
    "a key twice in YAML": ("yaml", "seed: 1\nmax_steps: 2\nseed: 3\n", r"run\.yaml: line 3: `seed` is given twice"),
    "a key twice in JSON": ("json", '{"seed": 1, "seed": 3}', r"run\.json: `seed` is given twice"),
    "a list of arguments": ("yaml", "- seed\n- 1\n", r"run\.yaml holds a list; lines of `argument: value` are needed"),
    "a word": ("yaml", "seed", r"run\.yaml holds text"),
    "unknown names": ("yaml", "max_step: 3\nepochs: 2\n", r"run\.yaml sets \['epochs', 'max_step'\]"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused_by_file_and_key(tmp_path, case):
    suffix, text, error = WRONG_FILES[case]
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        run_image_classification.main([str(path)]) if "metrics" in text else run_mim.main([str(path)])


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: there is no such file of arguments"):
        run_mim.main(["nowhere.yaml"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("output_dir: Gr\u00fcn".encode("latin-1"))
    (tmp_path / "zip.json").write_bytes(b"PK\x03\x04\xff\xfe")
    for name, error in (("folder.yaml", "cannot be read: Is a directory"), ("latin.yaml", "no text in UTF-8")):
        with pytest.raises(ValueError, match=rf"{tmp_path / name}: this file of arguments .*{error}\."):
            run_mim.main([str(tmp_path / name)])
    with pytest.raises(ValueError, match=r"zip\.json: .*no text in UTF-8"):
        run_image_classification.main([str(tmp_path / "zip.json")])


@pytest.mark.parametrize("text", ["true", '"true"'])
def test_a_file_can_ask_to_resume(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\nuse_cpu: true\nresume_from_checkpoint: {text}\n")
    assert parse_run_mim([path])[2].resume_from_checkpoint == "true"


def test_values_in_files_become_what_their_arguments_are(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: out\nuse_cpu: true\nlearning_rate: 1e-3\nweight_decay: 0\nmax_steps: 3\nsave_strategy: no\n"
        "report_to: [none]\nlr_scheduler_kwargs: {power: 2}\nmask_per_sample: 'true'\nvalidation_dir: null\n"
    )
    _, data, args = parse_run_mim([path])
    assert (args.learning_rate, args.weight_decay, args.max_steps) == (1e-3, 0.0, 3)
    assert (args.save_strategy, args.lr_scheduler_kwargs) == ("no", {"power": 2})
    assert args.mask_per_sample is True and data.validation_dir is None


@pytest.mark.parametrize("text", ["depths=[2],depths=[3]", "depths=[2", "{"])
def test_overrides_are_read_as_strictly(text):
    with pytest.raises(ValueError, match=r"`config_overrides` is .*each name once"):
        run_mim.main(flags("nowhere", "--do_train", overrides=text))


def test_unknown_flags_are_named():
    with pytest.raises(ValueError, match=r"\['--epochs', '3'\] are no arguments of this script; --help lists them"):
        run_mim.main(["--output_dir", "nowhere", "--epochs", "3"])


# Ranges

OUT_OF_RANGE = [
    ("max_train_samples", 0, "1 or more"),
    ("max_train_samples", -3, "1 or more"),
    ("max_eval_samples", 0, "1 or more"),
    ("gradient_accumulation_steps", 0, "1 or more"),
    ("per_device_train_batch_size", 0, "1 or more"),
    ("per_device_eval_batch_size", -1, "1 or more"),
    ("dataloader_num_workers", -1, "0 or more"),
    ("max_steps", 0, "1 or more"),
    ("max_steps", -2, "1 or more"),
    ("num_train_epochs", 0, "above 0"),
    ("num_train_epochs", "nan", "above 0"),
    ("num_train_epochs", "inf", "above 0 and finite"),
    ("logging_steps", 0, "above 0"),
    ("logging_steps", -5, "above 0"),
    ("save_steps", 0, "above 0"),
    ("save_steps", -0.5, "above 0"),
    ("save_steps", "nan", "above 0"),
    ("save_steps", "inf", "above 0 and finite"),
    ("eval_steps", -1, "0 or more"),
    ("eval_steps", "nan", "0 or more"),
    ("eval_steps", "inf", "finite"),
    ("weight_decay", -1, "0 or more"),
    ("learning_rate", -1, "0 or more"),
]


@pytest.mark.parametrize(("name", "value", "right"), [*OUT_OF_RANGE, ("num_pictures", -1, "0 or more")])
def test_numbers_out_of_range_are_refused_before_work(tmp_path, name, value, right):
    with pytest.raises(ValueError, match=rf"`{name}` is {value}.*must be {right}"):
        run_mim.main(flags(tmp_path / "out", "--do_train", "--save_strategy", "steps", f"--{name}", value))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value", "right"), [*OUT_OF_RANGE, ("knn_k", 0, "1 or more")])
def test_numbers_out_of_range_are_refused_in_classification(tmp_path, name, value, right):
    options = ("--config_name", "tiny", "--do_train", "--save_strategy", "steps", f"--{name}", value)
    argv = classification_flags(tmp_path / "out", *options)
    with pytest.raises(ValueError, match=rf"`{name}` is {value}.*must be {right}"):
        run_image_classification.main(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train_dir", "validation_dir", "probe_dir", "dataset_name", "model_name_or_path"])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_names_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is '{value}', which names nothing"):
        run_mim.main(flags(tmp_path / "out", "--do_train", f"--{name}", value))


@pytest.mark.parametrize("value", [0, -1, "nan"])
def test_a_temperature_is_above_zero(tmp_path, value):
    argv = classification_flags(tmp_path / "out", "--config_name", "tiny", "--do_eval", "--knn_temperature", value)
    with pytest.raises(ValueError, match=rf"`knn_temperature` is {value}.*must be positive"):
        run_image_classification.main(argv)


@pytest.mark.parametrize(
    ("strategy", "steps"), [("logging_strategy", "logging_steps"), ("save_strategy", "save_steps")]
)
def test_an_interval_matters_where_its_strategy_is_steps(strategy, steps):
    args = training_arguments(f"--{strategy}", "epoch", f"--{steps}", "0", "--use_cpu", "true")
    assert getattr(args, steps) == 0


def test_evaluations_at_zero_steps_come_with_the_logs():
    given = ("--eval_strategy", "steps", "--eval_steps", "0", "--logging_steps", "7", "--use_cpu", "true")
    assert training_arguments(*given).eval_steps == 7


def test_a_run_that_does_not_train_needs_no_epochs():
    assert training_arguments("--do_eval", "--num_train_epochs", "0", "--use_cpu", "true").num_train_epochs == 0


# Precision


@pytest.fixture
def device(monkeypatch):
    """Pretends that there is a GPU or none; arguments are made for the CPU all the same."""

    def pretend(gpu: bool, bf16: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: gpu and bf16)
        monkeypatch.setattr(MIMTrainingArguments, "device", torch.device("cpu"))
        monkeypatch.setattr(MIMTrainingArguments, "train_batch_size", 8)
        monkeypatch.setattr(MIMTrainingArguments, "world_size", 1)

    return pretend


@pytest.mark.parametrize(
    ("has_bf16", "argv", "launched_with", "expected"),
    [
        (True, [], "no", "bf16"),
        (False, [], "no", "no"),
        (True, ["--bf16", "false"], "no", "no"),
        (True, ["--fp16"], "no", "fp16"),
        (True, [], "fp16", "fp16"),
        (True, ["--use_cpu"], "no", "no"),
    ],
)
def test_precision_is_that_of_the_gpu_unless_it_is_given(device, monkeypatch, has_bf16, argv, launched_with, expected):
    device(gpu=True, bf16=has_bf16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    assert training_arguments(*argv).mixed_precision == expected


def test_precision_without_a_gpu(device):
    device(gpu=False)
    assert training_arguments().mixed_precision == "no"
    for given in (["--bf16"], ["--bf16", "true"]):
        args = training_arguments(*given)
        assert args.mixed_precision == "bf16" and args.use_cpu
    assert training_arguments("--bf16_full_eval").use_cpu


def test_a_launch_on_the_cpu_of_a_gpu_machine_has_single_precision(device, monkeypatch):
    device(gpu=True, bf16=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_arguments().mixed_precision == "no"


# Help


@pytest.mark.parametrize("script", [run_mim, run_image_classification])
def test_help_shows_ours_before_trainers(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text[: text.index("\n\n")].splitlines()) <= 2, "a short usage line"
    groups = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    ours = ["model", "target", "data"] if script is run_mim else ["model", "data"]
    assert groups == ["options", *ours, "training", "run", "other arguments of Transformers' Trainer"]
    order = ["--config_name", "--train_dir", "--base_learning_rate", "--output_dir", "--adafactor", "--hub_token"]
    places = [text.index(f"\n  {flag} ") for flag in order if f"\n  {flag} " in text]
    assert places == sorted(places) and len(places) >= 5


def test_every_argument_of_ours_is_explained_on_the_page():
    page = (ROOT / "docs" / "pre-training.md").read_text()
    names = {field.name for one in run_mim.ARGUMENTS for field in fields(one)} - {
        field.name for field in fields(TrainingArguments)
    }
    missing = [name for name in sorted(names | {"bf16", "debug"}) if f"--{name}" not in page]
    assert not missing, missing


def test_both_scripts_share_their_common_arguments():
    shared = set(run_mim.DataArguments.__dataclass_fields__)
    shared &= set(run_image_classification.DataArguments.__dataclass_fields__)
    assert {"dataset_name", "train_dir", "validation_dir", "max_train_samples", "image_column_name"} <= shared


def test_files_of_arguments_serve_classification_too(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"output_dir": "out", "config_name": "tiny", "metrics": ["accuracy"], "use_cpu": True}))
    dataclass_types = (
        run_image_classification.ModelArguments,
        run_image_classification.DataArguments,
        ClassificationTrainingArguments,
    )
    assert parse_arguments(dataclass_types, [str(path)])[1].metrics == ["accuracy"]
