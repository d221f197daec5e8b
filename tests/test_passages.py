"""Documents found under folders, read whatever they are, and cut into passages with the place where each stands."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import passages
from scripts.passages import HEADINGS, Splitters, default_tokens, examine, read_parts, read_passages, walk


@pytest.fixture(scope="module")
def splitters(tiny_model):
    pytest.importorskip("semantic_text_splitter")
    return Splitters(tiny_model.processor.tokenizer, 40)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def passages_of(path: str, splitters: Splitters, text_column: str = "text") -> list[tuple]:
    found = [*read_passages(path, splitters, text_column, examine(path).encoding)]
    assert all(passage.path == path for passage in found)
    return [tuple(passage[1:]) for passage in found]


def pdf(pages: list[str]) -> bytes:
    """A PDF with a line on each page."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF"
    return data + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def docx(paragraphs: list[str]) -> bytes:
    """A Word document of some paragraphs."""
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    schemas = "http://schemas.openxmlformats.org"
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    files = {
        "[Content_Types].xml": f'<Types xmlns="{schemas}/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{schemas}/package/2006/relationships"><Relationship Id="rId1" '
        f'Type="{schemas}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{schemas}/wordprocessingml/2006/main"><w:body>{body}</w:body></w:document>',
    }
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


# Found


def test_folders_are_walked_and_what_is_passed_over_is_counted(tmp_path):
    documents = [write(tmp_path / name, "a") for name in ("b/a.md", "b/c/d.PDF", "b/e.jsonl", "z.txt")]
    for name in (".git/a.md", "b/.hidden.txt", "picture.png", "Makefile", "my.lance/data/a.txt"):
        write(tmp_path / name, "a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "link.md").symlink_to(documents[0])
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    found = walk([str(tmp_path)])
    assert found.files == [documents[3], *documents[:1], documents[2], documents[1]]
    assert found.passed_over == {"hidden": 2, "of other kinds": 3, "links": 3} and not found.unreadable
    assert walk([documents[0], str(tmp_path / "b"), documents[0]]).files == [documents[0], documents[2], documents[1]]
    assert walk([str(tmp_path / "b" / "link.md")]).files == [str(tmp_path / "b" / "link.md")]  # it is named


def test_roots_must_be_documents(tmp_path):
    with pytest.raises(ValueError, match="There is no file or folder .*gone"):
        walk([str(tmp_path / "gone")])
    with pytest.raises(ValueError, match=r"a.png must end in one of .md, .*\.docx: the suffix tells how to read it"):
        walk([write(tmp_path / "a.png", "a")])


def test_what_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "open" / "a.txt", "a")
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    bad = os.fsencode(tmp_path / "open") + b"/\xff.txt"
    Path(os.fsdecode(bad)).write_text("a")
    found = walk([str(tmp_path)])
    assert found.files == [str(tmp_path / "open" / "a.txt")]
    assert found.unreadable == {str(tmp_path / "shut"): "Permission denied", os.fsdecode(bad): "its name is not UTF-8"}


# Read


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"", None),
        ("naïve 日本".encode(), "utf-8"),
        ("naïve".encode("utf-8-sig"), "utf-8-sig"),
        ("naïve".encode("utf-16"), "utf-16"),
        (b"\xfe\xff" + "naïve".encode("utf-16-be"), "utf-16"),
        ("naïve".encode("utf-32"), "utf-32"),
        ("naïve".encode("latin-1"), "cp1252"),
        (b"a" * (1 << 20) + "ï".encode() + b"a", "utf-8"),
        (b"a" * ((1 << 20) - 1) + "ï".encode() + b"a", "utf-8"),  # a character over the end of what is read at a time
        (b"a" * (1 << 20) + b"\xef", "cp1252"),
        (b"some text and a \0", "utf-8"),
    ],
)
def test_encodings(tmp_path, splitters, content, encoding):
    path = write(tmp_path / "a.txt", content)
    assert examine(path).encoding == encoding
    if content and len(content) < 100:
        ((line, page, text),) = passages_of(path, splitters)
        assert (line, page) == (1, None) and text.split()[0] in ("naïve", "some") and "\0" not in text


def test_what_is_no_text_is_refused(tmp_path, splitters):
    with pytest.raises(ValueError, match="a.txt is no text: it has too many NUL bytes"):
        examine(write(tmp_path / "a.txt", b"\x7fELF\2\1\0\0\0\0\0\0\0\0"))
    with pytest.raises(ValueError, match="b.txt is no text: it has too many NUL bytes"):
        examine(write(tmp_path / "b.txt", "utf-16 without a mark".encode("utf-16-le")))
    with pytest.raises(ValueError, match="c.md is neither UTF-8 nor Windows-1252: "):
        passages_of(write(tmp_path / "c.md", b"\x81\x8d"), splitters)
    with pytest.raises(ValueError, match="Cannot read .*folder.txt: Is a directory"):
        (tmp_path / "folder.txt").mkdir()
        examine(str(tmp_path / "folder.txt"))


def test_the_digest_is_of_the_whole_file(tmp_path):
    first, second = (write(tmp_path / f"{end}.txt", "a" * (3 << 20) + end) for end in "bc")
    assert examine(first).digest != examine(second).digest
    assert examine(first).digest == examine(write(tmp_path / "d.md", "a" * (3 << 20) + "b")).digest


# Cut


def test_passages_have_their_lines_and_fit(tmp_path, splitters, tiny_model):
    text = "\r\n".join(f"Line {i} says what it says." for i in range(1, 41))
    found = passages_of(write(tmp_path / "a.txt", text), splitters)
    assert len(found) > 5 and found[0][0] == 1
    for line, page, piece in found:
        assert page is None and piece.startswith(f"Line {line} ")
        assert 0 < len(tiny_model.processor.tokenizer(piece, add_special_tokens=False)["input_ids"]) <= 40
    assert [line for _, _, piece in found for line in piece.split("\n")] == text.split("\r\n")


def test_a_heading_stands_with_what_follows(tmp_path, splitters):
    words = "these words are many, and they are too many to stand with others. " * 2
    path = write(tmp_path / "a.md", f"# A\n\n## B\n\n{words}\n\n# C\n\n```\n# no heading\n```\n\n# D\n")
    found = passages_of(path, splitters)
    assert found[0][0] == 1 and found[0][2].startswith("# A\n\n## B\n\nthese words")
    assert "".join("".join(piece.split()) for _, _, piece in found) == "".join(Path(path).read_text().split())
    assert not any(HEADINGS.fullmatch(piece) for _, _, piece in found[:-1])
    assert not HEADINGS.fullmatch("# " * 50_000 + "\nx")  # and is told at once


@given(st.text(alphabet="ab .\n。é😀\u0301", max_size=400), st.integers(8, 60))
@settings(deadline=None, max_examples=50)
def test_parts_and_passages_lose_nothing_but_white_space(splitters, text, size):
    before, passages.PART = passages.PART, size
    try:
        parts = [*read_parts(io.StringIO(text, newline="\n"))]
    finally:
        passages.PART = before
    assert "".join(parts) == text and all(0 < len(part) <= size for part in parts)
    pieces = [*passages.split(splitters.text, parts)]
    assert "".join("".join(piece.split()) for _, piece in pieces) == "".join(text.split())
    lines = text.split("\n")
    assert all(lines[line - 1].find(piece.split("\n")[0]) >= 0 for line, piece in pieces)


def test_rows_are_passages_and_long_ones_are_cut(tmp_path, splitters):
    path = write(tmp_path / "a.jsonl", '{"text": "short"}\n\n{"text": " "}\n{"text": "' + "long words " * 30 + '"}\n')
    found = passages_of(path, splitters)
    assert found[0] == (1, None, "short") and len(found) > 3 and {line for line, _, _ in found[1:]} == {4}
    assert passages_of(write(tmp_path / "a.csv", "body\ncaf\xe9".encode("latin-1")), splitters, "body") == [
        (2, None, "café")
    ]


def test_documents_are_converted(tmp_path, splitters):
    pytest.importorskip("markitdown")
    page = "<html><head><title>x</title><script>no()</script></head><body><h1>Top</h1><p>caf\xe9</p></body></html>"
    assert passages_of(write(tmp_path / "a.html", page), splitters) == [(None, None, "# Top\n\ncafé")]
    assert passages_of(write(tmp_path / "b.htm", page.encode("latin-1")), splitters) == [(None, None, "# Top\n\ncafé")]
    declared = '<meta charset="shift_jis"><p>日本</p>'.encode("shift_jis")
    assert passages_of(write(tmp_path / "c.html", declared), splitters) == [(None, None, "日本")]
    path = write(tmp_path / "a.pdf", pdf(["The first page", "Of the second"]))
    assert passages_of(path, splitters) == [(None, 1, "The first page"), (None, 2, "Of the second")]
    assert passages_of(write(tmp_path / "a.docx", docx(["One", "Two"])), splitters) == [(None, None, "One\n\nTwo")]
    assert passages_of(write(tmp_path / "empty.html", ""), splitters) == []


def test_damaged_documents_are_named(tmp_path, splitters, monkeypatch):
    pytest.importorskip("markitdown")
    for name in ("a.pdf", "a.docx"):
        for content in (b"", b"%PDF-1.4 and no more", docx(["a"])[:200]):
            with pytest.raises(ValueError, match=f"Cannot read .*{name}: "):
                passages_of(write(tmp_path / name, content), splitters)
    monkeypatch.setitem(passages.CONVERTED, ".docx", ("DocxConverter", 1 << 20))
    bomb = docx(["a" * (1 << 21)])
    assert len(bomb) < 1 << 16
    with pytest.raises(ValueError, match="bomb.docx: it has more than 1 MiB"):
        passages_of(write(tmp_path / "bomb.docx", bomb), splitters)


def test_deep_html_does_no_harm(tmp_path, splitters):
    pytest.importorskip("markitdown")
    path = write(tmp_path / "a.html", "<div>" * 3000 + "deep" + "</div>" * 3000)
    with pytest.warns(UserWarning, match="too deeply nested"):
        assert passages_of(path, splitters) == [(None, None, "deep")]


def test_sizes_follow_the_smaller_tower():
    assert default_tokens({"decoder": 512, "encoder": 256}) == 192
    assert default_tokens({"decoder": 1, "encoder": 512}) == 1
