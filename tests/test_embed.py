"""The command line: index, search, encode, and what users are told when something is wrong."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from scripts import embed, index
from serving.vectors import read_fingerprint


TEXTS = [
    "Protein is needed to build muscle.",
    "The highest point of a mountain is its summit.",
    "hi",
    "The quick brown fox jumps over the lazy dog.",
]


@pytest.fixture(scope="module")
def model_dir(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed") / "checkpoint"
    tiny_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_dir(tiny_model, tmp_path_factory):
    """A checkpoint with other weights."""
    import copy

    folder, other = tmp_path_factory.mktemp("embed") / "other", copy.deepcopy(tiny_model)
    other.projector.linear_1.weight.data.mul_(-1)
    other.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loads(monkeypatch):
    """How often a model was loaded: a mistake in the files is found before."""
    calls = []
    load_model = embed.load_model
    monkeypatch.setattr(embed, "load_model", lambda *args: calls.append(args) or load_model(*args))
    return calls


@pytest.fixture
def splitter():
    pytest.importorskip("semantic_text_splitter")


@pytest.fixture
def database(splitter):
    pytest.importorskip("lancedb")


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_rows(path: Path, rows: list) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def told(captured) -> list[str]:
    """What a command says beside its output, progress bars aside."""
    return [line.removeprefix("embed: ") for line in captured.err.splitlines() if line.startswith("embed: ")]


def run(argv: list[str], capsys, expected: int = 0) -> tuple[str, list[str]]:
    """Output, and what is said beside it."""
    capsys.readouterr()
    assert embed.main(argv) == expected
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, told(captured)


def error_of(argv: list[str], capsys) -> str:
    """The one line of a command that fails."""
    output, (line,) = run(argv, capsys, 2)
    assert output == "" and line.startswith("error: ")
    return line.removeprefix("error: ")


def hits(output: str) -> list[tuple[float, str]]:
    """Score and place of each passage that `search` has printed."""
    found = [line.split("  ", 1) for line in output.splitlines() if line and not line.startswith(" ")]
    return [(float(score), place) for score, place in found]


# Search in files


@pytest.fixture
def two_files(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    return [write_rows(tmp_path / "a.jsonl", rows), write(tmp_path / "b.md", "# A summit\n")]


PLACES = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1)]


def test_search_prints_what_encode_finds(splitter, two_files, model_dir, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(embed, "BATCH", 2)  # the best are found over several batches
    query, texts = "What is a summit?", [*TEXTS, "# A summit"]
    scores = tiny_model.encode_document(texts) @ tiny_model.encode_query(query)
    expected = [(scores[i], f"{two_files[PLACES[i][0]]}:{PLACES[i][1]}") for i in np.argsort(-scores)]
    assert np.ptp(scores) > 0.01  # the order says something

    output, _ = run(["search", query, *two_files, "--model", model_dir], capsys)
    assert [place for _, place in hits(output)] == [place for _, place in expected]
    assert [score for score, _ in hits(output)] == pytest.approx([score for score, _ in expected], abs=6e-5)
    assert all(text in output for text in texts)

    command = ["search", query, str(Path(two_files[0]).parent), "--model", model_dir, "--json", "--top_k", "3"]
    answer = json.loads(run(command, capsys)[0])  # of the folder, and one line of JSON
    assert answer["query"] == query
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(sorted(scores, reverse=True)[:3], abs=2e-6)
    assert [f"{hit['path']}:{hit['line']}" for hit in answer["hits"]] == [place for _, place in expected[:3]]
    assert all(hit["text"] in texts and hit["page"] is None for hit in answer["hits"])


def test_search_arguments_reach_the_model(splitter, two_files, model_dir, tiny_model, capsys):
    command = ["search", TEXTS[3], two_files[0], "--model", model_dir]
    output, _ = run([*command, "--instruction", "", "--top_k", "1"], capsys)
    assert hits(output) == [(1.0, f"{two_files[0]}:4")]  # without an instruction the text finds itself

    output, _ = run([*command, "--instruction", "Find a pangram", "--max_length", "100", "--batch_size", "1"], capsys)
    expected = tiny_model.encode(TEXTS) @ tiny_model.encode(TEXTS[3], instruction="Find a pangram")
    assert [score for score, _ in hits(output)] == pytest.approx(sorted(expected, reverse=True), abs=6e-5)


def test_search_shortens_and_cleans_what_it_prints(splitter, tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embed, "default_tokens", lambda limits: 4000)
    write(tmp_path / "a.txt", "\x1b[31mred " + "word " * 100)
    lines = run(["search", "red", "a.txt", "--model", model_dir], capsys)[0].rstrip().splitlines()
    assert lines[0].endswith("  a.txt:1")  # within the working directory, paths are relative
    assert len(lines) == 5 and lines[1].strip().startswith("[31mred word") and lines[-1].endswith(" ...")
    assert max(map(len, lines[1:])) <= 60 and "\x1b" not in "".join(lines)


def test_search_names_what_it_cannot_read_and_searches_the_rest(splitter, tmp_path, model_dir, capsys, loads):
    write(tmp_path / "a.txt", "alpha")
    write(tmp_path / "latin.txt", "naïve".encode("latin-1"))
    write(tmp_path / "empty.md", "")
    write(tmp_path / "picture.png", b"\0")
    bad, binary = write_rows(tmp_path / "bad.jsonl", [{"text": 1}]), write(tmp_path / "binary.txt", b"\0" * 99)
    output, lines = run(["search", "q", str(tmp_path), "--model", model_dir], capsys, 2)
    assert {Path(place).name for _, place in hits(output)} == {"a.txt:1", "latin.txt:1"}
    assert lines == [
        f"not UTF-8, so read as Windows-1252: {tmp_path / 'latin.txt'}",
        "passed over: 1 of other kinds",
        f"{binary} is no text: it has too many NUL bytes.",
        f"{bad}:1 must have a string under 'text', got 1. Name another column with --text_column.",
        "error: 2 files could not be read; all others were.",
    ]
    loads.clear()
    assert error_of(["search", "q", binary], capsys) == f"{binary} is no text: it has too many NUL bytes."
    empty = str(tmp_path / "empty.md")
    assert error_of(["search", "q", str(tmp_path / "gone.md")], capsys).startswith("There is no file or folder ")
    assert loads == []
    assert error_of(["search", "q", empty, "--model", model_dir], capsys) == f"There is no text in {empty}."


def test_where_to_search_must_be_said(capsys, loads):
    expected = "Say where to look: files and folders, or an index by --db, and not both."
    assert error_of(["search", "q"], capsys) == expected
    assert error_of(["search", "q", "a.txt", "--db", "my.lance"], capsys) == expected
    for command in (["search", "q", "a.txt", "--hybrid"], ["search", "-", "a.txt"]):
        assert error_of(command, capsys).startswith("--hybrid and queries from standard input need an index")
    assert loads == []


# Indexes


def test_an_index_is_searched_as_its_files_are(database, two_files, tmp_path, model_dir, capsys, monkeypatch):
    (tmp_path / "db").mkdir()
    db = ["--db", str(tmp_path / "db" / "my.lance"), "--model", model_dir]
    output, lines = run(["index", *two_files, *db], capsys)
    assert "5 passages. 2 files new or changed, with 5 passages embedded; 0 gone; 0 as before." in output and not lines
    output, _ = run(["index", *two_files, *db], capsys)
    assert "5 passages. 0 files new or changed, with 0 passages embedded; 0 gone; 2 as before." in output

    query = "What is a summit?"
    files, _ = run(["search", query, *two_files, "--model", model_dir, "--json"], capsys)
    found, _ = run(["search", query, *db, "--json"], capsys)
    for hit, expected in zip(json.loads(found)["hits"], json.loads(files)["hits"], strict=True):
        assert hit.pop("score") == pytest.approx(expected.pop("score"), abs=2e-6) and hit == expected

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{query}\n\nmuscle\n"))
    answers = run(["search", "-", *db, "--json", "--top_k", "2", "--hybrid"], capsys)[0].splitlines()
    assert [json.loads(answer)["query"] for answer in answers] == [query, "muscle"]
    assert any(hit["text"] == TEXTS[0] for hit in json.loads(answers[1])["hits"])

    Path(two_files[1]).unlink()
    Path(two_files[0]).write_bytes(b'{"text": "hi"}\n')
    output, _ = run(["index", str(tmp_path), *db], capsys)
    assert "1 passages. 1 files new or changed, with 1 passages embedded; 1 gone; 0 as before." in output


def test_an_index_refuses_other_vectors(database, two_files, tmp_path, model_dir, other_dir, capsys):
    db = ["--db", str(tmp_path / "my.lance")]
    run(["index", two_files[0], *db, "--model", model_dir, "--truncate_dim", "16", "--instruction", "Find"], capsys)
    for command in (["index", two_files[0], "--truncate_dim", "16", "--instruction", "Find"], ["search", "q"]):
        error = error_of([*command, *db, "--model", other_dir], capsys)
        assert "my.lance differs from what is compared with them in weights. Use the same model" in error
    error = error_of(["index", two_files[0], *db, "--model", model_dir], capsys)
    assert "instruction ('Find' there, None here), dimensions (16 there, 64 here). Use the same arguments" in error
    same = [*db, "--model", model_dir, "--truncate_dim", "16", "--instruction", "Find"]
    assert "Another --db can have others." in error_of(["index", two_files[0], *same, "--passage_tokens", "7"], capsys)
    output, _ = run(["search", TEXTS[1], *db, "--model", model_dir, "--instruction", "Find", "--top_k", "1"], capsys)
    assert hits(output) == [(1.0, f"{two_files[0]}:2")]  # the query has the size of the vectors


def test_index_names_what_it_cannot_read_and_keeps_the_rest(database, tmp_path, model_dir, capsys):
    docs, db = tmp_path / "docs", ["--db", str(tmp_path / "my.lance"), "--model", model_dir]
    docs.mkdir()
    write(docs / "a.txt", "alpha")
    write(docs / "b.txt", " ")
    bad = write_rows(docs / "bad.jsonl", [{"text": "fine"}, {"text": None}])
    output, lines = run(["index", str(docs), *db], capsys, 2)
    assert "1 passages. 2 files new or changed, with 1 passages embedded; 0 gone; 0 as before." in output
    assert lines == [
        "passed over: 1 without text",
        f"error: {bad}:2 must have a string under 'text', got None. Name another column with --text_column.",
    ]
    write_rows(Path(bad), [{"text": "fine"}])
    output, _ = run(["index", str(docs), *db], capsys)
    assert "2 passages. 1 files new or changed, with 1 passages embedded; 0 gone; 2 as before." in output


def test_bad_indexes(tmp_path, capsys, loads, monkeypatch):
    path = write(tmp_path / "a.txt", "a")
    expected = "An index must be a folder NAME.lance within a folder that is there, got my.db."
    assert error_of(["index", path, "--db", "my.db"], capsys) == expected
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for command in (["search", "q"], ["index", path]):
        there = tmp_path / "my.lance"
        there.mkdir(exist_ok=True)
        assert error_of([*command, "--db", str(there)], capsys) == 'Indexes need lancedb: pip install "lancedb"'
    assert loads == []


# Encode


def test_encode_writes_npy(tmp_path, model_dir, tiny_model, capsys):
    texts = ["one", "", "two words", " three"]
    path, output = write(tmp_path / "a.txt", "\n".join(texts) + "\n"), tmp_path / "a.npy"
    assert run(["encode", path, "-o", str(output), "--model", model_dir], capsys) == (
        f"Wrote 4 vectors of 64 numbers to {output}\n",
        [],
    )
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, tiny_model.encode(texts), atol=1e-6)
    assert read_fingerprint(output) == tiny_model.fingerprint()
    assert {each.name for each in tmp_path.iterdir()} == {"a.npy", "a.npy.json", "a.txt"}

    options = "--instruction Do --truncate_dim 6 --no-normalize --max_length 12 --batch_size 3".split()
    run(["encode", path, "-o", str(output), "--model", model_dir, *options], capsys)
    values = dict(instruction="Do", truncate_dim=6, normalize_embeddings=False, max_length=12)
    expected = tiny_model.encode(texts, **values)
    assert not np.allclose(np.linalg.norm(expected, axis=-1), 1, atol=0.1)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)
    assert read_fingerprint(output) == tiny_model.fingerprint(**values)


def test_encode_keeps_columns_and_takes_any_table(tmp_path, model_dir, tiny_model, capsys, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    texts = ["one", "zwei 🙂", "", "\ufffd"]
    rows = [{"id": i, "body": text} for i, text in enumerate([*texts[:3], "\ud800"])]
    path, output = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"
    options = ["--text_column", "body", "--model", model_dir]
    run(["encode", path, "-o", str(output), *options], capsys)
    table, expected = pq.read_table(output), tiny_model.encode(texts)
    assert table.drop(["embedding"]).to_pydict() == {"id": [0, 1, 2, 3], "body": texts}
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=1e-6)
    assert read_fingerprint(output) == tiny_model.fingerprint()

    again = ["encode", str(output), "-o", str(tmp_path / "b.parquet"), *options]
    assert "has a column 'embedding' already: name another --embedding_column" in error_of(again, capsys)
    run([*again, "--embedding_column", "half", "--precision", "float16"], capsys)
    table = pq.read_table(tmp_path / "b.parquet")
    assert table.column_names == ["id", "body", "embedding", "half"]
    np.testing.assert_allclose(table["half"].to_pylist(), expected, atol=1e-3)

    csv = "body,id\r\n" + "\r\n".join(f"{text},{i}" for i, text in enumerate(texts))
    with open(write(tmp_path / "in", csv)) as standard_input, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", standard_input)
        run(["encode", "-", "--format", "csv", "-o", str(tmp_path / "c.npy"), *options], capsys)
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), expected, atol=1e-6)


KILLED = """
import os, signal, sys
from scripts import embed, index
embed.BATCH = index.BATCH = 2
add, write = index.Update.write, embed.Parts.write
def killed(job, times=[]):
    def do(*args):
        job(*args)
        times.append(1)
        if len(times) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return do
index.Update.write, embed.Parts.write = killed(add), killed(write)
embed.main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["index", "encode"])
def test_what_was_killed_goes_on(tmp_path, model_dir, tiny_model, capsys, monkeypatch, command):
    """With two of four batches written."""
    if command == "index":
        pytest.importorskip("lancedb")
        pytest.importorskip("semantic_text_splitter")
    monkeypatch.setattr(embed, "BATCH", 2)
    monkeypatch.setattr(index, "BATCH", 2)
    texts = [f"text {i} {TEXTS[i % 4]}" for i in range(8)]
    path, output = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tmp_path / "a.npy"
    argv = [command, path, "--model", model_dir, "-o", str(output)]
    if command == "index":
        argv[-2:] = ["--db", str(tmp_path / "my.lance"), "--passage_tokens", "200"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *argv], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    told, _ = run(argv, capsys)
    if command == "encode":
        assert told == f"Wrote 8 vectors of 64 numbers to {output}, 4 of them from before\n"
        vectors = np.load(output)
    else:
        assert "8 passages. 1 files new or changed, with 4 passages embedded" in told
        table = index.Index(str(tmp_path / "my.lance")).table.to_arrow()
        assert table["text"].to_pylist() == texts
        vectors = table["vector"].to_pylist()
    np.testing.assert_allclose(vectors, tiny_model.encode(texts), atol=1e-5)


def test_dtype_reaches_the_model(tmp_path, model_dir, tiny_model):
    path, output = write(tmp_path / "a.txt", "\n".join(TEXTS)), tmp_path / "a.npy"
    assert embed.main(["encode", path, "-o", str(output), "--model", model_dir, "--dtype", "bfloat16"]) == 0
    vectors, expected = np.load(output), tiny_model.encode(TEXTS)
    assert vectors.dtype == np.float32 and not np.allclose(vectors, expected, atol=1e-4)
    assert (vectors * expected).sum(-1) == pytest.approx(1, abs=0.01)


def test_what_was_cut_is_told(splitter, tmp_path, model_dir, capsys):
    path = write(tmp_path / "a.txt", "one\n" + "word " * 30 + "\nthree\n")
    _, (line,) = run(["encode", path, "-o", str(tmp_path / "a.npy"), "--model", model_dir], capsys)
    assert "1 of 3 texts" in line and "1 by the encoder (at 40 tokens)" in line and "decoder" not in line
    _, (line,) = run(["search", "word " * 30, path, "--max_length", "60", "--model", model_dir], capsys)
    assert "by the decoder (at 60 tokens)" in line


# What users are told


def test_bad_encode_inputs(tmp_path, capsys, loads):
    output = tmp_path / "a.npy"
    output.write_bytes(b"old")
    for path, expected in {
        str(tmp_path / "gone.txt"): "There is no file {}.",
        str(tmp_path): "There is no file {}.",
        write(
            tmp_path / "a.md", "# A"
        ): "{} must end in one of .txt, .jsonl, .ndjson, .csv, .tsv, .parquet, or --format say what it is.",
        write(tmp_path / "a.txt", ""): "No texts in {}: it is empty.",
        write(tmp_path / "a.csv", "text\n"): "No texts in {}: it is empty.",
        write_rows(
            tmp_path / "b.jsonl", [{"text": "a"}, {"text": 1}]
        ): "{}:2 must have a string under 'text', got 1. Name another column with --text_column.",
    }.items():
        assert error_of(["encode", path, "-o", str(output)], capsys) == expected.format(path)
    good = write(tmp_path / "good.txt", "one")
    assert error_of(["encode", good, "-o", "a.csv"], capsys).startswith(
        "--output must end in one of .parquet, .npy, .lance"
    )
    assert loads == [] and output.read_bytes() == b"old"


def test_an_error_late_in_a_file_keeps_what_was_encoded(tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(embed, "BATCH", 2)
    path, output = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": None}]), tmp_path / "a.npy"
    command = ["encode", path, "-o", str(output), "--model", model_dir]
    assert error_of(command, capsys).startswith(f"{path}:3 must have a string under 'text', got None.")
    assert not output.exists()
    write_rows(Path(path), [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    assert run(command, capsys)[0].endswith("a.npy, 2 of them from before\n")
    assert np.load(output).shape == (3, 64)


def test_bad_models(tmp_path, capsys, backbone_dir):
    command = ["encode", write(tmp_path / "a.txt", "one"), "-o", str(tmp_path / "a.npy"), "--model"]
    bert, gone, empty = backbone_dir("bert"), str(tmp_path / "gone"), tmp_path / "empty"
    empty.mkdir()
    expected = "The model must be a Causal2Vec checkpoint; {} has {}."
    assert error_of([*command, bert], capsys) == expected.format(bert, "model_type 'bert'")
    assert error_of([*command, str(empty)], capsys) == expected.format(empty, "no config.json")
    assert error_of([*command, gone], capsys).startswith(f"The model must be a folder or a Hub id, got {gone}: ")


def test_values_that_the_model_refuses(tmp_path, capsys, model_dir, loads):
    path, output = write(tmp_path / "a.txt", "one"), str(tmp_path / "a.npy")
    command = ["encode", path, "-o", output, "--model", model_dir]
    assert "`truncate_dim` must be an integer between 1 and 64, got 65" in error_of(
        [*command, "--truncate_dim", "65"], capsys
    )
    assert "Binary vectors need a multiple of 8" in error_of(
        [*command, "--truncate_dim", "6", "--precision", "binary"], capsys
    )
    assert "max_length=2 leaves no room for text" in error_of([*command, "--max_length", "2"], capsys)
    assert loads == [(model_dir, "float32", None)] * 3 and not Path(output).exists()


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many"])
@pytest.mark.parametrize("option", ["--top_k", "--batch_size", "--max_length"])
def test_numbers_must_be_positive(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(["search", "q", "a.txt", f"{option}={value}"])
    assert stop.value.code == 2
    assert f"argument {option}: must be a whole number of at least 1, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 50])
def test_a_reader_that_has_gone_ends_it_in_silence(splitter, tmp_path, model_dir, monkeypatch, capsys, lines):
    """As of `search ... | head -1`: told when the output is written, or flushed at the end."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"text {i} " * 9} for i in range(lines)])
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as output:
        patch.setattr(sys, "stdout", output)
        assert embed.main(["search", "text", path, "--top_k", "50", "--model", model_dir]) == 141
    assert "rror" not in capsys.readouterr().err


def test_an_interrupt_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "load_model", interrupt)
    output = tmp_path / "a.npy"
    assert embed.main(["encode", write(tmp_path / "a.txt", "one"), "-o", str(output)]) == 130
    assert capsys.readouterr().err == "embed: interrupted\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
