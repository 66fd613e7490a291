# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Energy and emissions of training, measured by codecarbon's offline tracker: no call to any network."""

from transformers import TrainerCallback

from .extras import require


KWH, CO2, IMAGES_PER_JOULE = "energy_kwh", "co2_eq_kg", "images_per_joule"
JOULES_PER_KWH = 3.6e6


def check_country(code: str | None) -> None:
    """Makes sure that a country's mix of energy is known.

    Raises:
        `ValueError`: for what is no ISO code of three letters, or a country without numbers.
    """
    # Here, for the import takes a while and few runs need it.
    source = require("codecarbon.input", "energy").DataSource()
    if code not in source.get_global_energy_mix_data():
        raise ValueError(
            f"`country_iso_code` is {code!r}; `track_energy` needs the three letters of the country whose power is"
            " used, such as DEU or USA, to tell the emissions."
        )


class EnergyCallback(TrainerCallback):
    """Measures the whole machine while it trains, once on each machine.

    What was measured so far is in the log, which checkpoints keep: a resumed run counts on.

    Args:
        country: ISO code of three letters.
    """

    def __init__(self, country: str):
        self.country = country
        self.tracker = None
        self.now = self.before = {KWH: 0.0, CO2: 0.0}
        self.first_step = self.images_before = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts to measure, from what the log of a resumed run tells."""
        self.first_step = state.global_step
        if earlier := [entry for entry in state.log_history if KWH in entry]:
            self.before = {name: earlier[-1][name] for name in (KWH, CO2)}
            self.images_before = round(earlier[-1][IMAGES_PER_JOULE] * self.before[KWH] * JOULES_PER_KWH)
        if state.is_local_process_zero:
            self.tracker = self._make_tracker()
            self.tracker.start()

    def _make_tracker(self):
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output import BaseOutput

        class Totals(BaseOutput):
            def out(_, total, delta):
                self.now = {KWH: total.energy_consumed, CO2: total.emissions}

        return OfflineEmissionsTracker(
            country_iso_code=self.country,
            output_handlers=[Totals()],
            save_to_file=False,
            allow_multiple_runs=True,
            log_level="error",
        )

    def on_train_end(self, args, state, control, **kwargs):
        """Stops measuring."""
        if self.tracker is not None:
            self.tracker.stop()
            self.tracker = None

    def of_this_machine(self) -> dict[str, float]:
        """kWh and kg of CO2-equivalent of this machine since `on_train_begin`; 0 but in its first process."""
        if self.tracker is not None:
            self.tracker.flush()
        return self.now


def images_per_joule(images: int, kwh: float) -> float:
    """Trained images for each joule."""
    return images / (kwh * JOULES_PER_KWH) if kwh else 0.0
