"""scripts/ablation.py: what is run, what is kept, what the tables say; on tiny backbones and packs."""

import json

import pytest
from conftest import ROOT, write_rows
from eval_packs import retrieval_configs, write_pack, write_sts

import train
from scripts import ablation
from training.arguments import ModelArguments
from training.model import choose_parameters, load_model


pytest.importorskip("mteb")
pytestmark = pytest.mark.usefixtures("offline")

SHORT = ("components", "pooling", "embedder", "icl")


@pytest.fixture(scope="module")
def study(backbone_dir, tmp_path_factory):
    """Returns a function that runs the script on tiny backbones with further flags."""
    folder = tmp_path_factory.mktemp("ablation")
    rows = [
        {"query": f"question {i}", "positive": f"the answer to {i} is {i * 7}", "negatives": [f"no answer {i}"]}
        for i in range(30)
    ]
    write_rows(folder / "rows.jsonl", rows)
    (folder / "data.json").write_text(json.dumps([{"name": "one", "path": "rows.jsonl", "instructions": ["answer"]}]))
    recipe = {
        "encoder": backbone_dir("bert"),
        "decoder": backbone_dir("llama"),
        "data_file": str(folder / "data.json"),
        "data_dir": "nowhere",
        "learning_rate": 1e-2,
        "train_decoder": "full",
        "matryoshka_dims": [32],
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    write_sts(folder / "packs" / "STS16", seed=1)
    write_pack(folder / "packs" / "SciFact", retrieval_configs(2))
    (folder / "icl").mkdir()
    (folder / "icl" / "STS16.json").write_text(json.dumps([{"query": "a cat", "response": "a small cat"}]))

    def run(*flags):
        ablation.main(
            ["--recipe", str(folder / "recipe.json"), "--train_dir", str(folder), "--data_dir", str(folder / "packs")]
            + ["--tasks", "STS16", "SciFact", "--max_steps", "2", "--batch_size", "4", "--work", str(folder / "work")]
            + ["--output", str(folder / "results"), "--icl", str(folder / "icl"), *map(str, flags)]
        )
        return folder / "results"

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def results(study):
    """A few studies: one of them with two seeds."""
    study("--study", *SHORT, "--seeds", 1)
    return study("--study", "components", "--seeds", 2)


def record(results, variant: str, seed: int = 42) -> dict:
    return json.loads((results / "runs" / f"{variant}.{seed}.json").read_text())


def test_each_run_leaves_a_file(results):
    found = {path.stem for path in (results / "runs").glob("*.json")}
    variants = {row.variant for name in SHORT for row in ablation.STUDIES[name][1]}
    both = {"last_token", "eos", "default"}
    assert found == {f"{v}.42" for v in variants} | {f"{v}.43" for v in both}
    one, other = record(results, "default"), record(results, "default", 43)
    assert one["scores"].keys() == {"STS16", "SciFact"} and one["scores"] != other["scores"]
    assert one["scores"] != record(results, "average")["scores"]
    assert one["train"]["steps"] == 2 and len(one["train"]["losses"]) == 2
    assert one["train"]["plan"]["global_batch_size"] == 4
    assert "encoder" not in record(results, "last_token")["train"]["plan"]["parameters"]
    assert set(record(results, "icl")["scores"]) == {"STS16"}  # there are no examples for the other
    assert one["noisy"].keys() == one["scores"].keys() and record(results, "eos")["noisy"] is None
    text = "".join(path.read_text() for path in results.rglob("*.json"))
    assert str(ROOT) not in text and "/tmp" not in text


def test_what_starts_from_another_variant(study, results):
    """Its first loss is that of a trained decoder, and the model it starts from is kept until then."""
    assert {path.name for path in (study.folder / "work" / "models").iterdir()} == {"last_token.42", "last_token.43"}
    before, on = (record(results, name)["train"]["losses"] for name in ("last_token", "last_token_on"))
    assert on[0] != before[0]
    joined = record(results, "causal2vec_on")["train"]
    assert "encoder" in joined["plan"]["parameters"]
    assert joined["losses"][0] != record(results, "default")["train"]["losses"][0]


def test_a_finished_run_is_not_run_again(study, results, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError("trains again")

    monkeypatch.setattr(train, "main", refuse)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    study("--study", "components", "--seeds", 2)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before
    study("--study", "components", "tokens", "--seeds", 2, "--dry_run")
    told = capsys.readouterr().out
    assert told.startswith("6 runs to do") and "tokens_8, seed 43" in told
    # A study goes on without its recipe, by what its folder tells.
    study("--recipe", results / "settings.json", "--study", "components", "--seeds", 2)


def test_redraw(study, results):
    before = {name: (results / name).read_bytes() for name in ("ablation.md", "ablation.png")}
    for name in before:
        (results / name).unlink()
    ablation.main(["--redraw", "--output", str(results)])
    assert (results / "ablation.md").read_bytes() == before["ablation.md"]
    assert (results / "ablation.png").stat().st_size > 10_000


def test_tables(results):
    text = (results / "ablation.md").read_text()
    one, two = (
        {seed: sum(record(results, name, seed)["scores"].values()) / 2 for seed in (42, 43)}
        for name in ("last_token", "eos")
    )
    row = next(line for line in text.splitlines() if line.startswith("| with Contextual token |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    mean, spread = (one[42] + one[43]) / 2, abs(two[42] - two[43]) / 2**0.5
    assert cells[1] == f"{(two[42] + two[43]) / 2:.2f} ± {spread:.2f}" and cells[2] == "2"
    assert cells[3].startswith(f"{(two[42] + two[43]) / 2 - mean:+.2f} ± ")
    assert cells[4:] == ["62.19", "+0.38", "65.44", "+0.60"]  # the paper's
    assert "not run" in text and all(f"## {title}" in text for title, _ in ablation.STUDIES.values())


def test_another_budget_needs_another_folder(study, results):
    with pytest.raises(ValueError, match="another recipe.*--output"):
        study("--study", "components", "--max_steps", 3)
    with pytest.raises(ValueError, match="work.*another recipe"):
        study("--study", "components", "--max_steps", 3, "--output", study.folder / "elsewhere")
    assert not (study.folder / "elsewhere").exists()
    with pytest.raises(ValueError, match="another tasks"):
        study("--study", "components", "--tasks", "STS16")


def test_a_failed_task_leaves_no_run(study, results, monkeypatch):
    monkeypatch.setattr(ablation, "run", lambda *args: ["STS16"])
    with pytest.raises(RuntimeError, match="tokens_2, seed 42: STS16 failed"):
        study("--study", "tokens", "--seeds", 1)
    assert not (results / "runs" / "tokens_2.42.json").exists()
    assert (study.folder / "work" / "models" / "tokens_2.42").exists()  # scored without training when run again


def test_every_variant_is_a_model_that_trains(backbone_dir):
    """The flags of each are arguments of train.py and make the model that they name."""
    for name, flags in ablation.VARIANTS.items():
        if name in ablation.GO_ON or name in ablation.JOIN:
            continue
        values = {"encoder": backbone_dir("bert"), "decoder": backbone_dir("llama"), "lora_r": 2, **flags}
        values = {name: value for name, value in values.items() if value is not None}
        assert set(values) <= set(ModelArguments.__dataclass_fields__) | {"max_examples"}
        values.pop("max_examples", None)
        args = ModelArguments(**values)
        assert choose_parameters(load_model(args), args) is not None
    rows = [row for _, rows in ablation.STUDIES.values() for row in rows]
    assert {row.variant for row in rows if not row.variant.startswith(ablation.ENCODER)} == set(ablation.VARIANTS)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--study", "nonsense"], "invalid choice"),
        (["--seeds", "0"], "at least 1"),
        ([], "needs --data_dir"),
        (["--data_dir", "x", "--encoders", "gte"], "NAME=FOLDER"),
    ],
)
def test_arguments_that_cannot_work(flags, told, capsys):
    with pytest.raises(SystemExit):
        ablation.parse_args(flags)
    assert told in capsys.readouterr().err


def test_a_recipe_that_joins_no_backbones(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "runs/words/model"}))
    args = ablation.parse_args(["--recipe", str(tmp_path / "recipe.json"), "--data_dir", "x"])
    with pytest.raises(ValueError, match=r"\['model'\]"):
        ablation.base_recipe(args)
