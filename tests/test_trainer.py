"""training/trainer.py: checkpoints, loaders, schedules, and losses that are not finite."""

import pytest
import torch
from conftest import facts, losses
from safetensors.torch import load_file
from transformers.trainer_utils import seed_worker

import train
from training.trainer import COMPLETE, NonFiniteLoss, last_complete_checkpoint


@pytest.mark.parametrize("how", ["lora", "full"])
def test_every_trained_tensor_is_in_every_checkpoint(run, tmp_path, monkeypatch, how):
    seen = {}

    class Spy(train.Causal2VecTrainer):
        def _save_checkpoint(self, model, trial):
            seen[self.state.global_step] = {
                name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
            }
            super()._save_checkpoint(model, trial)

    monkeypatch.setattr(train, "Causal2VecTrainer", Spy)
    run("--train_decoder", how, "--save_total_limit", 5)
    assert sorted(seen) == [2, 4]
    for step, trained in seen.items():
        folder = tmp_path / "run" / f"checkpoint-{step}"
        name = "adapter_model.safetensors" if how == "lora" else "model.safetensors"
        saved = load_file(folder / name)
        assert trained
        for key, value in trained.items():
            key = key.replace(".default", "").replace(".modules_to_save", "")
            assert torch.equal(saved[key], value), key


def test_only_complete_checkpoints_count(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-10")


@pytest.mark.parametrize("left", ["model", "adapter", "checkpoint-2"])
def test_what_another_run_left_is_not_overwritten(run, tmp_path, monkeypatch, left):
    monkeypatch.setattr(train, "load_data", lambda *args: pytest.fail("it went on"))
    (tmp_path / "run" / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"holds {left} of another run.*--resume"):
        run()


def test_the_scheduler_has_a_horizon_of_its_own(run):
    folder = run("--max_steps", 4, "--scheduler_steps", 8, "--warmup_steps", 2, "--learning_rate", 1e-3)
    rates = [entry["learning_rate"] for entry in facts(folder.parent)["log"] if "loss" in entry]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3 * 5 / 6])


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    forward = train.InfoNCE.forward
    calls = []

    def poisoned(self, *args):
        calls.append(1)
        return forward(self, *args) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train.InfoNCE, "forward", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"dataset '(one|two)', rows \[\d+"):
        run()
    assert last_complete_checkpoint(tmp_path / "run").endswith("checkpoint-2")


def test_the_loader_has_what_the_arguments_say(run, tmp_path, monkeypatch):
    loaders = []
    make = train.Causal2VecTrainer.get_train_dataloader
    monkeypatch.setattr(
        train.Causal2VecTrainer, "get_train_dataloader", lambda self: loaders.append(make(self)) or loaders[-1]
    )
    options = {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True}
    flags = [part for name, value in options.items() for part in (f"--dataloader_{name}", value)]
    for way in ((), ("--streaming", "--shuffle_buffer", 10)):
        folder = run("--max_steps", 1, "--save_strategy", "no", *flags, *way, output_dir=tmp_path / f"{len(way)}")
        assert len(losses(folder.parent)) == 1
        assert {name: getattr(loaders[-1], name) for name in options} == options
        assert loaders[-1].worker_init_fn.func is seed_worker
    assert len(loaders) == 2


def test_a_frozen_encoder_is_read_once_per_text(run, monkeypatch):
    from transformers import BertModel

    rows = []
    forward = BertModel.forward
    monkeypatch.setattr(
        BertModel, "forward", lambda self, *args, **kw: rows.append(len(kw["input_ids"])) or forward(self, *args, **kw)
    )
    flags = ("--datasets", "two", "--max_steps", "1", "--gradcache", "--gradient_accumulation_steps", "2")
    run(*flags)
    assert sum(rows) == 16  # 8 queries, 8 documents, although GradCache embeds each text twice
