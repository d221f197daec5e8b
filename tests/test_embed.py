"""The command line: passages, search, encode, and what users are told when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import embed


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


@pytest.fixture
def loads(monkeypatch):
    """How often a model was loaded: a mistake in the files is found before."""
    calls = []
    load_model = embed.load_model
    monkeypatch.setattr(embed, "load_model", lambda *args: calls.append(args) or load_model(*args))
    return calls


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_rows(path: Path, rows: list) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def error_of(argv: list[str], capsys) -> str:
    """Runs a command that fails; returns the one line that it says, progress bars aside."""
    assert embed.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line and "Loading weights" not in line]
    assert line.startswith("embed: error: ")
    return line.removeprefix("embed: error: ")


def hits(output: str) -> list[tuple[float, str]]:
    """Score and place of each passage that `search` has printed."""
    found = [line.split("  ", 1) for line in output.splitlines() if line and not line.startswith(" ")]
    return [(float(score), place) for score, place in found]


# Passages


def test_plain_text_is_split_at_blank_lines():
    assert list(embed.split_plain_text("\n\na\nb\n \t\nc\n")) == [(3, "a\nb"), (6, "c")]
    assert list(embed.split_plain_text(" \n\n")) == []


def test_long_paragraph_is_cut_behind_a_sentence_else_a_word_else_anywhere(monkeypatch):
    monkeypatch.setattr(embed, "MAX_CHARS", 20)
    assert list(embed.cut(1, "One two three. Four five. Six seven.")) == [
        (1, "One two three."),
        (1, "Four five. Six"),
        (1, "seven."),
    ]
    assert list(embed.cut(1, "one two three four five six")) == [(1, "one two three four"), (1, "five six")]
    assert list(embed.cut(1, "x" * 45)) == [(1, "x" * 20), (1, "x" * 20), (1, "x" * 5)]
    assert list(embed.cut(1, "一二三四五六七八九十一二三。四五六七八九十")) == [
        (1, "一二三四五六七八九十一二三。"),
        (1, "四五六七八九十"),
    ]
    assert list(embed.cut(7, "first line here\nsecond line here\nthird")) == [
        (7, "first line here"),
        (8, "second line here"),
        (9, "third"),
    ]


@given(st.text(alphabet="ab .\n。", max_size=300), st.integers(1, 40))
@settings(deadline=None)
def test_cut_loses_nothing_but_white_space(text, limit):
    limit_before, embed.MAX_CHARS = embed.MAX_CHARS, limit
    try:
        pieces = list(embed.cut(1, text))
    finally:
        embed.MAX_CHARS = limit_before
    assert "".join("".join(piece.split()) for _, piece in pieces) == "".join(text.split())
    assert all(0 < len(piece) <= limit for _, piece in pieces)


def test_markdown_headings_lead_their_passages():
    text = "intro\n\n# Title #\n## C#\npara one\nstill one\n\npara two\n### Next\npara three\n\n---\n\n# End\n"
    assert list(embed.split_markdown(text)) == [
        (1, "intro"),
        (5, "Title\nC#\n\npara one\nstill one\n\npara two"),
        (10, "Next\n\npara three"),
        (14, "End"),
    ]


def test_markdown_section_is_divided_when_too_long(monkeypatch):
    monkeypatch.setattr(embed, "MAX_CHARS", 30)
    text = "# T\n\nfirst paragraph\n\nsecond\n\nthird paragraph that is long. And has two sentences.\n"
    assert list(embed.split_markdown(text)) == [
        (3, "T\n\nfirst paragraph\n\nsecond"),
        (7, "T\n\nthird paragraph that is long."),
        (7, "T\n\nAnd has two sentences."),
    ]


def test_markdown_code_block_stays_whole(monkeypatch):
    monkeypatch.setattr(embed, "MAX_CHARS", 20)
    code = "````python\n# not a heading\n\nx = 1  # and a long comment behind it\n```\n---\n````"
    assert list(embed.split_markdown(f"Run:\n{code}\nafter")) == [(1, "Run:"), (2, code), (9, "after")]
    assert list(embed.split_markdown("~~~\n# never closed\n\n```\n")) == [(1, "~~~\n# never closed\n\n```\n")]
    assert list(embed.split_markdown("```a``` is inline\n# B\nc")) == [(1, "```a``` is inline"), (3, "B\n\nc")]


def test_markdown_front_matter_is_dropped():
    assert list(embed.split_markdown("---\nlicense: mit\n---\n# A\nb\n")) == [(5, "A\n\nb")]
    assert list(embed.split_markdown("---\nlicense: mit\n")) == [(2, "license: mit")]  # a rule, not front matter
    assert list(embed.split_markdown("")) == list(embed.split_markdown("---\na: b\n---\n")) == []


def test_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree")
    assert embed.read_passages([str(path)], "text") == [(str(path), 1, "one"), (str(path), 3, "two\nthree")]


def test_jsonl_rows(tmp_path):
    rows = [
        {"text": "a\u2028b"},
        {"title": "T", "text": "b"},
        {"title": "", "text": "c"},
        {"title": None, "text": "\ud800"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows + [{"text": " "}])
    assert [(line, text) for _, line, text in embed.read_passages([path], "text")] == [
        (1, "a\u2028b"),
        (2, "T\nb"),
        (3, "c"),
        (4, "\ufffd"),
    ]
    path = write(tmp_path / "b.jsonl", '\n{"title": "x", "text": "y", "body": "z"}\n')
    assert list(embed.read_rows(path, "title")) == [(2, "x")]
    assert list(embed.read_rows(path, "body")) == [(2, "x\nz")]


# Search


def test_search_prints_what_encode_finds(tmp_path, model_dir, tiny_model, capsys):
    files = [write(tmp_path / "a.txt", "\n\n".join(TEXTS)), write_rows(tmp_path / "b.jsonl", [{"text": "a summit"}])]
    query = "What is a summit?"
    scores = tiny_model.encode_document([*TEXTS, "a summit"]) @ tiny_model.encode_query(query)
    places = [f"{files[0]}:{line}" for line in (1, 3, 5, 7)] + [f"{files[1]}:1"]
    expected = [(scores[i], places[i]) for i in np.argsort(-scores)]
    assert np.ptp(scores) > 0.01  # the order says something

    assert embed.main(["search", query, *files, "--model", model_dir]) == 0
    output = capsys.readouterr().out
    assert [place for _, place in hits(output)] == [place for _, place in expected]
    assert [score for score, _ in hits(output)] == pytest.approx([score for score, _ in expected], abs=6e-5)
    assert all(text in output for text in TEXTS)


def test_search_arguments_reach_the_model(tmp_path, model_dir, tiny_model, capsys):
    path = write(tmp_path / "a.txt", "\n\n".join(TEXTS))
    command = ["search", TEXTS[3], path, "--model", model_dir]

    assert embed.main([*command, "--instruction", "", "--top_k", "1"]) == 0
    assert hits(capsys.readouterr().out) == [(1.0, f"{path}:7")]  # without an instruction the text finds itself

    assert embed.main([*command, "--instruction", "Find a pangram", "--max_length", "24", "--batch_size", "1"]) == 0
    query = tiny_model.encode(TEXTS[3], instruction="Find a pangram", max_length=24)
    expected = tiny_model.encode(TEXTS, max_length=24) @ query
    assert not np.allclose(expected, tiny_model.encode(TEXTS) @ query, atol=1e-3)  # the limit cuts something
    found = [score for score, _ in hits(capsys.readouterr().out)]
    assert found == pytest.approx(sorted(expected, reverse=True), abs=6e-5)


def test_search_shortens_and_cleans_what_it_prints(tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    path = write(tmp_path / "a.txt", "\x1b[31mred " + "word " * 150)
    assert embed.main(["search", "red", path, "--model", model_dir]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) == 5 and lines[1].strip().startswith("[31mred word") and lines[-1].endswith(" ...")
    assert max(map(len, lines[1:])) <= 60 and "\x1b" not in "".join(lines)


# Encode


def test_encode_writes_npy(tmp_path, model_dir, tiny_model, capsys):
    texts = ["one", "", "two words", " three"]
    path, output = write(tmp_path / "a.txt", "\n".join(texts) + "\n"), tmp_path / "a.npy"
    assert embed.main(["encode", path, "-o", str(output), "--model", model_dir]) == 0
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, tiny_model.encode(texts), atol=1e-6)
    assert capsys.readouterr().out == f"Wrote 4 vectors of 64 numbers to {output}\n"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.npy", tmp_path / "a.txt"]

    arguments = [
        "--instruction",
        "Do",
        "--truncate_dim",
        "6",
        "--no-normalize",
        "--max_length",
        "12",
        "--batch_size",
        "3",
    ]
    assert embed.main(["encode", path, "-o", str(output), "--model", model_dir, *arguments]) == 0
    expected = tiny_model.encode(texts, instruction="Do", truncate_dim=6, normalize_embeddings=False, max_length=12)
    assert not np.allclose(np.linalg.norm(expected, axis=-1), 1, atol=0.1)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


def test_encode_writes_parquet(tmp_path, model_dir, tiny_model):
    pq = pytest.importorskip("pyarrow.parquet")
    path = write_rows(tmp_path / "a.jsonl", [{"body": text} for text in ("one", "zwei 🙂", "", "\ud800")])
    output = tmp_path / "a.parquet"
    assert embed.main(["encode", path, "-o", str(output), "--text_column", "body", "--model", model_dir]) == 0
    table = pq.read_table(output)
    texts = ["one", "zwei 🙂", "", "\ufffd"]
    assert table.column_names == ["text", "embedding"] and table["text"].to_pylist() == texts
    np.testing.assert_allclose(table["embedding"].to_pylist(), tiny_model.encode(texts), atol=1e-6)


def test_dtype_reaches_the_model(tmp_path, model_dir, tiny_model):
    path, output = write(tmp_path / "a.txt", "\n".join(TEXTS)), tmp_path / "a.npy"
    assert embed.main(["encode", path, "-o", str(output), "--model", model_dir, "--dtype", "bfloat16"]) == 0
    vectors, expected = np.load(output), tiny_model.encode(TEXTS)
    assert vectors.dtype == np.float32 and not np.allclose(vectors, expected, atol=1e-4)
    assert (vectors * expected).sum(-1) == pytest.approx(1, abs=0.01)


def test_a_failing_write_leaves_the_old_output(tmp_path, model_dir, monkeypatch, capsys):
    path, output = write(tmp_path / "a.txt", "one\ntwo\n"), tmp_path / "a.npy"
    output.write_bytes(b"old")

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.replace", fail)
    error = error_of(["encode", path, "-o", str(output), "--model", model_dir], capsys)
    assert error == f"Cannot write {output}: Input/output error."
    assert output.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [output, tmp_path / "a.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_full_disk_is_told_with_the_file(tmp_path, model_dir, capsys, suffix):
    pytest.importorskip("pyarrow")
    path, output = write(tmp_path / "a.txt", "one\ntwo\n"), tmp_path / f"a.{suffix}"
    output.write_bytes(b"old")
    (tmp_path / f".a.{suffix}.{os.getpid()}.tmp").symlink_to("/dev/full")
    error = error_of(["encode", path, "-o", str(output), "--model", model_dir], capsys)
    assert error == f"Cannot write {output}: No space left on device."
    assert output.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [output, tmp_path / "a.txt"]


def test_what_was_cut_is_told(tmp_path, model_dir, capsys):
    path = write(tmp_path / "a.txt", "one\n" + "word " * 30 + "\nthree\n")
    assert embed.main(["encode", path, "-o", str(tmp_path / "a.npy"), "--model", model_dir]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embed: ")]
    assert "1 of 3 texts" in line and "1 by the encoder (at 40 tokens)" in line and "decoder" not in line
    assert embed.main(["search", "word " * 30, path, "--max_length", "60", "--model", model_dir]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embed: ")]
    assert "2 of 2 texts" in line and "2 by the decoder (at 60 tokens)" in line


# What users are told


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.txt", None, "There is no file {path}."),
        ("a.pdf", b"a", "{path} must end in one of .txt, .md, .markdown, .jsonl: the suffix tells how to read it."),
        ("a.txt", b"", "No passages in {path}: it holds no text. Leave it out, or fill it."),
        ("a.md", b"---\na: b\n---\n", "No passages in {path}: it holds no text. Leave it out, or fill it."),
        ("a.jsonl", b'{"text": ""}\n', "No passages in {path}: it holds no text. Leave it out, or fill it."),
        (
            "a.txt",
            b"ab\xe9",
            "{path} must be UTF-8 text, got byte 0xe9 at offset 2. Convert it, for example with iconv.",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            "{path}:3 must be a JSON object on one line, got '{{\"text\": \"b\"': Expecting ',' delimiter: line 1 column 13 "
            "(char 12)",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 1}\n',
            "{path}:2 must be an object with a string under 'text', got '{{\"text\": 1}}'. Name another field with "
            "--text_column.",
        ),
        (
            "a.jsonl",
            b'["text"]\n',
            "{path}:1 must be an object with a string under 'text', got '[\"text\"]'. Name another field with "
            "--text_column.",
        ),
    ],
)
def test_bad_input_files(tmp_path, capsys, loads, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    good = write(tmp_path / "good.txt", "fine")
    assert error_of(["search", "q", good, str(path)], capsys) == expected.format(path=path)
    assert loads == []


def test_unreadable_input(tmp_path, capsys):
    (tmp_path / "folder.txt").mkdir()
    path = str(tmp_path / "folder.txt")
    assert error_of(["search", "q", path], capsys) == f"Cannot read {path}: Is a directory."


def test_bad_outputs(tmp_path, capsys, monkeypatch, loads):
    path = write(tmp_path / "a.txt", "one")
    assert error_of(["encode", path, "-o", "a.csv"], capsys) == "--output must end in .npy or .parquet, got a.csv."
    output = tmp_path / "gone" / "a.npy"
    expected = f"There is no folder {output.parent} for {output}; make it first."
    assert error_of(["encode", path, "-o", str(output)], capsys) == expected
    (tmp_path / "folder.npy").mkdir()
    expected = f"--output must be a file, and {tmp_path / 'folder.npy'} is a folder."
    assert error_of(["encode", path, "-o", str(tmp_path / "folder.npy")], capsys) == expected
    output = tmp_path / ("a" * 250 + ".npy")
    assert error_of(["encode", path, "-o", str(output)], capsys) == f"Cannot write {output}: File name too long."
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    expected = "A .parquet output needs pyarrow: pip install pyarrow, or write .npy."
    assert error_of(["encode", path, "-o", str(tmp_path / "a.parquet")], capsys) == expected
    assert loads == []


def test_bad_encode_inputs(tmp_path, capsys, loads):
    output = tmp_path / "a.npy"
    output.write_bytes(b"old")
    path = write(tmp_path / "a.md", "# A")
    expected = f"{path} must end in one of .txt, .jsonl: the suffix tells how to read it."
    assert error_of(["encode", path, "-o", str(output)], capsys) == expected
    path = write(tmp_path / "a.txt", " \n\n")
    assert error_of(["encode", path, "-o", str(output)], capsys) == f"No texts in {path}: it is empty."
    assert loads == [] and output.read_bytes() == b"old"


def test_bad_models(tmp_path, capsys, backbone_dir):
    command = ["search", "q", write(tmp_path / "a.txt", "one"), "--model"]
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
    assert "max_length=2 leaves no room for text" in error_of([*command, "--max_length", "2"], capsys)
    assert loads == [(model_dir, "float32")] * 2 and not Path(output).exists()


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many"])
@pytest.mark.parametrize("option", ["--top_k", "--batch_size", "--max_length"])
def test_numbers_must_be_positive(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(["search", "q", "a.txt", f"{option}={value}"])
    assert stop.value.code == 2
    assert f"argument {option}: must be a whole number of at least 1, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 50])
def test_a_reader_that_has_gone_ends_it_in_silence(tmp_path, model_dir, monkeypatch, capsys, lines):
    """As of `search ... | head -1`: told when the output is written, or flushed at the end."""
    path = write(tmp_path / "a.txt", "\n\n".join(f"text {i} " * 50 for i in range(lines)))
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


def test_every_argument_has_help():
    parser = embed.build_parser()
    commands = parser._subparsers._group_actions[0].choices
    assert set(commands) == {"search", "encode"}
    assert all(action.help for command in commands.values() for action in command._actions)


def test_help_needs_nothing_installed():
    """So nothing heavy is imported before it is used: -S hides site-packages."""
    command = [sys.executable, "-S", "-m", "scripts.embed", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "search" in run.stdout and "encode" in run.stdout
