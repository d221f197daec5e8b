"""PEFT adapters: alone, beside their base's weights or another's, moved, saved over and without a base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFUSED, SHARD, TEXTS, same, weights_in
from transformers import AutoModel

import saving_utils
from evaluation.identity import folder_identity
from modeling_causal2vec import Causal2VecModel


peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(saved_dir, tmp_path):
    """Returns a function that loads a base with an adapter of random weights on it."""

    def load(base, seed: int = 0):
        model = Causal2VecModel.from_pretrained(base)
        plain = model.encode(TEXTS)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=r"decoder\..*(q_proj|v_proj)", init_lora_weights=False))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        assert np.abs(model.eval().encode(TEXTS) - plain).max() > 1e-3
        return model

    return load


@pytest.fixture
def moved(adapted, saved_dir, tmp_path) -> Path:
    """A folder of a base and an adapter that names it relatively, not where it was made."""
    shutil.copytree(saved_dir, tmp_path / "made" / "base")
    adapted(tmp_path / "made" / "base").save_pretrained(tmp_path / "made" / "adapter")
    (tmp_path / "made").rename(tmp_path / "moved")
    return tmp_path / "moved"


def set_base(folder: Path, base) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


class TestAdapters:
    def test_alone_from_anywhere(self, moved, adapted, tmp_path, monkeypatch):
        """The base is found from the adapter's own folder, whatever the working directory is."""
        assert json.loads((moved / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
        assert weights_in(moved / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
        monkeypatch.chdir(tmp_path)
        expected = adapted(moved / "base")
        for model in (
            Causal2VecModel.from_pretrained(moved / "adapter"),
            Causal2VecModel.from_pretrained("moved/adapter"),
            AutoModel.from_pretrained(moved / "adapter", trust_remote_code=True, attn_implementation="eager"),
        ):
            assert same(model, expected)
        assert model.decoder.config._attn_implementation == "eager"
        model.save_pretrained(tmp_path / "saved" / "again")
        assert same(Causal2VecModel.from_pretrained(tmp_path / "saved" / "again"), expected)
        # The adapter of a base that carries an adapter of its own is put on the base alone.
        adapted(moved / "base", seed=1).save_pretrained(moved / "base")
        assert same(Causal2VecModel.from_pretrained(moved / "adapter"), expected)

    def test_a_base_given_as_before(self, moved, adapted, tmp_path, monkeypatch):
        expected = adapted(moved / "base")
        set_base(moved / "adapter", str(moved / "base"))
        assert same(Causal2VecModel.from_pretrained(moved / "adapter"), expected)
        monkeypatch.chdir(tmp_path)
        set_base(moved / "adapter", "moved/base")
        assert same(Causal2VecModel.from_pretrained(moved / "adapter"), expected)

    @pytest.mark.parametrize(
        "base, told", [(None, "None"), ("", "''"), ("../gone", "../gone"), (".", "."), ("x/y", "x/y")]
    )
    def test_a_base_that_cannot_be_found(self, moved, base, told):
        set_base(moved / "adapter", base)
        with pytest.raises(REFUSED, match="adapter") as error:
            Causal2VecModel.from_pretrained(moved / "adapter")
        assert "base" in str(error.value) and told in str(error.value)

    @pytest.mark.parametrize("auto", [False, True], ids=["ours", "AutoModel"])
    def test_in_its_bases_own_folder(self, adapted, saved_dir, tmp_path, auto, monkeypatch):
        def load(folder):
            return (
                AutoModel.from_pretrained(folder, trust_remote_code=True)
                if auto
                else Causal2VecModel.from_pretrained(folder)
            )

        folder = shutil.copytree(saved_dir, tmp_path / "base")
        config = (folder / "config.json").read_bytes()
        model = adapted(folder)
        model.save_pretrained(folder)
        assert (folder / "config.json").read_bytes() == config
        assert weights_in(folder) == {"model.safetensors", "adapter_config.json", "adapter_model.safetensors"}
        assert same(load(folder), model)
        again = folder.rename(tmp_path / "renamed")
        assert same(load(again), model)
        monkeypatch.chdir(tmp_path)
        set_base(again, "renamed")  # as older versions wrote it
        assert same(load("renamed"), model)

    def test_the_base_is_part_of_its_identity(self, moved, other_model):
        before = folder_identity(moved / "adapter", True)
        other_model.save_pretrained(moved / "base")
        assert folder_identity(moved / "adapter", True) != before

    def test_weights_win_over_the_adapter_of_another(self, moved, other_model, caplog):
        other_model.save_pretrained(moved / "other")
        for name in saving_utils.ADAPTER_FILES:
            shutil.copy(moved / "adapter" / name, moved / "other")
        for load in (Causal2VecModel.from_pretrained, lambda f: AutoModel.from_pretrained(f, trust_remote_code=True)):
            caplog.clear()
            assert same(load(moved / "other"), other_model)
            assert "../base" in caplog.text and "ignored" in caplog.text

    def test_a_full_save_takes_an_old_adapter_away(self, moved, other_model):
        (moved / "adapter" / "notes.txt").write_text("mine")
        other_model.save_pretrained(moved / "adapter", max_shard_size=SHARD)
        assert not weights_in(moved / "adapter") & set(saving_utils.ADAPTER_FILES)
        assert same(Causal2VecModel.from_pretrained(moved / "adapter"), other_model)
        assert (moved / "adapter" / "notes.txt").exists()

    def test_an_adapter_is_not_saved_where_it_would_be_ignored(self, moved, adapted, other_model):
        other_model.save_pretrained(moved / "other")
        before = weights_in(moved / "other")
        with pytest.raises(ValueError, match="folder of its own"):
            adapted(moved / "base").save_pretrained(moved / "other")
        assert weights_in(moved / "other") == before
