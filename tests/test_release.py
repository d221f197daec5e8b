"""scripts/release.py on the tiny model: what the repository's root holds afterwards, and when it fails."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TEXTS, read_weights

import saving_utils
from modeling_causal2vec import Causal2VecModel
from saving_utils import code_table
from scripts.release import release


@pytest.fixture
def root(make_model, tmp_path):
    """What stands for the repository: an older checkpoint in one file, with a card and instructions of its own."""
    root = tmp_path / "root"
    make_model(projector_hidden_size=8).save_pretrained(root)
    card = "the card\n" + "\n".join(f"| `{name}` | `{'0' * 64}` |" for name in saving_utils.SHIPPED_CODE)
    (root / "README.md").write_text(card)
    (root / "instructions.json").write_text('{"Task": "ours"}')
    return root


def test_what_is_released(root, saved_dir, tiny_model, tmp_path):
    trained = shutil.copytree(saved_dir, tmp_path / "trained")
    (trained / "training.json").write_text('{"steps": 1}')
    release(trained, root, max_shard_size="30KB")
    assert (root / "training.json").read_text() == '{"steps": 1}'
    assert len(list(root.glob("model-*.safetensors"))) > 1 and not (root / "model.safetensors").exists()
    assert {tensor.dtype for tensor in read_weights(root).values()} == {torch.float16}
    model = Causal2VecModel.from_pretrained(root)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0 < np.abs(model.encode(TEXTS) - tiny_model.encode(TEXTS)).max() < 1e-2
    config = json.loads((root / "config.json").read_text())
    assert {config["dtype"], config["encoder_config"]["dtype"], config["decoder_config"]["dtype"]} == {"float32"}
    assert not [path for path in root.rglob("tokenizer_config.json") if "is_local" in path.read_text()]
    assert json.loads((root / "instructions.json").read_text()) == {"Task": "ours"}
    assert (root / "README.md").read_text().startswith("the card")
    assert set(code_table(root).splitlines()[2:]) <= set((root / "README.md").read_text().splitlines())


@pytest.mark.parametrize("how", ["weights", "disk"])
def test_what_fails_leaves_the_old_checkpoint(root, saved_dir, tmp_path, monkeypatch, how):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    model_dir = saved_dir
    if how == "weights":
        model = Causal2VecModel.from_pretrained(saved_dir)
        model.projector.linear_1.weight.data[0, 0] = 1e6  # finite in float32 alone
        model_dir = tmp_path / "large"
        model.save_pretrained(model_dir)
    else:
        replace = saving_utils.os.replace

        def fail(source, target):
            if target.parent == root and "-00002-of-" in target.name:
                raise OSError("no space left")
            replace(source, target)

        monkeypatch.setattr(saving_utils.os, "replace", fail)
    with pytest.raises((ValueError, OSError), match="not finite in float16" if how == "weights" else "no space left"):
        release(model_dir, root, max_shard_size="30KB")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
