"""The golden vectors and the command that compares engines with them. Some 15 seconds, most of them loading models."""

import json

import numpy as np
import pytest

from serving import check
from serving.check import GOLDEN, ROWS, compare, figures_table, main, make, read_golden, write_golden


@pytest.fixture
def golden(tmp_path, monkeypatch, saved_dir) -> str:
    """The tiny model's golden vectors; nothing is written into the repository."""
    monkeypatch.setattr(check, "FIGURES", tmp_path / "figures.json")
    write_golden(tmp_path / "golden.json", make(str(saved_dir)))
    return str(tmp_path / "golden.json")


def change(path: str, **values) -> None:
    write_golden(check.Path(path), {**read_golden(check.Path(path)), **values})


def test_the_bundled_model_gives_the_golden_vectors(bundled_model):
    golden = read_golden(GOLDEN)
    own = bundled_model.fingerprint()
    told = "make new ones, and their table: python -m serving.check --make"
    assert [name for name in ("weights", "config", "tokenizers") if own[name] != golden["fingerprint"][name]] == [], (
        told
    )
    assert [(row["text"], row["instruction"]) for row in golden["rows"]] == list(ROWS), told
    difference, cosine = compare(
        lambda texts, instruction: bundled_model.encode(texts, instruction=instruction, truncation="silent"), golden
    )
    assert difference <= golden["tolerance"]["float32"]["difference"] <= 1e-5
    assert cosine >= golden["tolerance"]["float32"]["cosine"] >= 0.9999


def test_the_table_says_what_was_measured():
    page = (check.ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    figures = json.loads(check.FIGURES.read_text(encoding="utf-8"))
    assert check.replace_table(page, figures_table(figures, read_golden(GOLDEN)), check.MARKERS) == page


def test_golden_vectors_tell_mistakes_apart(bundled_model):
    """Each of what engines get wrong changes some vector by more than the tolerance."""
    golden = read_golden(GOLDEN)
    rows = {(row["text"], row["instruction"]): np.array(row["vector"]) for row in golden["rows"]}
    texts = [text for text, _ in ROWS]
    assert len(rows) == len(ROWS) and "" in texts and any(len(text) > 5000 for text in texts)
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in rows.values())
    assert {instruction for text, instruction in ROWS if texts.count(text) > 1} >= {None, check.QUESTION}
    mistakes = {
        "no instruction": lambda texts, _: bundled_model.encode(texts, truncation="silent"),
        "stripped": lambda texts, i: bundled_model.encode(
            [" ".join(text.split()) for text in texts], instruction=i, truncation="silent"
        ),
        "cut elsewhere": lambda texts, i: bundled_model.encode(
            texts, instruction=i, truncation="silent", max_length=500
        ),
        "not normalised": lambda texts, i: bundled_model.encode(
            texts, instruction=i, truncation="silent", normalize_embeddings=False
        ),
    }
    for name, encode in mistakes.items():
        assert compare(encode, golden)[0] > 1e-3, name


@pytest.mark.parametrize("engine", ["transformers", "sentence-transformers", "handler"])
def test_engines(engine, golden, saved_dir, tmp_path, capsys):
    if engine == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *check.MARKERS, "after"]))
    command = [engine, "--model", str(saved_dir), "--golden", golden]
    assert main([*command, "--write", str(page)]) == 0
    assert f"{engine}, float32, {len(ROWS)} texts" in capsys.readouterr().out
    table = page.read_text().splitlines()
    assert table[0] == "before" and table[-1] == "after"
    for row in table[4:-2]:
        assert ("not run" in row) == (not row.startswith(f"| {engine} | float32 | ")), row
    assert len(table[4:-2]) == len(check.ENGINES)

    rows = read_golden(check.Path(golden))["rows"]
    rows[5]["vector"][3] += 1e-3
    change(golden, rows=rows)
    assert main(command) == 1 and "NOT within" in capsys.readouterr().out


def test_half_precision_has_its_own_tolerance(golden, saved_dir, capsys):
    command = ["transformers", "--model", str(saved_dir), "--golden", golden, "--precision", "bfloat16"]
    assert main(command) == 0
    change(golden, tolerance={"bfloat16": {"difference": 0.02, "cosine": 1.0}})
    assert main(command) == 1


def test_another_model_is_told(golden, other_model, tmp_path, capsys):
    other_model.save_pretrained(tmp_path / "other")
    assert main(["transformers", "--model", str(tmp_path / "other"), "--golden", golden]) == 2
    assert "another model's" in capsys.readouterr().err


def test_what_is_no_vector_never_passes(golden):
    golden = read_golden(check.Path(golden))
    for answer in (
        lambda texts, _: np.full((len(texts), 64), np.nan),
        lambda texts, _: np.ones((len(texts), 32)),
        lambda texts, _: np.ones((len(texts) - 1, 64)),
    ):
        with pytest.raises(ValueError, match="Expected finite vectors"):
            compare(answer, golden)
    difference, cosine = compare(lambda texts, _: np.zeros((len(texts), 64)) + 1e-9, golden)
    assert difference > 0.01 and cosine < 0.9


def test_a_server(golden, tiny_model, other_model, capsys):
    """With openai's client, over a socket; a server says which model it has."""
    for name in ("openai", "fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    from app_server import running

    from serving.server import create_app

    with running(create_app(tiny_model, "tiny")) as url:
        assert main(["server", "--model", f"{url}/v1", "--golden", golden]) == 0
        assert f"{len(ROWS) - 1} texts" in capsys.readouterr().out
        rows = read_golden(check.Path(golden))["rows"]
        rows[0]["vector"][0] += 1e-3
        change(golden, rows=rows)
        assert main(["server", "--model", f"{url}/v1", "--golden", golden]) == 1
    with running(create_app(other_model, "tiny")) as url:
        assert main(["server", "--model", f"{url}/v1", "--golden", golden]) == 2
    assert "another model's" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(golden, capsys):
    pytest.importorskip("openai")
    assert main(["server", "--model", "http://127.0.0.1:9/v1", "--golden", golden]) == 2
    assert "--model must be the address of a server" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": []}'])
def test_bad_golden_files(tmp_path, text, capsys):
    path = tmp_path / "golden.json"
    if text is not None:
        path.write_text(text)
    assert main(["transformers", "--golden", str(path)]) == 2
    assert "must hold golden vectors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["transformers", "--make"], ["onnx"], ["server"], ["transformers", "--precision", "int8"], ["ollama"]]
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
