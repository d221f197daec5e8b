"""training/arguments.py: recipes and flags, and what they cannot hold."""

import json

import pytest
import torch
from conftest import ROOT

import train


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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.json")), ids=lambda path: path.stem)
def test_recipes_parse(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, data, args = train.parse([str(path), "--bf16", "false", "--use_cpu", "true"])
    assert (model.encoder and model.decoder) or model.model
    assert (ROOT / data.data_file).exists()
    if not path.stem.endswith("-cpu"):  # what two cores can do is not the paper's
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
