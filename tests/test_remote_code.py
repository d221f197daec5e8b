"""The shipped code as the Hub's loader runs it: from a folder, in a fresh process, offline, with torch and transformers."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXTS
from transformers import AutoModel
from transformers.dynamic_module_utils import get_relative_import_files

from saving_utils import SHIPPED_CODE


INSTRUCTION = "Given a question, retrieve passages that answer it"
ENTRY_FILES = ("configuration_causal2vec.py", "modeling_causal2vec.py", "tokenization_utils.py")
# Only sentence-transformers loads this one.
SENTENCE_TRANSFORMERS_FILE = "sentence_causal2vec.py"
# Each may import from those before it.
FOLDERS = ("evaluation", "training", "serving", "scripts", "benchmarks")

# Runs in a process of its own. Blocks every installed package but torch, transformers and what they require, and every
# connection; then loads a folder and writes its vectors.
CHILD = r"""
import importlib.metadata as metadata, importlib.util, json, os, re, socket, sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

from packaging.requirements import Requirement

allowed, queue = set(), ["torch", "transformers"]
while queue:
    name = normal(queue.pop())
    if name not in allowed:
        allowed.add(name)
        try:
            requirements = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
blocked = [
    module
    for module, owners in metadata.packages_distributions().items()
    if not allowed & {normal(owner) for owner in owners} and module not in sys.modules and "-" not in module
]
for module in blocked:
    sys.modules[module] = None  # an import raises ModuleNotFoundError, find_spec returns None

attempts = []

def refuse(*args, **kwargs):
    attempts.append(repr(args[-1]))
    raise OSError("no network here")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse

# `make` puts the clone on the path.
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.realpath(sys.argv[1])]
for module in ("modeling_causal2vec", "configuration_causal2vec", "tokenization_utils"):
    assert importlib.util.find_spec(module) is None, f"{module} is importable without the folder"

task = json.load(sys.stdin)

from transformers import AutoModel, AutoProcessor, AutoTokenizer

folder = task["folder"]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
ids = processor(task["texts"], instruction=task["instruction"])["input_ids"]
report = {
    "blocked": blocked,
    "vectors": model.encode(task["texts"]).tolist(),
    "queries": model.encode(task["texts"], instruction=task["instruction"]).tolist(),
    "same_ids": ids.equal(model.processor(task["texts"], instruction=task["instruction"])["input_ids"]),
    "vocabulary": len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)),
    "class": type(model).__module__,
}
report["attempts"] = attempts
report["imported"] = sorted({name.split(".")[0] for name, module in sys.modules.items() if module is not None})
print("REPORT" + json.dumps(report))
"""


def shipped_files() -> list[str]:
    """The files that the loader copies: the entry files and what they import, and so on."""
    found, queue = [], list(ENTRY_FILES)
    while queue:
        name = queue.pop(0)
        if name not in found:
            found.append(name)
            queue += [f"{module}.py" for module in relative_imports(name)]
    return sorted(found)


def relative_imports(name: str) -> list[str]:
    nodes = ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


SHIPPED = shipped_files()


@pytest.fixture(scope="module")
def report(saved_dir, tmp_path_factory):
    """What the child found. The repository itself is loaded in such a process by test_hub.py's dry run."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "PYTEST_", "HUGGINGFACE_"))
    }
    environment.update(HF_HOME=str(home / "hf"), HOME=str(home), OMP_NUM_THREADS="1")
    task = {"folder": str(saved_dir), "texts": TEXTS, "instruction": INSTRUCTION}
    process = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT)],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("REPORT")]
    return json.loads(line.removeprefix("REPORT"))


class TestFreshProcess:
    def test_nothing_else_was_importable(self, report):
        assert {"pytest", "hypothesis"} <= set(report["blocked"])
        others = {"sentence_transformers", "mteb", "peft", "datasets", "accelerate", "sklearn", "scipy", "pandas"}
        assert not (others | set(report["blocked"])) & set(report["imported"])
        assert {"torch", "transformers"} <= set(report["imported"])

    def test_no_connection_was_tried(self, report):
        assert report["attempts"] == []

    def test_a_saved_folder(self, report, tiny_model):
        assert report["class"].startswith("transformers_modules.")
        assert report["same_ids"]
        assert report["vocabulary"] == len(tiny_model.processor.tokenizer)
        for name, vectors in (
            ("vectors", tiny_model.encode(TEXTS)),
            ("queries", tiny_model.encode(TEXTS, instruction=INSTRUCTION)),
        ):
            assert np.abs(np.array(report[name]) - vectors).max() <= 1e-5
            assert np.linalg.norm(vectors[0] - vectors[1]) > 0.01


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Returns a function that makes a package of the shipped files, some of them replaced, and gives its name."""

    def make(**changes: str) -> str:
        name = f"shipped_{tmp_path.name}"
        (tmp_path / name).mkdir()
        for file in SHIPPED:
            text = changes.get(file.removesuffix(".py"), (ROOT / file).read_text(encoding="utf-8"))
            (tmp_path / name / file).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    assert str(ROOT) in sys.path, "the clone's own files would not be found anyway"
    yield make
    for module in [module for module in sys.modules if module.startswith("shipped_")]:
        del sys.modules[module]


class TestImports:
    def test_the_package_itself_is_fine(self, package):
        assert importlib.import_module(f"{package()}.modeling_causal2vec").Causal2VecModel

    @pytest.mark.parametrize("file", [name for name in SHIPPED if relative_imports(name)])
    def test_a_real_error_is_told_and_no_clone_is_mixed_in(self, package, file):
        """All siblings are empty, as those of another version may lack a name; the clone's files have them all."""
        if file == SENTENCE_TRANSFORMERS_FILE:
            pytest.importorskip("sentence_transformers")
        siblings = {name.removesuffix(".py"): "" for name in SHIPPED if name != file}
        name = package(**siblings)
        with pytest.raises(ImportError, match=rf"cannot import name '\w+' from '{name}\."):
            importlib.import_module(f"{name}.{file.removesuffix('.py')}")

    def test_a_missing_file_is_told(self, package, tmp_path):
        name = package()
        (tmp_path / name / "decoder_utils.py").unlink()
        with pytest.raises(ModuleNotFoundError, match=rf"{name}\.decoder_utils"):
            importlib.import_module(f"{name}.modeling_causal2vec")

    @pytest.mark.parametrize(
        "name",  # of those that others import
        [name.removesuffix(".py") for name in SHIPPED if not name.endswith(("_causal2vec.py", "handler.py"))],
    )
    def test_another_file_of_a_clones_module_name(self, tmp_path, monkeypatch, name):
        """Of a user whose own folder comes before the clone on sys.path."""
        (tmp_path / f"{name}.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        for module in [file.removesuffix(".py") for file in SHIPPED]:
            monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(ImportError) as error:
            importlib.import_module("modeling_causal2vec")
        for told in (str(tmp_path / f"{name}.py"), str(ROOT / f"{name}.py"), "Rename"):
            assert told in str(error.value)


class TestFolders:
    def test_saving_again_carries_the_code(self, tiny_model, saved_dir, tmp_path):
        loaded = AutoModel.from_pretrained(saved_dir, trust_remote_code=True)
        assert type(loaded).__module__.startswith("transformers_modules.")
        loaded.save_pretrained(tmp_path)
        for name in SHIPPED:
            assert (tmp_path / name).read_bytes() == (saved_dir / name).read_bytes(), name
        for name in ("config.json", "processor_config.json"):
            auto_map = json.loads((tmp_path / name).read_text())["auto_map"]
            assert auto_map == json.loads((saved_dir / name).read_text())["auto_map"]
            assert "--" not in str(auto_map), "points to another repository"
        again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
        assert np.abs(again.encode(TEXTS) - tiny_model.encode(TEXTS)).max() <= 1e-6

    def test_code_is_run_only_with_consent(self, saved_dir):
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(saved_dir, trust_remote_code=False)

    @pytest.mark.parametrize("changed", ENTRY_FILES)
    def test_folders_of_one_name_do_not_mix(self, tiny_model, tmp_path, changed):
        """The loader's cache is named after the folder; the code of one must not run for the other."""
        folders = []
        for mark in ("one", "two"):
            folders.append(tmp_path / mark / "model")
            tiny_model.save_pretrained(folders[-1])
            source = folders[-1] / changed
            source.write_text(source.read_text(encoding="utf-8") + f"\nMARK = {mark!r}\n", encoding="utf-8")
        for i in (0, 1, 0):
            model = AutoModel.from_pretrained(folders[i], trust_remote_code=True)
            owner = {
                "configuration_causal2vec.py": type(model).config_class,
                "modeling_causal2vec.py": type(model),
                "tokenization_utils.py": type(model.processor),
            }[changed]
            assert sys.modules[owner.__module__].MARK == ("one", "two")[i]
            assert model.encode("hi").shape == (64,)


def imports_of(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """Absolute imports: module, names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def reached(files) -> set[str]:
    """The files of this repository that these import, and so on, wherever in them."""
    found, queue = set(), list(files)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            absolute = imports_of(ast.parse((ROOT / name).read_text(encoding="utf-8")))
            modules = [part for module, names in absolute for part in (module, *(f"{module}.{name}" for name in names))]
            paths = [f"{module.replace('.', '/')}.py" for module in (*modules, *relative_imports(name))]
            queue += [path for path in paths if (ROOT / path).is_file()]
    return found


@pytest.fixture(params=SHIPPED)
def tree(request) -> ast.AST:
    tree = ast.parse((ROOT / request.param).read_text(encoding="utf-8"))
    tree.name = request.param
    return tree


class TestSource:
    def test_every_shipped_file_is_known(self):
        """Whichever way they are found: by reading the imports, and as the loader does."""
        found = get_relative_import_files(ROOT / "modeling_causal2vec.py")
        assert sorted(SHIPPED_CODE) == SHIPPED == sorted({Path(file).name for file in found})
        assert set(ENTRY_FILES) <= set(SHIPPED)

    def test_imports_go_one_way(self):
        """
        What is shipped needs nothing else here; evaluation needs no training, and neither of them needs a script, but for
        cli.py, which needs nothing.
        """
        folders = {name: {f"{name}/{path.name}" for path in (ROOT / name).glob("*.py")} for name in FOLDERS}
        assert reached(SHIPPED) == set(SHIPPED)
        for place, name in enumerate(FOLDERS):
            above = set().union(*(folders[other] for other in FOLDERS[place + 1 :])) - {"scripts/cli.py"}
            assert len(folders[name]) > 1 and not reached(folders[name]) & above, name

    def test_imports(self, tree):
        allowed = {"torch", "transformers", "huggingface_hub", *(name.removesuffix(".py") for name in SHIPPED)}
        dangerous = {"pickle", "marshal", "subprocess", "socket", "ctypes", "urllib", "http", "ssl", "multiprocessing"}
        if tree.name == SENTENCE_TRANSFORMERS_FILE:
            allowed.add("sentence_transformers")
        found = {module.split(".")[0] for module, _ in imports_of(tree)}
        assert found and found <= allowed | set(sys.stdlib_module_names) - dangerous
        assert not [module for module, names in imports_of(tree) if "*" in names]

    def test_nothing_private_of_transformers(self, tree):
        private = [
            (module, name)
            for module, names in imports_of(tree)
            if module.split(".")[0] in ("transformers", "torch")
            for name in [*module.split("."), *names]
            if name.startswith("_")
        ]
        assert private == []

    def test_relative_imports_are_flat(self, tree):
        """The loader follows `from .name import Thing` alone."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module
                assert (ROOT / f"{node.module}.py").exists()

    def test_calls(self, tree):
        """Nothing is evaluated, no code of others is trusted, and no loaded weight is initialised anew."""
        forbidden = {"exec", "eval", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert calls
        for call in calls:
            assert ast.unparse(call.func) not in forbidden, f"line {call.lineno}"
            assert not re.search(r"\.data\.\w+_$", ast.unparse(call.func)), f"line {call.lineno}"
            for keyword in call.keywords:
                trusted = keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant)
                assert not (trusted and keyword.value.value), f"line {call.lineno}"

    def test_backbones_are_built_from_configurations(self):
        """No `from_pretrained` in a constructor, no branch on a model's name."""
        tree = ast.parse((ROOT / "modeling_causal2vec.py").read_text(encoding="utf-8"))
        constructors = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        ]
        assert len(constructors) >= 2
        for constructor in constructors:
            assert "from_pretrained" not in ast.unparse(constructor)
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                attributes = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                if attributes & {"model_type", "name_or_path", "_name_or_path", "architectures"}:
                    assert not {value for value in constants if isinstance(value, str)}, f"line {node.lineno}"
