"""README.md and docs/: every Python snippet runs as written and prints what it says, a newcomer's commands run too, and
every other command names a script and its options."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from configuration_causal2vec import Causal2VecConfig
from saving_utils import LIBRARY, PIPELINE_TAG, code_hashes


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATHS = ("path/to/clone", "path/to/this/folder", "path or id")  # what a reader replaces
SERVER = "http://127.0.0.1:8000"  # what `python -m serving.server` says
TRAINED = "runs/mine/model"  # what the commands of "Train on your own data" leave
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def snippets(language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(f"{TEXT}\n{DOCS}") if kind == language]


def printed_as_told(code: str) -> str:
    """The comment lines that directly follow a line with `print(`, which tell what it prints."""
    told, follows = [], False
    for line in code.splitlines():
        if follows and line.startswith("# "):
            told.append(line[2:])
        else:
            follows = line.startswith("print(")
    return "\n".join(told)


def test_the_readme_has_snippets():
    assert len(snippets("python")) >= 1 and len(snippets("bash")) >= 2


# test_onnx.py runs the one for an export, which needs one.
IN_PYTHON = [code for code in snippets("python") if "path/to/export" not in code]


@pytest.mark.parametrize("code", IN_PYTHON, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_snippet(code, bundled_dir, request, tmp_path, monkeypatch):
    names = {node.names[0].name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)}
    names |= {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    for name in names:
        pytest.importorskip(name)
    for path in PATHS:
        code = code.replace(path, str(bundled_dir))
    if TRAINED in code:
        code = code.replace(TRAINED, str(request.getfixturevalue("clone") / TRAINED))
    monkeypatch.chdir(tmp_path)  # for what it writes
    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        if SERVER in code:
            from app_server import running

            from serving.server import create_app

            app = create_app(request.getfixturevalue("bundled_model"), "causal2vec")
            code = code.replace(SERVER, stack.enter_context(running(app)))
        stack.enter_context(contextlib.redirect_stdout(output))
        exec(compile(code, "README.md", "exec"), {})
    told = printed_as_told(code)
    found, expected = ([float(number) for number in NUMBER.findall(text)] for text in (output.getvalue(), told))
    assert len(found) == len(expected), f"printed {output.getvalue()!r}, the README says {told!r}"
    assert found == pytest.approx(expected, abs=2e-3)
    assert NUMBER.sub("", output.getvalue()).split() == NUMBER.sub("", told).split()


def run_bash(code: str, folder: Path) -> str:
    """Runs commands in a folder with this Python, and without a network: what pip is asked for must be there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PIP_NO_INDEX": "1"}
    result = subprocess.run(["bash", "-euc", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def clone(bundled_dir, tmp_path_factory) -> Path:
    """A folder that looks like the repository, in which the bundled checkpoint was trained on the README's own rows."""
    for name in ("accelerate", "datasets", "peft", "tensorboard", "matplotlib"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("clone")
    for path in bundled_dir.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "mine"):
            (folder / path.name).symlink_to(path)
    (block,) = [code for code in snippets("bash") if "mine/rows.jsonl" in code]
    block, replaced = re.subn(r"--max_steps \d+", "--max_steps 2", block)  # enough to see that it runs
    assert replaced == 1
    run_bash(block, folder)
    assert json.loads((folder / TRAINED).with_name("training.json").read_text(encoding="utf-8"))["steps"] == 2
    return folder


def test_files_are_searched_and_encoded(clone):
    (block,) = [code for code in snippets("bash") if "scripts.embed search" in code and "--db" not in code]
    (clone / "texts.txt").write_text("one\ntwo\n", encoding="utf-8")
    told = run_bash("\n".join(line for line in block.splitlines() if line.startswith("python")), clone)
    assert "README.md" in told
    assert np.load(clone / "vectors.npy").shape == (2, Causal2VecConfig.from_pretrained(ROOT).embedding_size)


def test_a_newcomers_model_can_be_pushed(clone):
    (block,) = [code for code in snippets("bash") if f"push_to_hub {TRAINED}" in code]
    lines = block.splitlines()
    assert lines[2] == lines[1].split(" --dry_run")[0]  # the same without --dry_run, which test_hub.py tests
    told = run_bash("\n".join(lines[:2]), clone)
    assert re.search(r"\d+,\d\d\d,\d\d\d  model(-\d+-of-\d+)?\.safetensors", told)
    assert told.splitlines()[-1].startswith("Would push") and told.splitlines()[-1].endswith("to user/name.")
    card = (clone / TRAINED / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if " | rows.jsonl | " in line]
    instruction = re.search(r'"instructions": \["(.+?)"\]', TEXT)[1]
    assert instruction in row, "the card does not say what the README's data file does"


def test_what_pip_is_asked_for_is_what_the_project_needs():
    lines = [line for code in snippets("bash") for line in code.splitlines() if line.startswith("pip install")]
    lines += re.findall(r"`(pip install [^`]*)`", TEXT)
    asked = {re.split(r"[<>=\[]", word)[0] for line in lines for word in shlex.split(line)[2:]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert len(asked) >= 8 and asked <= {re.split(r"[<>=\[]", word)[0] for word in needed}


def commands() -> list[str]:
    lines = "\n".join(snippets("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"\b\w+\.py\b|\bpython -m ", line)]


@pytest.mark.parametrize("command", commands())
def test_command(command):
    words = shlex.split(command, comments=True)
    if "-m" in words:
        words[words.index("-m") + 1] = words[words.index("-m") + 1].replace(".", "/") + ".py"
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    source = (ROOT / script).read_text(encoding="utf-8")
    if script == "train.py":  # its arguments are transformers' too
        from transformers import TrainingArguments

        source += (ROOT / "training" / "arguments.py").read_text(encoding="utf-8")
        source += " ".join(f"--{name}" for name in TrainingArguments.__dataclass_fields__)
    behind = words[words.index(script) :]
    for option in (word.lstrip("-").split("=")[0] for word in behind if word.startswith("--")):
        assert re.search(rf"--{option}\b|^    {option}: ", source, re.MULTILINE), f"{script} has no --{option}"
    for word in behind:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists(), word


def test_files_in_the_table_exist():
    rows = re.findall(r"^\| (`[^|]+`) \| [^`]", TEXT, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w./-]+\.\w+)`", row)]
    assert len(names) >= 10
    # There once a checkpoint is bundled; the fixture `bundled_dir` fails when some of it is missing.
    bundled = re.compile(r"(processor_)?config\.json|model[\w-]*\.safetensors(\.index\.json)?")
    assert [name for name in names if not (ROOT / name).exists() and not bundled.fullmatch(name)] == []


def test_what_the_hub_offers_works():
    front_matter = TEXT.split("---")[1]
    assert f"\npipeline_tag: {PIPELINE_TAG}\n" in front_matter and f"\nlibrary_name: {LIBRARY}\n" in front_matter


def test_hashes_of_the_shipped_code():
    """`python -m training.card . --hashes` brings them up to date."""
    told = dict(re.findall(r"\| `([\w.]+\.py)` \| `([0-9a-f]{64})` \|", TEXT))
    assert told == code_hashes(ROOT)
