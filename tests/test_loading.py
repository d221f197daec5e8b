"""Loading and saving, beyond test_modeling.py: shards, folders saved over and cut short, configurations, one dtype."""

import copy
import json
import os
import shutil
from importlib.util import find_spec as is_available
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, incomplete, read_weights
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

import saving_utils
from benchmarks import encode
from configuration_causal2vec import Causal2VecConfig
from evaluation.identity import folder_identity, load_backend, locate
from modeling_causal2vec import Causal2VecModel
from runtime_utils import default_device
from scripts import embed
from serving.loading import load_model
from tokenization_utils import Causal2VecProcessor


SHARD = "60KB"
REFUSED = (ValueError, OSError)


def same(model, other) -> bool:
    return np.abs(model.encode(TEXTS) - other.encode(TEXTS)).max() <= 1e-6


def test_scripts_use_the_accelerator_whatever_its_kind(saved_dir, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert default_device() == load_backend(locate(str(saved_dir))).model.device == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    searched = load_model(str(saved_dir))
    assert searched.device == load_backend(locate(str(saved_dir))).model.device == torch.device("meta")
    assert encode.parse_arguments([]).device == "meta"


def weights_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*model*.s*")} | {path.name for path in folder.glob("adapter*")}


class TestShards:
    def test_they_load_everywhere(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path, max_shard_size=SHARD)
        assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2 and "model.safetensors" not in weights_in(tmp_path)
        assert same(Causal2VecModel.from_pretrained(tmp_path), tiny_model)
        assert same(AutoModel.from_pretrained(tmp_path, trust_remote_code=True), tiny_model)
        assert same(load_backend(locate(str(tmp_path))).model, tiny_model)  # as eval_mteb.py does
        (tmp_path / "texts.txt").write_text("hi\n")
        vectors = tmp_path / "vectors.npy"
        assert embed.main(["encode", str(tmp_path / "texts.txt"), "-o", str(vectors), "--model", str(tmp_path)]) == 0
        assert np.abs(np.load(vectors)[0] - tiny_model.encode("hi")).max() <= 1e-6
        if is_available("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            assert same(SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu"), tiny_model)
        weights = read_weights(tmp_path)
        assert all(torch.equal(weights[name], tensor) for name, tensor in tiny_model.state_dict().items())

    @pytest.mark.parametrize("before, after", [(None, SHARD), (SHARD, None), (SHARD, "30KB"), ("30KB", SHARD)])
    def test_old_files_never_win(self, tiny_model, other_model, tmp_path, before, after):
        """Neither a single file over shards, nor shards over others."""
        tiny_model.save_pretrained(tmp_path, max_shard_size=before or "5GB")
        old = weights_in(tmp_path)
        other_model.save_pretrained(tmp_path, max_shard_size=after or "5GB")
        index = tmp_path / "model.safetensors.index.json"
        if after:
            assert weights_in(tmp_path) == {index.name, *json.loads(index.read_text())["weight_map"].values()}
        else:
            assert weights_in(tmp_path) == {"model.safetensors"}
        assert weights_in(tmp_path) != old
        assert same(Causal2VecModel.from_pretrained(tmp_path), other_model)

    def test_two_sets_of_weights_are_refused(self, tiny_model, saved_dir, tmp_path):
        tiny_model.save_pretrained(tmp_path, max_shard_size=SHARD)
        shutil.copy(saved_dir / "model.safetensors", tmp_path)  # as an upload over an older version leaves it
        with pytest.raises(ValueError, match="does not say which are the weights"):
            Causal2VecModel.from_pretrained(tmp_path)

    def test_every_shard_is_part_of_a_folders_identity(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path, max_shard_size=SHARD)
        identities = {folder_identity(tmp_path, True)}
        for path in [*tmp_path.glob("model-0*.safetensors"), tmp_path / "model.safetensors.index.json"]:
            path.write_bytes(path.read_bytes() + b" ")
            identities.add(folder_identity(tmp_path, True))
        assert len(identities) == 1 + len(weights_in(tmp_path)) > 3

    @pytest.mark.parametrize("max_shard_size", ["5GB", SHARD])
    def test_a_checkpoint_that_is_there_in_part(self, tiny_model, tmp_path, max_shard_size):
        """Then the tests of the bundled checkpoint fail; a skip would look like success."""
        tiny_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert incomplete(tmp_path) == []
        for path in [*tmp_path.glob("*.safetensors*"), tmp_path / "tokenizer.json"]:
            content = path.read_bytes()
            path.unlink()
            assert incomplete(tmp_path), path.name
            path.write_bytes(content)

    def test_a_missing_shard(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path, max_shard_size=SHARD)
        shard = sorted(tmp_path.glob("model-0*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(REFUSED, match=shard.name):
            Causal2VecModel.from_pretrained(tmp_path)

    def test_an_interrupted_save_leaves_the_old_model(self, tiny_model, other_model, tmp_path, monkeypatch):
        tiny_model.save_pretrained(tmp_path)
        with monkeypatch.context() as patch:
            fail_at(patch, 4, for_ever=False)
            with pytest.raises(OSError, match="power cut"):
                other_model.save_pretrained(tmp_path, max_shard_size=SHARD)
        assert weights_in(tmp_path) == {"model.safetensors"}
        assert same(Causal2VecModel.from_pretrained(tmp_path), tiny_model)

    @pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
    @pytest.mark.parametrize("before", [1, 2, 3])
    def test_interrupted_at_every_move(self, tmp_path, monkeypatch, before, for_ever):
        """The old files are put back; where even that fails, there is no config.json, and nothing loads."""
        new = write_files(tmp_path / "new", shards=3, content="new")
        for position in range(1, 100):
            target = tmp_path / f"{position}"
            old = write_files(target, shards=before, content="old")
            source = shutil.copytree(tmp_path / "new", tmp_path / "source")
            with monkeypatch.context() as patch:
                fail_at(patch, position, for_ever)
                try:
                    saving_utils.move_into(source, target)
                    break
                except OSError:
                    shutil.rmtree(source)
            assert read_files(target) == old or (for_ever and not (target / "config.json").exists())
        assert read_files(target) == new and position > 6


def fail_at(patch, position: int, for_ever: bool) -> None:
    """Makes the n-th move of a file fail, and those behind it if `for_ever`."""
    replace, moves = os.replace, []

    def fail(source, target):
        moves.append(target)
        if len(moves) == position or (for_ever and len(moves) > position):
            raise OSError("power cut")
        replace(source, target)

    patch.setattr(saving_utils.os, "replace", fail)


def write_files(folder: Path, shards: int, content: str) -> dict[str, str]:
    """What looks like a model: a configuration and one file of weights, or an index and shards."""
    names = [f"model-0000{i + 1}-of-0000{shards}.safetensors" for i in range(shards)] + ["model.safetensors.index.json"]
    folder.mkdir()
    for name in ["config.json", *(["model.safetensors"] if shards == 1 else names)]:
        (folder / name).write_text(f"{content} {name}")
    return read_files(folder)


def read_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


class TestConfigurations:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_of_another_folder(self, saved_dir, tmp_path, kind, make_model):
        shutil.copytree(saved_dir, tmp_path, dirs_exist_ok=True)
        config = Causal2VecConfig.from_pretrained(tmp_path)
        config.max_seq_length = 20
        config.save_pretrained(tmp_path)
        model = Causal2VecModel.from_pretrained(saved_dir, config=kind(tmp_path))
        assert model.config.max_seq_length == model.processor.max_seq_length == 20
        with pytest.raises(ValueError, match="must hold a Causal2Vec model"):
            Causal2VecModel.from_pretrained(saved_dir, config=kind(tmp_path / "encoder_tokenizer"))

    def test_of_a_baseline(self, make_model, tmp_path):
        make_model(baseline="last_token").save_pretrained(tmp_path)
        model = Causal2VecModel.from_pretrained(tmp_path, config=str(tmp_path))
        assert model.config.baseline == "last_token"

    def test_arguments_have_the_order_of_transformers(self):
        """`model.save_pretrained(folder, True)` once pushed to the Hub."""
        from inspect import signature

        for ours, theirs in (
            (Causal2VecModel, PreTrainedModel),
            (Causal2VecConfig, PreTrainedConfig),
            (Causal2VecProcessor, Causal2VecProcessor.__base__),
        ):
            for method in ("save_pretrained", "push_to_hub"):
                mine, base = (
                    [
                        name
                        for name, p in signature(getattr(c, method)).parameters.items()
                        if p.kind == p.POSITIONAL_OR_KEYWORD
                    ]
                    for c in (ours, theirs)
                )
                assert len(mine) >= 2 and mine == base[: len(mine)]

    def test_a_state_dict_is_what_is_saved(self, tiny_model, other_model, tmp_path):
        state = other_model.state_dict()
        tiny_model.save_pretrained(tmp_path, True, state)
        assert state.keys() == other_model.state_dict().keys(), "it was emptied"
        assert same(Causal2VecModel.from_pretrained(tmp_path), other_model)

    def test_the_second_argument_pushes_nothing(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr(Causal2VecModel, "push_to_hub", lambda *args, **kwargs: pytest.fail("pushed"))
        tiny_model.save_pretrained(tmp_path, True)
        assert same(Causal2VecModel.from_pretrained(tmp_path), tiny_model)


class TestOneDtype:
    """Whatever the two backbones' own configurations say."""

    @pytest.fixture
    def config(self, tiny_model) -> Causal2VecConfig:
        config = copy.deepcopy(tiny_model.config)
        config.dtype = None
        config.encoder_config.dtype, config.decoder_config.dtype = torch.float16, torch.bfloat16
        return config

    @staticmethod
    def dtypes(model) -> set:
        return {parameter.dtype for parameter in model.parameters()}

    def test_constructor(self, config):
        assert self.dtypes(Causal2VecModel(copy.deepcopy(config))) == {torch.float32}
        for dtype in (torch.bfloat16, "bfloat16"):  # as loaded, and as left by a save
            config.dtype = dtype
            assert self.dtypes(Causal2VecModel(copy.deepcopy(config))) == {torch.bfloat16}

    def test_several_contextual_tokens(self, config):
        config.num_contextual_tokens, config.dtype = 2, torch.bfloat16
        assert self.dtypes(Causal2VecModel(config)) == {torch.bfloat16}

    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
    def test_from_config(self, config, saved_dir, dtype):
        options = {} if dtype is None else {"dtype": dtype}
        model = Causal2VecModel._from_config(copy.deepcopy(config), **options)
        assert self.dtypes(model) == {dtype or torch.float32}
        remote = AutoConfig.from_pretrained(saved_dir, trust_remote_code=True)
        remote.dtype, remote.decoder_config.dtype = None, torch.bfloat16
        assert self.dtypes(AutoModel.from_config(remote, trust_remote_code=True, **options)) == {dtype or torch.float32}

    @pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float32])
    @pytest.mark.parametrize("told", [None, "float16"])
    def test_from_pretrained(self, saved_dir, tmp_path, dtype, told):
        shutil.copytree(saved_dir, tmp_path, dirs_exist_ok=True)
        values = json.loads((tmp_path / "config.json").read_text())
        values["decoder_config"]["dtype"] = "bfloat16"
        values["dtype"] = told
        (tmp_path / "config.json").write_text(json.dumps(values))
        model = Causal2VecModel.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert self.dtypes(model) == {expected or (torch.float32 if told is None else torch.float16)}
        assert model.config.dtype == model.config.decoder_config.dtype == model.dtype

    @pytest.mark.parametrize("dtype", [None, "float32", torch.float16])
    def test_joining(self, make_model, backbone_dir, tmp_path, dtype):
        AutoModel.from_pretrained(backbone_dir("llama"), dtype="bfloat16").save_pretrained(tmp_path)
        for file in Path(backbone_dir("llama")).glob("token*"):
            shutil.copy(file, tmp_path)
        model = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path), dtype=dtype)
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert self.dtypes(model) == {expected or torch.bfloat16}

    def test_one_per_tower_is_refused(self, saved_dir):
        with pytest.raises(ValueError, match="one for the whole model"):
            Causal2VecModel.from_pretrained(saved_dir, dtype={"": "float32", "encoder_config": "bfloat16"})
