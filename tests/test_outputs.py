"""training/outputs.py: the plan, and what a run leaves."""

import json

import pytest
from conftest import facts


def test_dry_run_prints_the_plan_and_a_batch_and_trains_nothing(run, capsys, tmp_path):
    run("--dry_run", "--attn_implementation", "flash_attention_2")  # a plan needs no GPU
    printed = capsys.readouterr().out
    plan = json.loads(printed[: printed.index("\n}\n") + 2])
    assert [d["name"] for d in plan["datasets"]] == ["one", "two"]
    assert plan["steps"] == 4 and plan["trainable_parameters"]["encoder"] == 0
    assert plan["trainable_parameters"]["decoder"] > 0 and plan["estimated_decoder_tokens"] > 0
    assert "<|contextual|>" in printed and "question" in printed
    assert not (tmp_path / "run").exists()


def test_a_run_too_short_for_a_log_entry_is_saved_all_the_same(run):
    folder = run("--max_steps", 1, "--logging_steps", 10)
    assert (folder / "model.safetensors").exists() and (folder / "training.png").exists()


@pytest.mark.parametrize("flags", [(), (32,)])
def test_the_card_says_which_sizes_were_trained(run, flags):
    folder = run("--max_steps", 1, *(("--matryoshka_dims", *flags) if flags else ()))
    assert facts(folder)["arguments"]["matryoshka_dims"] == (list(flags) or None)
    assert ("32 numbers" in (folder / "README.md").read_text()) == bool(flags)
