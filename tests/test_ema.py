"""The moving average of weights: its values, checkpoints, resumption, swapping, several processes."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.training_helpers import assert_same_weights, subprocess_environment
from training_greenmim.classification.ema import EMA_FILE, EMACallback, EMATrainerMixin
from training_greenmim.runs.checkpoints import is_whole_checkpoint, last_checkpoint


class Net(nn.Module):
    """Frozen and trainable layers, batch norm and a buffer of integers."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.register_buffer("index", torch.arange(1, 50))

    def forward(self, x, labels):
        logits = self.head(self.middle(self.norm(self.frozen(x))).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


AVERAGED = {
    *("norm.weight", "norm.bias", "middle.weight", "middle.bias", "head.weight", "head.bias"),
    *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "index"),
}
COPIED = {"norm.num_batches_tracked", "index"}


class NetTrainer(EMATrainerMixin, Trainer):
    """What the tests train with."""


class Recorder(TrainerCallback):
    """Keeps the model's tensors when training begins and after each step."""

    def __init__(self):
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.record(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.record(model)

    def record(self, model):
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def dataset(count: int = 48) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, generator=generator)
    return [{"x": image, "labels": index % 4} for index, image in enumerate(images)]


def make_trainer(
    output_dir: Path, decay: float | None = 0.2, seed: int = 0, trainer_class=NetTrainer, **changes
) -> Trainer:
    values = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "max_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(str(output_dir), **{**values, **changes})
    torch.manual_seed(seed)
    callbacks = [] if decay is None else [EMACallback(decay)]
    return trainer_class(Net(), args, train_dataset=dataset(), eval_dataset=dataset(8), callbacks=callbacks)


def averages(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The average, through the file that `save` writes."""
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.ema.save(folder)
    tensors = load_file(folder / EMA_FILE)
    (folder / EMA_FILE).unlink()
    return tensors


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Values


# The ramp gives 1/10, 2/11, 3/12, 4/13, 5/14, 6/15.
@pytest.mark.parametrize(
    ("decay", "decays"),
    [(0.2, [1 / 10, 2 / 11, 0.2, 0.2, 0.2, 0.2]), (0.9999, [1 / 10, 2 / 11, 1 / 4, 4 / 13, 5 / 14, 2 / 5])],
)
def test_average_is_the_closed_form_after_steps_of_two_micro_batches(tmp_path, decay, decays):
    trainer = make_trainer(tmp_path, decay, gradient_accumulation_steps=2)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    found = averages(trainer)
    assert found.keys() == AVERAGED and len(recorder.states) == 7
    # How much of each state is left in the end: what the step gave it times all later decays.
    shares = [np.prod(decays), *((1 - decays[step]) * np.prod(decays[step + 1 :]) for step in range(6))]
    assert sum(shares) == pytest.approx(1)
    for name in AVERAGED:
        last = recorder.states[-1][name]
        if name in COPIED:
            assert torch.equal(found[name], last), name
            continue
        expected = sum(share * state[name].double() for share, state in zip(shares, recorder.states))
        assert not torch.allclose(expected.float(), last, rtol=1e-3), name
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_average_starts_anew_with_each_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    first, second, third = (state["head.bias"].double() for state in recorder.states)
    expected = 2 / 11 * (first / 10 + second * 9 / 10) + 9 / 11 * third
    torch.testing.assert_close(averages(trainer)["head.bias"].double(), expected, rtol=1e-5, atol=1e-7)


# Checkpoints


def test_a_resumed_run_has_the_same_average_bit_for_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", seed=1, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert same(averages(whole), averages(resumed)) and resumed.ema.num_updates == 6
    assert_same_weights(tmp_path / "whole/checkpoint-6", tmp_path / "resumed/checkpoint-6")
    assert (tmp_path / "whole/checkpoint-6" / EMA_FILE).is_file()
    # The comparison means something: averages differ between steps, and from the weights.
    assert not torch.equal(
        load_file(tmp_path / "whole/checkpoint-3" / EMA_FILE)["head.bias"], averages(whole)["head.bias"]
    )
    assert not torch.equal(resumed.model.head.bias, averages(whole)["head.bias"])


def test_the_newest_checkpoint_is_the_newest_whole_one(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    resumed = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.ema.checkpoint == str(tmp_path / "checkpoint-4") and resumed.ema.num_updates == 6


def test_a_checkpoint_holds_names_of_the_model_and_the_number_of_updates(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    with safe_open(tmp_path / "checkpoint-2" / EMA_FILE, "pt") as file:
        assert set(file.keys()) == AVERAGED
        assert file.metadata() == {"num_updates": "2"}


class KilledTrainer(NetTrainer):
    """Stops in the middle of its second checkpoint, where Trainer has saved the model and goes on to the rest."""

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if output_dir.endswith("checkpoint-4"):
            raise KeyboardInterrupt


def test_no_whole_checkpoint_is_without_its_average(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_class=KilledTrainer, save_strategy="steps", save_steps=2, save_total_limit=1
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-4" / EMA_FILE).is_file() and not is_whole_checkpoint(tmp_path / "checkpoint-4")
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-2" / EMA_FILE).is_file()


def test_other_saves_leave_the_average_out(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert [path.name for path in (tmp_path / "final").glob("*.safetensors")] == ["model.safetensors"]


def test_without_an_average_trainer_saves_and_resumes_as_ever(tmp_path):
    trainer = make_trainer(tmp_path, decay=None, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.ema is None and not list(tmp_path.rglob(EMA_FILE))
    make_trainer(tmp_path, decay=None, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_model_comes_with_its_average(tmp_path):
    # The highest loss counts as the best, so that it is not the last one.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, max_steps=3, **best, **every_step)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    assert same(averages(trainer), load_file(best / EMA_FILE))


# Swapping


def test_the_average_is_swapped_in_and_out(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    model, ema = trainer.model, trainer.ema
    own, average = snapshot(model), averages(trainer)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    expected = copy.deepcopy(model)
    assert expected.load_state_dict(average, strict=False).unexpected_keys == []
    with ema.applied(model) as applied:
        assert applied is model
        assert same(snapshot(model), snapshot(expected)) and not same(snapshot(model), own)
        # Not a copy: the tensors themselves have changed places.
        assert {name for name, tensor in model.state_dict().items() if tensor.data_ptr() != places[name]} == AVERAGED
    assert same(snapshot(model), own) and same(averages(trainer), average)
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_a_weight_of_two_layers_is_swapped_once(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.head.weight = trainer.model.middle.weight
    trainer.train()
    own, average = snapshot(trainer.model), averages(trainer)
    with trainer.ema.applied(trainer.model) as model:
        assert model.head.weight is model.middle.weight and torch.equal(model.head.weight, average["middle.weight"])
    assert same(snapshot(trainer.model), own) and not torch.equal(own["head.weight"], average["middle.weight"])


def test_training_is_the_same_whether_or_not_the_average_is_evaluated(tmp_path):
    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with trainer.ema.applied(trainer.model):
                losses.append(trainer.evaluate()["eval_loss"])

    plain, losses = make_trainer(tmp_path / "plain"), []
    plain.train()
    trainer = make_trainer(tmp_path / "evaluated")
    trainer.add_callback(Evaluate())
    trainer.train()
    assert same(snapshot(plain.model), snapshot(trainer.model)) and same(averages(plain), averages(trainer))
    with trainer.ema.applied(trainer.model):
        assert trainer.evaluate()["eval_loss"] == losses[-1]
    assert trainer.evaluate()["eval_loss"] != losses[-1]


def test_the_own_weights_come_back_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    own = snapshot(trainer.model)
    with pytest.raises(KeyError), trainer.ema.applied(trainer.model):
        raise KeyError
    assert same(snapshot(trainer.model), own)
    with trainer.ema.applied(trainer.model):
        assert not same(snapshot(trainer.model), own)


def test_a_swapped_model_is_neither_swapped_nor_saved_again(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    with trainer.ema.applied(trainer.model):
        swapped = snapshot(trainer.model)
        with pytest.raises(RuntimeError, match="applied to the model already"), trainer.ema.applied(trainer.model):
            pass
        with pytest.raises(RuntimeError, match="applied to the model already"):
            trainer.ema.save(tmp_path)
        assert same(snapshot(trainer.model), swapped)


def test_there_is_no_average_before_training(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="starts when training begins"), trainer.ema.applied(trainer.model):
        pass


# Bad input


@pytest.mark.parametrize("decay", [-0.1, 0.0, 1.0, 1.5])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"`ema_decay` is {decay}; it must be between 0 and 1"):
        EMACallback(decay)


@pytest.mark.parametrize("distributed_type", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_training_is_refused(tmp_path, monkeypatch, distributed_type):
    trainer = make_trainer(tmp_path)
    # What accelerate sets for such a run, which needs a GPU.
    monkeypatch.setattr(trainer.args.distributed_state, "distributed_type", distributed_type)
    with pytest.raises(ValueError, match=f"`ema_decay` is 0.2, but {distributed_type.value} may shard"):
        trainer.ema.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_weights_of_half_precision_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.middle.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"`ema_decay` is 0\.2, but middle\.weight is torch\.bfloat16"):
        trainer.train()


def test_a_checkpoint_without_average_cannot_be_resumed_with_one(tmp_path):
    make_trainer(tmp_path, decay=None, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(
        ValueError, match=rf"`ema_decay` is 0\.2, but the checkpoint .*checkpoint-1' has no {EMA_FILE}"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_average_of_another_model_cannot_be_resumed(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.model.register_buffer("more", torch.zeros(1))
    trainer.train()
    with pytest.raises(ValueError, match=rf"`ema_decay`: the {EMA_FILE} of .* fit .*: more is in only one of them"):
        trainer.ema.load(tmp_path / "checkpoint-1")


# Several processes


PROCESS = """
import os
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.test_ema import make_trainer
from tests.training_helpers import leave_at_once

output = Path(sys.argv[1], os.environ["RANK"])
trainer = make_trainer(output, max_steps=3, save_strategy="steps", save_steps=2)
assert trainer.args.world_size == 2
trainer.train()
end = output / "end"
end.mkdir(parents=True)
trainer.ema.save(end)
save_file({"mean": trainer.model.norm.running_mean}, end / "own.safetensors")
leave_at_once()
"""


@pytest.mark.slow
def test_processes_have_the_same_average_and_the_first_one_saves_it(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**subprocess_environment(), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (load_file(tmp_path / rank / "end" / EMA_FILE) for rank in "01")
    assert first.keys() == AVERAGED and same(first, second)
    # Their own statistics do differ: each process sees other images.
    own = [load_file(tmp_path / rank / "end/own.safetensors")["mean"] for rank in "01"]
    assert not torch.equal(*own)
    saved = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(EMA_FILE))
    assert saved == ["0/checkpoint-2", "0/checkpoint-3", "0/end", "1/end"]
