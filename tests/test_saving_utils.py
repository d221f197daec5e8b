"""saving_utils.py: files that are written whole, moved in the right order, and hashed; cards."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import SHARD, same, weights_in

import saving_utils
from modeling_causal2vec import Causal2VecModel
from saving_utils import SHIPPED_CODE, code_hashes, code_table, write_json


class TestMoves:
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

    def test_hashes_are_of_the_files(self, tmp_path):
        (tmp_path / "decoder_utils.py").write_bytes(b"abc")
        digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's example
        assert code_hashes(tmp_path) == {"decoder_utils.py": digest}


def test_plain_card_lists_the_hashes_of_the_code(saved_dir):
    table = code_table(saved_dir)
    assert table in (saved_dir / "README.md").read_text()
    assert table.count(".py") == len(SHIPPED_CODE)


def test_saving_again_brings_the_hashes_up_to_date(complete_dir, tiny_model, tmp_path):
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    card = (folder / "README.md").read_text()
    digest = re.search(r"`decoder_utils.py` \| `([0-9a-f]{64})`", card)[1]
    (folder / "README.md").write_text(card.replace(digest, "0" * 64))
    tiny_model.save_pretrained(folder)
    assert code_table(folder) in (folder / "README.md").read_text()
    assert "license: apache-2.0" in (folder / "README.md").read_text()  # the rest stays


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep" / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(file, "half of a surrogate pair: \ud800")
    assert json.loads(file.read_text()) == {"a": 1} and list(file.parent.iterdir()) == [file]
