"""train.py from end to end on tiny backbones: what is trained, saved, resumed and refused."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, facts, logged, losses
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import train
from modeling_causal2vec import Causal2VecModel
from training.trainer import COMPLETE


TEXTS = ["a text about cats", "another text", "how do dogs sleep"]


def assert_same_model(folder: Path, other: Path) -> None:
    expected, actual = (load_file(path / "model.safetensors") for path in (folder, other))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_lora_leaves_an_adapter_and_a_merged_model_that_agree(run, tmp_path, monkeypatch):
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    in_memory = {}
    save_results = train.save_results

    def spy(trainer, *args):
        in_memory["vectors"] = trainer.model.encode(TEXTS, instruction="find")
        in_memory["base"] = trainer.model.get_base_model().config
        with trainer.model.disable_adapter():
            in_memory["before"] = trainer.model.encode(TEXTS, instruction="find")
        save_results(trainer, *args)

    monkeypatch.setattr(train, "save_results", spy)
    folder = run("--train_encoder", "lora")
    merged = Causal2VecModel.from_pretrained(folder)
    after = merged.encode(TEXTS, instruction="find")
    assert abs(after - in_memory["vectors"]).max() < 1e-5
    assert abs(after - in_memory["before"]).max() > 1e-3  # training did something

    base = Causal2VecModel.from_pretrained(tmp_path / "run" / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert abs(adapted.encode(TEXTS, instruction="find") - after).max() < 1e-5
    # The adapter's folder by itself, as for any of transformers' models: it names its base, from wherever it is loaded.
    assert adapted.peft_config["default"].base_model_name_or_path == "../base"
    checkpoint = json.loads((tmp_path / "run" / "checkpoint-4" / "adapter_config.json").read_text())
    assert checkpoint["base_model_name_or_path"] == str(tmp_path / "run" / "base")
    alone = AutoModel.from_pretrained(tmp_path / "run" / "adapter", trust_remote_code=True)
    assert abs(alone.encode(TEXTS, instruction="find") - after).max() < 1e-5
    through_sentence_transformers = SentenceTransformer(str(tmp_path / "run" / "adapter"), trust_remote_code=True)
    assert abs(through_sentence_transformers.encode(TEXTS, prompt="find") - after).max() < 1e-5
    for card, of_adapter in ((tmp_path / "run" / "adapter" / "README.md", True), (folder / "README.md", False)):
        assert ("`peft`" in card.read_text()) == of_adapter
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for part in ("encoder.", "decoder.", "projector."):
        assert any(part in name for name in tensors), part
    # What the file lacks would stay as it was drawn; transformers 5.17 loses the projector of a whole file so.
    rest = {name: tensor for name, tensor in tensors.items() if "projector." not in name}
    save_file(rest, tmp_path / "run" / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights unset.*projector"):
        AutoModel.from_pretrained(tmp_path / "run" / "adapter", trust_remote_code=True)


def test_bf16_run_trains(run):
    folder = run(
        "--dtype", "bfloat16", "--bf16", "true", "--dev_rows", 2, "--eval_strategy", "steps", "--eval_steps", 2
    )
    assert all(math.isfinite(loss) for loss in losses(folder.parent))
    assert len(losses(folder.parent)) == 4


def test_a_resumed_run_continues_as_if_never_interrupted(run, tmp_path):
    # 4 steps interrupted after 2 (the newest checkpoint half-written), against 4 in one go. LoRA dropout uses the RNG.
    flags = ("--lora_dropout", 0.3, "--max_examples", 2)
    straight = run(*flags, output_dir=tmp_path / "straight")
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "straight", interrupted)
    shutil.rmtree(interrupted / "model")
    (interrupted / "checkpoint-4" / COMPLETE).unlink()
    (interrupted / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    resumed = run(*flags, "--resume", output_dir=interrupted)
    assert losses(resumed.parent) == losses(straight.parent)
    assert_same_model(straight, resumed)
    # Where the base model was there already, too, the adapter's folder tells AutoModel which class to load.
    for folder in (straight, resumed):
        config = json.loads((folder.with_name("adapter") / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_causal2vec.Causal2VecModel"


def test_a_run_that_was_killed_while_saving_goes_on(run, tmp_path):
    # A process of its own, killed by SIGKILL in the middle of writing its second checkpoint.
    straight = run("--lora_dropout", 0.3)
    recipe = json.loads((tmp_path / "recipe.json").read_text()) | {"lora_dropout": 0.3}
    recipe["output_dir"] = str(tmp_path / "killed")
    (tmp_path / "killed.json").write_text(json.dumps(recipe))
    program = """
import os, signal, sys
import torch
import train
save, calls = torch.save, []
def save_half(value, file, *args, **kwargs):
    calls.append(file)
    save(value, file, *args, **kwargs)
    if "checkpoint-4" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
train.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "killed.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "checkpoint-4").exists() and not (tmp_path / "killed" / "model").exists()
    resumed = run("--lora_dropout", 0.3, "--resume", output_dir=tmp_path / "killed")
    assert losses(resumed.parent) == losses(straight.parent)
    assert_same_model(straight, resumed)


def test_a_streamed_run_trains_and_resumes(run, tmp_path):
    flags = ("--streaming", "--shuffle_buffer", 10, "--max_examples", 2)
    straight = run(*flags, output_dir=tmp_path / "straight")
    assert len(losses(straight.parent)) == 4
    assert "streamed" in (straight / "README.md").read_text()
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "straight", interrupted)
    (interrupted / "checkpoint-4" / COMPLETE).unlink()
    resumed = run(*flags, "--resume", output_dir=interrupted)
    assert losses(resumed.parent) == losses(straight.parent)
    assert not (straight.parent / "data").exists()  # no copy of the rows
    for refused in (("--dev_rows", 5), ("--max_steps", -1)):
        with pytest.raises(ValueError, match="stream"):
            run(*flags, *refused, output_dir=tmp_path / "refused")


def test_epochs_instead_of_steps(run):
    folder = run("--max_steps", -1, "--num_train_epochs", 1.5, "--save_strategy", "no")  # 2 datasets of 40 rows by 4
    assert len(losses(folder.parent)) == 30


def train_in_rank(rank: int, port: int, recipe: str, ways: dict) -> None:
    """One of two processes, as torchrun would start it; leaves the rows that it was given."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for way, flags in ways.items():
        if way.startswith("fsdp"):
            shard_as_the_recipe_says()
        train_and_note_rows(recipe, flags, f"{Path(recipe).parent}/{way}", rank)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads and DDP's destructors can wait for each other for ever at an orderly end


def shard_as_the_recipe_says() -> None:
    """What `accelerate launch` makes of recipes/accelerate/fsdp.yaml; accelerate itself offers it to GPUs alone."""
    import yaml
    from accelerate import DistributedType, PartialState

    recipe = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp.yaml").read_text())
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ |= {name.upper(): str(value) for name, value in recipe["fsdp_config"].items()}
    init = PartialState.__init__

    def init_as_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_as_gpus


def train_and_note_rows(recipe: str, flags: list[str], output_dir: str, rank: int = 0) -> None:
    seen, call = [], train.Collator.__call__

    def note(self, batch):
        collated = call(self, batch)
        seen.append([collated["dataset"], *collated["rows"]])
        return collated

    train.Collator.__call__ = note
    try:
        train.main([recipe, *flags, "--output_dir", output_dir])
    finally:
        train.Collator.__call__ = call
    Path(output_dir, f"rows-{rank}.json").write_text(json.dumps(seen[1:]))  # the first was for the plan


def test_two_processes_train_what_one_trains(run, tmp_path):
    run("--dry_run")  # writes the recipe
    recipe = str(tmp_path / "recipe.json")
    scored = ["--dev_rows", "8", "--eval_strategy", "steps", "--eval_steps", "2"]
    ways = {
        "gradcache": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--gradcache"],
        "streamed": ["--per_device_train_batch_size", "4", "--streaming", "--shuffle_buffer", "10"],
        "fsdp-lora": ["--per_device_train_batch_size", "4", *scored],
        "fsdp-full": ["--per_device_train_batch_size", "4", "--train_decoder", "full", *scored],
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_in_rank, args=(port, recipe, ways), nprocs=2)
    for way, flags in ways.items():
        alone = tmp_path / f"{way}-alone"
        plain = [] if way == "gradcache" else flags[2:]
        train_and_note_rows(recipe, ["--per_device_train_batch_size", "8", *plain], str(alone))
        ranks = [json.loads((tmp_path / way / f"rows-{rank}.json").read_text())[:4] for rank in range(2)]
        one = json.loads((alone / "rows-0.json").read_text())[:4]
        for first, second, whole in zip(*ranks, one, strict=True):
            assert first[0] == second[0] == whole[0]
            assert first[1:] + second[1:] == whole[1:]
        assert losses(tmp_path / way) == pytest.approx(losses(alone), abs=1e-3)
        assert logged(tmp_path / way, "eval_score") == pytest.approx(logged(alone, "eval_score"), abs=1e-6)
        assert len(logged(alone, "eval_score")) == 2 * way.startswith("fsdp")
        expected, actual = (Causal2VecModel.from_pretrained(f / "model").encode(TEXTS) for f in (alone, tmp_path / way))
        assert abs(expected - actual).max() < 1e-3


def test_gradcache_run_equals_the_full_batch(run, tmp_path):
    full = run("--per_device_train_batch_size", 8, output_dir=tmp_path / "full")
    flags = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    cached = run(*flags, "--gradcache", output_dir=tmp_path / "cached")
    accumulated = run(*flags, output_dir=tmp_path / "accumulated")
    assert losses(cached.parent) == pytest.approx(losses(full.parent), abs=1e-3)
    assert losses(accumulated.parent)[0] < losses(full.parent)[0]  # fewer negatives
    # The facts hold the run as it was asked for, so that it can be asked for again.
    assert facts(cached)["arguments"]["gradient_accumulation_steps"] == 4 and facts(cached)["arguments"]["gradcache"]
    again = tmp_path / "again.json"
    again.write_text(json.dumps(facts(cached)["arguments"]))
    model, data, args = train.parse([str(again)])
    assert {**asdict(model), **asdict(data), **args.to_dict()} == facts(cached)["arguments"]
    expected, actual = (Causal2VecModel.from_pretrained(folder).encode(TEXTS) for folder in (full, cached))
    assert abs(expected - actual).max() < 1e-3


def test_a_gguf_decoder(run, gguf_dir, capsys):
    run("--decoder", gguf_dir, "--decoder_gguf_file", "tiny.gguf", "--dry_run")
    assert "<|im_start|>user" in capsys.readouterr().out  # of the tokenizer in the file


def test_dev_scores_choose_the_step(run):
    folder = run(
        "--dev_rows", 10, "--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "true",
        "--metric_for_best_model", "score", "--train_decoder", "full", "--report_to", "tensorboard",
    )  # fmt: skip
    scores = {entry["step"]: entry["eval_score"] for entry in facts(folder.parent)["log"] if "eval_score" in entry}
    assert sorted(scores) == [2, 4]
    assert facts(folder.parent)["best_step"] == max(scores, key=scores.get)
    assert (folder.parent / "training.png").stat().st_size > 1000
    assert list(folder.parent.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--model", "x"), "either --model"),
        (("--dtype", "bfloat16"), "--bf16 true"),
        (("--base_id", "runs/x/base"), "--base_id must be a Hub id"),
        (("--attn_implementation", "flash_attention_2"), "GPU"),
        (("--baseline", "last_token", "--train_encoder", "lora"), "'last_token' has no encoder"),
        (("--baseline", "last_token", "--pooling", "average"), "`pooling` must be 'concat'"),
    ],
)
def test_arguments_that_cannot_work(run, flags, told):
    with pytest.raises(ValueError, match=told):
        run(*flags)


def test_deepspeed_is_refused(run, monkeypatch):
    parse = train.parse

    def with_deepspeed(argv):
        arguments = parse(argv)
        arguments[2].deepspeed_plugin = object()
        return arguments

    monkeypatch.setattr(train, "parse", with_deepspeed)
    with pytest.raises(ValueError, match="DeepSpeed.*FSDP"):
        run()


@pytest.mark.parametrize(
    "flags",
    [
        ("--pooling", "average", "--matryoshka_dims", 7),
        ("--pooling", "eos_encoder", "--contextual_position", "before_instruction"),
        ("--num_contextual_tokens", 2, "--train_encoder", "lora"),
        ("--bidirectional", "--pooling", "eos", "--gradient_checkpointing", "true"),
        ("--baseline", "last_token", "--contextual_token_norm", 1.0),
        ("--baseline", "embedding_concat", "--train_encoder", "lora", "--matryoshka_dims", 20),
        ("--baseline", "token_prepending", "--gradcache", "--gradient_accumulation_steps", 2),
        ("--baseline", "token_prepending", "--train_decoder", "full", "--gradient_checkpointing", "true"),
    ],
    ids=lambda flags: " ".join(map(str, flags[:2])),
)
def test_variants_train_like_the_default(run, tmp_path, flags):
    from peft import PeftModel

    folder = run("--max_steps", 2, "--max_examples", 2, "--dev_rows", 10, "--eval_strategy", "steps", *flags)
    assert len(losses(folder.parent)) == 2
    trained = Causal2VecModel.from_pretrained(folder)
    has_both_states = trained.config.baseline is None and trained.config.pooling == "concat"
    assert all(bool(logged(folder.parent, f"eval_{state}")) == has_both_states for state in ("contextual", "eos"))
    for name, value in zip(flags, flags[1:]):
        if hasattr(trained.config, str(name)[2:]):
            assert getattr(trained.config, name[2:]) == (True if name == "--bidirectional" else value)
    after = trained.encode(TEXTS, instruction="find")
    if "full" not in flags:
        base = Causal2VecModel.from_pretrained(tmp_path / "run" / "base")
        assert abs(base.encode(TEXTS, instruction="find") - after).max() > 1e-3
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
        assert abs(adapted.encode(TEXTS, instruction="find") - after).max() < 1e-5
        alone = AutoModel.from_pretrained(tmp_path / "run" / "adapter", trust_remote_code=True)
        assert alone.config.baseline == trained.config.baseline
        assert abs(alone.encode(TEXTS, instruction="find") - after).max() < 1e-5
    parameters = facts(folder)["plan"]["parameters"]
    assert all(count > 0 for count in parameters.values())
    assert ("encoder" in parameters) == trained.config.has_encoder
    card = (folder / "README.md").read_text()
    assert f"{trained.config.embedding_size} numbers" in card and ("a baseline" in card) == ("--baseline" in flags)
    assert ("encoder: " in card) == trained.config.has_encoder
