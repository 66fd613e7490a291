"""Energy of training: measured without a network, kept over interruptions, told in results and card."""

import socket

import pytest
from huggingface_hub import ModelCard

from tests.test_run_mim import card_of
from tests.training_helpers import results_of, run, state_of, write_images


COUNTRY = ("--track_energy", "--country_iso_code", "DEU")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_energy_is_in_results_log_and_card(tmp_path, no_network):
    write_images(tmp_path / "data", 6)
    output = run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--max_steps", 6, *COUNTRY)
    results = results_of(output)
    assert results["energy_kwh"] > 0 and results["co2_eq_kg"] > 0
    batch = results["train_samples_per_second"] / results["train_steps_per_second"]
    assert results["images_per_joule"] == pytest.approx(6 * round(batch) / (results["energy_kwh"] * 3.6e6), rel=1e-6)
    # Germany's power comes at some hundred grams a kWh.
    assert 0.1 < results["co2_eq_kg"] / results["energy_kwh"] < 0.9
    logged = [entry["energy_kwh"] for entry in state_of(output)["log_history"] if "energy_kwh" in entry]
    assert logged == sorted(logged) and 0 < logged[0] <= results["energy_kwh"]
    emissions = ModelCard(card_of(output)).data.co2_eq_emissions
    assert emissions["emissions"] == pytest.approx(1000 * results["co2_eq_kg"], rel=1e-3)
    assert emissions["training_type"] == "pre-training" and emissions["geographical_location"] == "DEU"


@pytest.mark.slow
def test_a_resumed_run_counts_on(tmp_path):
    write_images(tmp_path / "data", 6)
    # The checkpoint lies between two logs.
    common = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 5, "--logging_steps", 3, *COUNTRY)
    output = run(tmp_path / "out", *common, "--save_strategy", "steps", "--save_steps", 2)
    resumed = run(tmp_path / "resumed", *common, "--resume_from_checkpoint", output / "checkpoint-4")
    logged = [entry for entry in state_of(resumed)["log_history"] if "energy_kwh" in entry]
    kwh = [entry["energy_kwh"] for entry in logged]
    assert [entry["step"] for entry in logged] == [2, 3, 4] and kwh == sorted(kwh)
    (at_checkpoint,) = (entry for entry in state_of(output)["log_history"] if entry["step"] == 4)
    results = results_of(resumed)
    assert kwh[2] == at_checkpoint["energy_kwh"] < results["energy_kwh"]
    assert results["images_per_joule"] * results["energy_kwh"] * 3.6e6 == pytest.approx(5 * 4, rel=1e-6)


@pytest.mark.slow
def test_steps_that_were_not_measured_do_not_count(tmp_path):
    write_images(tmp_path / "data", 6)
    common = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 6, "--logging_steps", 1)
    saving = ("--save_strategy", "steps", "--save_steps", 2)
    plain = run(tmp_path / "plain", *common, *saving)
    first = run(tmp_path / "first", *common, *saving, *COUNTRY, "--resume_from_checkpoint", plain / "checkpoint-2")
    results = results_of(
        run(tmp_path / "second", *common, *COUNTRY, "--resume_from_checkpoint", first / "checkpoint-4")
    )
    images = results["images_per_joule"] * results["energy_kwh"] * 3.6e6
    assert images == pytest.approx(4 * 4, rel=1e-6), "four steps of four images"


@pytest.mark.parametrize("country", [(), ("--country_iso_code", "Germany")])
def test_the_country_must_be_known(tmp_path, country):
    with pytest.raises(ValueError, match=r"`country_iso_code` is .*`track_energy` needs the three letters"):
        run(tmp_path / "out", "--train_dir", tmp_path, "--do_train", "--track_energy", *country)
