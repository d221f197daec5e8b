"""scripts/push_to_hub.py: what goes, and what must not go out."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from saving_utils import SHIPPED_CODE
from scripts import push_to_hub
from scripts.push_to_hub import PICKLES, files_to_push


def run_script(*argv: str, capsys) -> tuple[int, str, str]:
    code = push_to_hub.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_dry_run_lists_what_would_go(complete_dir, capsys):
    code, out, err = run_script(str(complete_dir), "tester/x", "--dry_run", capsys=capsys)
    assert code == 0, err
    listed = {line.split()[-1] for line in out.splitlines()[:-1]}
    assert listed == {path.relative_to(complete_dir).as_posix() for path in complete_dir.rglob("*") if path.is_file()}
    size = sum(path.stat().st_size for path in complete_dir.rglob("*") if path.is_file())
    assert f" {len(listed)} files, {size / 1e6:,.1f} MB, to tester/x" in out.splitlines()[-1]


def test_the_repository_itself_can_be_pushed(bundled_dir, capsys):
    """Its card lacks nothing, and what training and tests leave in a clone stays there."""
    code, out, err = run_script(str(bundled_dir), "tester/x", "--dry_run", capsys=capsys)
    assert code == 0, err
    listed = {line.split()[-1]: int(line.split()[0].replace(",", "")) for line in out.splitlines()[:-1]}
    weights = {name: size for name, size in listed.items() if name.endswith(".safetensors")}
    assert weights == {path.name: path.stat().st_size for path in bundled_dir.glob("*.safetensors")} != {}
    assert {"README.md", "train.py", "instructions.json", "recipes/mistral-7b.json", *SHIPPED_CODE} <= set(listed)
    assert not [name for name in listed if name.startswith((".", "runs/", "bases/")) or "cache__" in name]


def test_what_is_made_in_a_folder_does_not_go(complete_dir, tmp_path):
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    before = files_to_push(folder)
    for name in (
        "runs/mine/model/model.safetensors",
        "bases/encoder/config.json",
        ".venv/x.py",
        ".venv-oldest/x.py",
        "a.egg-info/x",
        "tests/__pycache__/x.pyc",
        ".pytest_cache/x",
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    assert files_to_push(folder) == before and len(before) > 10


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def replace(name: str, old: str, new: str):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def add_a_large_file(folder):
    with open(folder / "extra.safetensors", "wb") as file:
        file.truncate(6 * 10**9)  # sparse


def add_an_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    shutil.copy(first_shard(folder), folder / "adapter_model.safetensors")


def leave_an_adapter(folder):
    add_an_adapter(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


BROKEN = {  # what is done to a folder, and what must be told
    "pickle": (write("pytorch_model.bin", "x"), "pytorch_model.bin: .bin"),
    "large": (add_a_large_file, "6.0 GB"),
    "truncated": (lambda folder: first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-1]), "cut off"),
    "header": (lambda folder: first_shard(folder).write_bytes(b"\xff" * 100), "header"),
    "json": (write("training.json", '{"steps": '), "training.json, line 1"),
    "shard": (lambda folder: first_shard(folder).unlink(), "names model-00001"),
    "both": (
        lambda folder: shutil.copy(first_shard(folder), folder / "model.safetensors"),
        "not name model.safetensors",
    ),
    "adapter": (add_an_adapter, "an adapter beside weights"),
    "base": (leave_an_adapter, "'../base'"),
    "code": (lambda folder: (folder / "decoder_utils.py").unlink(), "missing: decoder_utils.py"),
    "auto_map": (replace("config.json", '"modeling_c', '"someone/else--modeling_c'), "someone/else--"),
    # Split, so that this file names no path of a machine.
    "path": (write("training.json", json.dumps({"output_dir": "/" + "data/me/runs"})), "training.json names paths"),
    "home": (write("notes.txt", "made in /" + "home/me/model"), "/" + "home/me"),
    "drive": (write("notes.txt", "made in C:" + "\\Users\\me"), "C:" + "\\Users"),
    "licence": (replace("README.md", "license: apache-2.0\n", ""), "`license`"),
    "limits": (replace("README.md", "## Limits", "## Other"), "its limits"),
    "hash": (replace("decoder_utils.py", "import", "import  "), "SHA-256 of decoder_utils.py"),
    "pin": (replace("README.md", "revision=", ""), "pin a commit"),
    "card": (lambda folder: (folder / "README.md").unlink(), "missing: README.md"),
}


@pytest.mark.parametrize("change, told", BROKEN.values(), ids=BROKEN)
def test_what_must_not_go_out_is_refused(complete_dir, tmp_path, capsys, monkeypatch, change, told):
    monkeypatch.setattr(push_to_hub, "push", lambda *args: pytest.fail("pushed"))
    monkeypatch.setattr(push_to_hub, "load_problem", lambda folder: None)  # slow, and has a test of its own
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    change(folder)
    code, _, err = run_script(str(folder), "tester/x", capsys=capsys)
    assert code == 2 and told in err
    assert len(err.strip().splitlines()) == 2  # what is wrong, and nothing else


def test_a_folder_that_does_not_load_is_refused(complete_dir, tmp_path, capsys):
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["contextual_token_id"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run_script(str(folder), "tester/x", "--dry_run", capsys=capsys)
    assert code == 2 and "does not load in a fresh process" in err and "contextual_token_id" in err


def test_the_repository_holds_no_pickles():
    files = files_to_push(ROOT)
    assert len(files) > 20
    assert [file for file in files if file.suffix in PICKLES] == []
