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
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.trainer_utils import seed_worker

import train
from modeling_causal2vec import Causal2VecModel
from training.arguments import ModelArguments
from training.model import choose_parameters, load_model, name_of_base
from training.trainer import COMPLETE, NonFiniteLoss, last_complete_checkpoint


ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a text about cats", "another text", "how do dogs sleep"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, negatives in (("one", 2), ("two", 0)):
        rows = [
            {
                "query": f"{name} question {i}",
                "positive": f"the answer to {name} {i} is {i * 7}",
                "negatives": [f"a wrong answer {name} {i} {j}" for j in range(negatives)],
            }
            for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [
        {"name": "one", "path": "one.jsonl", "instructions": ["answer the question"]},
        {"name": "two", "path": "two.jsonl", "instructions": ["find similar", "find"], "symmetric": ["find similar"]},
    ]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def run(data_dir, backbone_dir, tmp_path):
    """Returns a function that runs train.py with small defaults and the given flags."""

    def run(*flags, output_dir=None):
        defaults = {
            "encoder": backbone_dir("bert"),
            "decoder": backbone_dir("llama"),
            "output_dir": str(output_dir or tmp_path / "run"),
            "data_file": str(data_dir / "data.json"),
            "data_dir": str(data_dir),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "warmup_steps": 1,
            "learning_rate": 1e-2,
            "lora_r": 4,
            "lora_alpha": 8,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps(defaults))
        return train.main([str(recipe), *map(str, flags)])

    return run


def given(folder) -> dict:
    return json.loads((folder / "training.json").read_text())["arguments"]


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["log"] if "loss" in entry]


def dev_scores(folder):
    return [
        entry["eval_score"]
        for entry in json.loads((folder / "training.json").read_text())["log"]
        if "eval_score" in entry
    ]


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
    assert "an adapter alone" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "an adapter alone" not in (folder / "README.md").read_text()
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for part in ("encoder.", "decoder.", "projector."):
        assert any(part in name for name in tensors), part
    # What the file lacks would stay as it was drawn; transformers 5.17 loses the projector of a whole file so.
    rest = {name: tensor for name, tensor in tensors.items() if "projector." not in name}
    save_file(rest, tmp_path / "run" / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights unset.*projector"):
        AutoModel.from_pretrained(tmp_path / "run" / "adapter", trust_remote_code=True)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_every_trained_tensor_is_in_every_checkpoint(run, tmp_path, how):
    seen = {}

    class Spy(train.Causal2VecTrainer):
        def _save_checkpoint(self, model, trial):
            seen[self.state.global_step] = {
                name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
            }
            super()._save_checkpoint(model, trial)

    original, train.Causal2VecTrainer = train.Causal2VecTrainer, Spy
    try:
        run("--train_decoder", how, "--save_total_limit", 5)
    finally:
        train.Causal2VecTrainer = original
    assert sorted(seen) == [2, 4]
    for step, trained in seen.items():
        folder = tmp_path / "run" / f"checkpoint-{step}"
        name = "adapter_model.safetensors" if how == "lora" else "model.safetensors"
        saved = load_file(folder / name)
        assert trained
        for key, value in trained.items():
            key = key.replace(".default", "").replace(".modules_to_save", "")
            assert torch.equal(saved[key], value), key


def test_lora_stays_in_its_tower(make_model):
    args = ModelArguments(encoder="e", decoder="d", train_decoder="lora", train_encoder="frozen", lora_r=2)
    model = choose_parameters(make_model(), args)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    lora = [name for name in trained if "lora_" in name]
    assert lora and all(".decoder." in name for name in lora)
    assert {name.split(".")[-4] for name in lora} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert [name for name in trained if "projector" in name and "lora" not in name]
    assert not any("encoder" in name for name in trained)


def test_lora_on_both_towers(make_model):
    args = ModelArguments(train_decoder="lora", train_encoder="lora", lora_r=2)
    model = choose_parameters(make_model(), args)
    lora = [name for name, p in model.named_parameters() if "lora_" in name]
    assert any(".encoder." in name for name in lora) and any(".decoder." in name for name in lora)
    assert not any("projector" in name for name in lora)


@pytest.mark.parametrize("towers", [{"train_decoder": "lorra"}, {"train_decoder": "full", "train_encoder": "Lora"}])
def test_no_tower_is_trained_in_a_way_that_there_is_none_of(make_model, towers):
    with pytest.raises(ValueError, match="must be one of .*lora.*full.*frozen"):
        choose_parameters(make_model(), ModelArguments(**towers))


@pytest.mark.parametrize(
    "flags, named",
    [
        ({}, "../base"),
        ({"model": "models/mine"}, "../../models/mine"),
        ({"model": "user/model"}, "user/model"),
        ({"base_id": "user/base"}, "user/base"),
        ({"model": "models/mine", "base_id": "user/base"}, "user/base"),
    ],
)
def test_how_an_adapter_names_its_base(tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/mine", "run/base"):
        Path(folder).mkdir(parents=True)
    assert name_of_base(ModelArguments(**flags), Path("run/adapter")) == named


def test_mixing_lora_and_full_is_refused(make_model):
    with pytest.raises(ValueError, match="cannot be combined"):
        choose_parameters(make_model(), ModelArguments(train_decoder="lora", train_encoder="full"))


@pytest.mark.parametrize("how", ["lora", "full"])
def test_what_is_trained_is_fp32_under_bf16(make_model, how):
    args = ModelArguments(train_decoder=how, train_encoder="frozen", lora_r=2)
    model = choose_parameters(make_model(dtype="bfloat16"), args)
    dtypes = {p.requires_grad: set() for p in model.parameters()}
    for p in model.parameters():
        dtypes[p.requires_grad].add(p.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


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
    expected, actual = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
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
    expected, actual = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


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
        assert dev_scores(tmp_path / way) == pytest.approx(dev_scores(alone), abs=1e-6)
        assert len(dev_scores(alone)) == 2 * way.startswith("fsdp")
        expected, actual = (Causal2VecModel.from_pretrained(f / "model").encode(TEXTS) for f in (alone, tmp_path / way))
        assert abs(expected - actual).max() < 1e-3


@pytest.mark.parametrize("left", ["model", "adapter", "checkpoint-2"])
def test_what_another_run_left_is_not_overwritten(run, tmp_path, monkeypatch, left):
    monkeypatch.setattr(train, "load_data", lambda *args: pytest.fail("it went on"))
    (tmp_path / "run" / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"holds {left} of another run.*--resume"):
        run()


def test_only_complete_checkpoints_count(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-10")


def test_gradcache_run_equals_the_full_batch(run, tmp_path):
    full = run("--per_device_train_batch_size", 8, output_dir=tmp_path / "full")
    flags = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    cached = run(*flags, "--gradcache", output_dir=tmp_path / "cached")
    accumulated = run(*flags, output_dir=tmp_path / "accumulated")
    assert losses(cached.parent) == pytest.approx(losses(full.parent), abs=1e-3)
    assert losses(accumulated.parent)[0] < losses(full.parent)[0]  # fewer negatives
    # The facts hold the run as it was asked for, so that it can be asked for again.
    assert given(cached)["gradient_accumulation_steps"] == 4 and given(cached)["gradcache"]
    again = tmp_path / "again.json"
    again.write_text(json.dumps(given(cached)))
    model, data, args = train.parse([str(again)])
    assert {**asdict(model), **asdict(data), **args.to_dict()} == given(cached)
    expected, actual = (Causal2VecModel.from_pretrained(folder).encode(TEXTS) for folder in (full, cached))
    assert abs(expected - actual).max() < 1e-3


def test_the_scheduler_has_a_horizon_of_its_own(run):
    folder = run("--max_steps", 4, "--scheduler_steps", 8, "--warmup_steps", 2, "--learning_rate", 1e-3)
    rates = [
        e["learning_rate"] for e in json.loads((folder.parent / "training.json").read_text())["log"] if "loss" in e
    ]
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


def test_dry_run_prints_the_plan_and_a_batch_and_trains_nothing(run, capsys, tmp_path):
    run("--dry_run", "--attn_implementation", "flash_attention_2")  # a plan needs no GPU
    printed = capsys.readouterr().out
    plan = json.loads(printed[: printed.index("\n}\n") + 2])
    assert [d["name"] for d in plan["datasets"]] == ["one", "two"]
    assert plan["steps"] == 4 and plan["trainable_parameters"]["encoder"] == 0
    assert plan["trainable_parameters"]["decoder"] > 0 and plan["estimated_decoder_tokens"] > 0
    assert "<|contextual|>" in printed and "question" in printed
    assert not (tmp_path / "run").exists()


def test_a_gguf_decoder(run, gguf_dir, capsys, tmp_path):
    run("--decoder", gguf_dir, "--decoder_gguf_file", "tiny.gguf", "--dry_run")
    assert "<|im_start|>user" in capsys.readouterr().out  # of the tokenizer in the file
    with pytest.raises(ValueError, match="leave out --decoder_gguf_file"):
        load_model(ModelArguments(model=str(tmp_path), decoder_gguf_file="tiny.gguf"))


def test_dev_scores_choose_the_step(run):
    folder = run(
        "--dev_rows", 10, "--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "true",
        "--metric_for_best_model", "score", "--train_decoder", "full", "--report_to", "tensorboard",
    )  # fmt: skip
    facts = json.loads((folder.parent / "training.json").read_text())
    scores = {entry["step"]: entry["eval_score"] for entry in facts["log"] if "eval_score" in entry}
    assert sorted(scores) == [2, 4]
    assert facts["best_step"] == max(scores, key=scores.get)
    assert (folder.parent / "training.png").stat().st_size > 1000
    assert list(folder.parent.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "flags, told", [((), "shorter vectors were not trained for"), ((32,), "trained for 32 numbers")]
)
def test_the_card_says_which_sizes_were_trained(run, flags, told):
    folder = run("--max_steps", 1, *(("--matryoshka_dims", *flags) if flags else ()))
    assert json.loads((folder / "training.json").read_text())["arguments"]["matryoshka_dims"] == (list(flags) or None)
    assert told in (folder / "README.md").read_text()


def test_a_run_too_short_for_a_log_entry_is_saved_all_the_same(run):
    folder = run("--max_steps", 1, "--logging_steps", 10)
    assert (folder / "model.safetensors").exists() and (folder / "training.png").exists()


def test_arguments_that_cannot_work(run, tmp_path):
    with pytest.raises(ValueError, match="Give either --model"):
        run("--model", "x")
    for changed in ({"query_instruction": "find"}, {"max_seq_length": 64}, {"text_prefix": "> "}, {"pooling": "eos"}):
        with pytest.raises(ValueError, match=f"stays as it is; leave out --{[*changed][0]}"):
            load_model(ModelArguments(model="x", **changed))
    with pytest.raises(ValueError, match="Give either --model"):
        load_model(ModelArguments(model="x", encoder="y"))
    for flags, told in (
        (("--dtype", "bfloat16"), "--dtype bfloat16 needs --bf16 true"),
        (("--base_id", "runs/x/base"), "--base_id must be a Hub id"),
        (("--attn_implementation", "flash_attention_2"), "needs a GPU"),
    ):
        with pytest.raises(ValueError, match=told):
            run(*flags)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rat": 1},
        {"train_decoder": "lorra"},
        {"dtype": "float17"},
        {"eval_strategy": "sometimes"},
        {"lr_scheduler_type": "straight"},
        {"max_steps": "ten"},
        {"max_steps": 2.5},
        {"max_steps": None},
        {"learning_rate": [1e-4]},
        {"gradcache": "perhaps"},
        {"matryoshka_dims": ["many"]},
        {"encoder": {"name": "e"}},
    ],
    ids=str,
)
def test_a_recipe_is_checked_as_flags_are(tmp_path, values):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"output_dir": "x", **values}))
    with pytest.raises(ValueError, match=f"{recipe}.*{[*values][0]}"):
        train.parse([str(recipe)])


@pytest.mark.parametrize("content, told", [('{\n "seed": 1,\n}', "line 3: .*column"), ("[]", "an object")])
def test_a_recipe_that_is_none_is_named(tmp_path, content, told):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=f"{recipe}.*{told}"):
        train.parse([str(recipe)])


def test_what_a_recipe_can_hold(tmp_path):
    values = {
        "encoder": "e", "template_prefix": "--x\n", "text_prefix": "", "datasets": ["--seed", "5"], "seed": "7",
        "matryoshka_dims": [16, 8], "learning_rate": 1e-5, "gradcache": True, "use_cpu": True,
        "save_total_limit": None, "lr_scheduler_kwargs": {"a": 1}, "report_to": ["none"], "lr_scheduler_type": "cosine",
    }  # fmt: skip
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(values), encoding="utf-8-sig")
    model, data, args = train.parse([str(recipe), "--encoder", "from_a_flag", "--use_cpu", "true"])
    found = {**vars(args), **vars(data), **vars(model)}
    expected = {**values, "encoder": "from_a_flag", "seed": 7, "report_to": []}
    assert {name: found[name] for name in values} == expected


def test_deepspeed_is_refused(run, monkeypatch):
    parse = train.parse

    def with_deepspeed(argv):
        arguments = parse(argv)
        arguments[2].deepspeed_plugin = object()
        return arguments

    monkeypatch.setattr(train, "parse", with_deepspeed)
    with pytest.raises(ValueError, match="DeepSpeed.*FSDP"):
        run()


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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.json")), ids=lambda path: path.stem)
def test_recipes_parse(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, data, args = train.parse([str(path), "--bf16", "false", "--use_cpu", "true"])
    assert (model.encoder and model.decoder) or model.model
    assert (ROOT / data.data_file).exists()
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 512
    assert args.scheduler_steps == 2 * args.max_steps


@pytest.mark.parametrize(
    "name, steps, batch, alpha, encoder",
    [
        ("s-llama-1.3b", 2000, 128, 128, "lora"),
        ("qwen2.5-1.5b", 2000, 128, 128, "lora"),
        ("llama-2-7b", 1000, 64, 32, "frozen"),
        ("mistral-7b", 1000, 64, 32, "frozen"),
    ],
)
def test_the_papers_recipes(name, steps, batch, alpha, encoder):
    recipe = json.loads((ROOT / "recipes" / f"{name}.json").read_text())
    expected = {
        "max_steps": steps, "per_device_train_batch_size": batch, "lora_alpha": alpha, "train_encoder": encoder,
        "lora_r": 64, "learning_rate": 1e-4, "warmup_steps": 300, "temperature": 0.05, "train_decoder": "lora",
        "bf16": True, "gradient_checkpointing": True, "attn_implementation": "flash_attention_2",
        "max_seq_length": 512, "encoder": "intfloat/e5-base-v2",
    }  # fmt: skip
    assert {key: recipe[key] for key in expected} == expected


@pytest.mark.parametrize(
    "flags",
    [
        ("--pooling", "average", "--matryoshka_dims", 7),
        ("--pooling", "eos_encoder", "--contextual_position", "before_instruction"),
        ("--num_contextual_tokens", 2, "--train_encoder", "lora"),
        ("--bidirectional", "--pooling", "eos", "--gradient_checkpointing", "true"),
        ("--baseline", "last_token"),
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
    facts = json.loads((folder / "training.json").read_text())
    assert all(count > 0 for count in facts["plan"]["parameters"].values())
    assert ("encoder" in facts["plan"]["parameters"]) == trained.config.has_encoder
    card = (folder / "README.md").read_text()
    assert f"{trained.config.embedding_size} numbers" in card and ("a baseline" in card) == ("--baseline" in flags)
    assert ("encoder: " in card) == trained.config.has_encoder


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


def test_variants_that_cannot_be_trained(run, saved_dir, backbone_dir):
    with pytest.raises(ValueError, match="'last_token' has no encoder"):
        run("--baseline", "last_token", "--train_encoder", "lora")
    args = ModelArguments(model=str(saved_dir), pooling="eos", bidirectional=True)
    with pytest.raises(ValueError, match="leave out --pooling --bidirectional"):
        load_model(args)
    with pytest.raises(ValueError, match="`pooling` must be 'concat' for the baseline"):
        run("--baseline", "last_token", "--pooling", "average")


def test_going_on_from_a_baseline(run, make_model, tmp_path):
    make_model(baseline="token_prepending").save_pretrained(tmp_path / "start")
    args = ModelArguments(model=str(tmp_path / "start"))
    assert load_model(args).config.baseline == "token_prepending"
