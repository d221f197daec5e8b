"""README.md: every Python snippet runs as written and prints what it says, every command names a script and its options."""

import ast
import contextlib
import io
import re
import shlex

import pytest
from conftest import ROOT

from eval_report import compare, comparison_markdown, read_run, replace_table
from saving_utils import code_hashes


TEXT = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATHS = ("path/to/clone", "path/to/this/folder", "path or id")  # what a reader replaces
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def snippets(language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(TEXT) if kind == language]


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


@pytest.mark.parametrize("code", snippets("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_snippet(code, bundled_dir):
    names = {node.names[0].name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)}
    names |= {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    for name in names:
        pytest.importorskip(name.split(".")[0])
    for path in PATHS:
        code = code.replace(path, str(bundled_dir))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {})
    told = printed_as_told(code)
    found, expected = ([float(number) for number in NUMBER.findall(text)] for text in (output.getvalue(), told))
    assert len(found) == len(expected), f"printed {output.getvalue()!r}, the README says {told!r}"
    assert found == pytest.approx(expected, abs=2e-3)
    assert NUMBER.sub("", output.getvalue()).split() == NUMBER.sub("", told).split()


def commands() -> list[str]:
    lines = "\n".join(snippets("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"\b\w+\.py\b", line)]


@pytest.mark.parametrize("command", commands())
def test_command(command):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    source = (ROOT / script).read_text(encoding="utf-8")
    if script == "train.py":  # its arguments are transformers' too
        from transformers import TrainingArguments

        source += " ".join(TrainingArguments.__dataclass_fields__)
    behind = words[words.index(script) :]
    for option in (word.lstrip("-").split("=")[0] for word in behind if word.startswith("--")):
        assert re.search(rf"\b{option}\b", source), f"{script} has no --{option}"
    for word in behind:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists(), word


def test_files_in_the_table_exist():
    rows = re.findall(r"^\| (`[^|]+`) \| [^`]", TEXT, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w./-]+\.\w+)`", row)]
    assert len(names) >= 10
    bundled = {"model.safetensors", "config.json", "processor_config.json"}  # there once a checkpoint is bundled
    assert [name for name in names if not (ROOT / name).exists() and name not in bundled] == []


def test_hashes_of_the_shipped_code():
    """`python card.py . --hashes` brings them up to date."""
    told = dict(re.findall(r"\| `([\w.]+\.py)` \| `([0-9a-f]{64})` \|", TEXT))
    assert told == code_hashes(ROOT)


def test_results_table_is_what_the_results_say():
    """`python eval_mteb.py --compare results/causal2vec-tiny results/all-MiniLM-L6-v2 ... --readme README.md` writes it."""
    runs = [read_run(str(ROOT / "results" / name)) for name in ("causal2vec-tiny", "all-MiniLM-L6-v2")]
    table = comparison_markdown(runs, compare(runs))
    assert "STSBenchmark" in table
    assert replace_table(TEXT, table) == TEXT
