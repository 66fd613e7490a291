# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the models use of Transformers beyond its public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""

import dataclasses

from transformers.core_model_loading import ConversionOps, WeightConverter


class LoadConversion(ConversionOps):
    """Changes weights of one name while a checkpoint is loaded. One object serves one load.

    Attributes:
        weight_name: last part of the name of the weights.
    """

    weight_name: str

    def __deepcopy__(self, memo) -> "LoadConversion":
        return self  # Transformers copies a converter for each weight; the account of a load is one

    def convert(self, input_dict: dict, full_layer_name: str, config, **kwargs) -> dict:
        """One weight of the checkpoint, `{weight_name: [tensor]}` -> `{weight_name: tensor}` as the model needs it."""
        raise NotImplementedError

    def report(self, source: str, config, ignore_mismatched_sizes: bool) -> None:
        """Called once when everything was loaded from `source`."""


class ConvertsWhenLoading:
    """Put before `PreTrainedModel`: every load, of files and of a `state_dict`, has a `load_conversion` of its own.

    Transformers' own place for this, `register_checkpoint_conversion_mapping`, is one list for the whole process: it
    has no beginning and no end of a load, so that it can neither say once what was converted nor refuse what cannot be
    with regard to `ignore_mismatched_sizes`; it applies to parts of weights on a device mesh too; and it is run
    backwards at saving, where weights of this kind stay as the model has them.
    """

    load_conversion: type[LoadConversion]

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        load = super()._load_pretrained_model
        if load_config.device_mesh is not None:
            # Parallel loading hands out parts of weights; a weight of another shape is a size mismatch there.
            return load(model, state_dict, checkpoint_files, load_config, expected_keys)
        conversion = cls.load_conversion()
        converter = WeightConverter(conversion.weight_name, conversion.weight_name, operations=[conversion])
        mapping = [*(load_config.weight_mapping or []), converter]
        converting = dataclasses.replace(load_config, weight_mapping=mapping)
        loaded = load(model, state_dict, checkpoint_files, converting, expected_keys)
        # What saving would run backwards: all but this one.
        model._weight_conversions = [
            other for other in model._weight_conversions if conversion not in getattr(other, "operations", [])
        ]
        source = load_config.pretrained_model_name_or_path or "state_dict"
        conversion.report(source, model.config, load_config.ignore_mismatched_sizes)
        return loaded
