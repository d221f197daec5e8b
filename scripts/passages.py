"""Finds the documents under some folders and cuts them into passages that a model can read whole.

Text and Markdown are read in parts, tables row by row, so that their size does not matter; HTML, PDF and Word documents
become Markdown by markitdown. semantic-text-splitter cuts, counting the decoder's tokens. Invariant: nothing is left out in
silence: what is not read is counted or named.
"""

import codecs
import hashlib
import io
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.tables import KINDS, byte_order_encoding, needs, open_text, read_rows


MARKDOWN = (".md", ".markdown")
CONVERTED = {  # markitdown's converter, and the largest file that memory is taken for
    ".html": ("HtmlConverter", 1 << 25),
    ".htm": ("HtmlConverter", 1 << 25),
    ".pdf": ("PdfConverter", 1 << 29),
    ".docx": ("DocxConverter", 1 << 29),
}
SUFFIXES = (*MARKDOWN, *KINDS, *CONVERTED)
PART = 1 << 14  # characters cut at a time: without white space between them, the time grows with the square of it
ROWS = 256  # of a table, read at a time
HEADINGS = re.compile(r"(?:#{1,6} [^\n]*(?:\n+|\Z))+")  # of Markdown, and nothing else


class Passage(NamedTuple):
    """
    A text and where it stands.

    Args:
        line: Where it begins in a text, or its row in a table. `None` where there are no lines.
        page: Of a PDF, where it tells its pages.
    """

    path: str
    line: int | None
    page: int | None
    text: str


class Found(NamedTuple):
    """
    What stands under some folders.

    Args:
        files: Absolute paths, in order.
        passed_over: How many files and folders of which kind are no documents.
        unreadable: What is wrong, of each file or folder that should be read and cannot.
    """

    files: list[str]
    passed_over: Counter
    unreadable: dict[str, str]


class Facts(NamedTuple):
    """What a file held when it was read, and in which encoding, of a text."""

    digest: str
    encoding: str | None


def walk(roots: Iterable[str]) -> Found:
    """
    Finds documents by their suffix, each once. Links, which may lead in circles, and hidden files are followed and read only
    where they are named as a root.

    Raises:
        ValueError: a root is not there, or is a file that is no document.
    """
    files, passed_over, unreadable = {}, Counter(), {}

    def fail(error: OSError) -> None:
        unreadable[error.filename] = error.strerror

    for root in map(os.path.abspath, roots):
        if not os.path.isdir(root):
            if not os.path.isfile(root):
                raise ValueError(f"There is no file or folder {root}.")
            if Path(root).suffix.lower() not in SUFFIXES:
                raise ValueError(f"{root} must end in one of {', '.join(SUFFIXES)}: the suffix tells how to read it.")
            files[root] = None
            continue
        for folder, subfolders, names in os.walk(root, onerror=fail):
            hidden = [name for name in subfolders if name.startswith(".")]
            passed_over["hidden"] += len(hidden)
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            passed_over["links"] += len(links)
            # A folder that ends in .lance holds vectors.
            kept = {*subfolders} - {*hidden, *links, *(name for name in subfolders if name.endswith(".lance"))}
            subfolders[:] = sorted(kept)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if kind := why_not(path):
                    passed_over[kind] += 1
                else:
                    files[path] = None
    for path in [path for path in files if path != path.encode(errors="replace").decode()]:
        del files[path]
        unreadable[path] = "its name is not UTF-8"
    return Found([*files], +passed_over, unreadable)


def why_not(path: str) -> str | None:
    """Why a file is passed over, if it is."""
    if os.path.basename(path).startswith("."):
        return "hidden"
    if os.path.islink(path):
        return "links"
    return None if Path(path).suffix.lower() in SUFFIXES and os.path.isfile(path) else "of other kinds"


def examine(path: str) -> Facts:
    """
    Reads a file once, in parts. What is no UTF-8 and has no byte order mark is taken for Windows-1252, of which Latin-1 is a
    part.

    Raises:
        ValueError: it cannot be read, or is a text's only by its name.
    """
    suffix, digest = Path(path).suffix.lower(), hashlib.blake2b(digest_size=16)
    is_text = suffix not in (".pdf", ".docx", ".parquet")
    decoder, encoding = codecs.getincrementaldecoder("utf-8")(), None
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                if is_text and file.tell() == len(part):
                    encoding = byte_order_encoding(part) or "utf-8"
                    if encoding in ("utf-8", "utf-8-sig") and part.count(0, 0, 8192) > len(part[:8192]) // 8:
                        raise ValueError(f"{path} is no text: it has too many NUL bytes.")
                if encoding == "utf-8":
                    try:
                        decoder.decode(part)
                    except UnicodeDecodeError:
                        encoding = "cp1252"
                digest.update(part)
            if encoding == "utf-8" and decoder.getstate()[0]:  # half a character at the end
                encoding = "cp1252"
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror or error}.") from error
    return Facts(digest.hexdigest(), encoding)


class Splitters:
    """
    Cuts texts into passages.

    Args:
        tokenizer: Whose tokens are counted; a model's `processor.tokenizer`.
        tokens (`int`): Most of them in a passage.
    """

    def __init__(self, tokenizer, tokens: int):
        library = needs("semantic_text_splitter", "semantic-text-splitter", "Passages")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        makers = library.TextSplitter, library.MarkdownSplitter
        if backend is None:  # a tokenizer in Python
            count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
            self.text, self.markdown = (maker.from_callback(count, tokens) for maker in makers)
        else:
            self.text, self.markdown = (maker.from_huggingface_tokenizer(backend, tokens) for maker in makers)


def default_tokens(limits: dict[str, int]) -> int:
    """
    How many of the decoder's tokens a passage has: so many that both towers read nearly all passages whole, although the
    encoder counts tokens of its own and a row has a template. `limits` are a processor's.
    """
    return max(1, min(limits.values()) * 3 // 4)


def read_passages(path: str, splitters: Splitters, text_column: str, encoding: str | None) -> Iterator[Passage]:
    """
    The passages of a document, in order.

    Args:
        encoding (`str`, *optional*): Of a text, as [`examine`] has found it.

    Raises:
        ValueError: it cannot be read, in whole or in part.
    """
    suffix = Path(path).suffix.lower()
    splitter = splitters.markdown if suffix in MARKDOWN or suffix in CONVERTED else splitters.text
    if suffix in CONVERTED:
        pages = convert(path, encoding).split("\f")
        for page, text in enumerate(pages, 1):
            for _, piece in split(splitter, [text]):
                yield Passage(path, None, page if len(pages) > 1 else None, piece)
    elif suffix in MARKDOWN or suffix == ".txt":
        with open_text(path, "utf-8-sig" if encoding == "utf-8" else encoding, None) as file:
            for line, piece in split(splitter, read_parts(file)):
                yield Passage(path, line, None, piece)
    else:
        for rows in read_rows(path, text_column, ROWS, encoding=encoding):
            for line, text in zip(rows.lines, rows.texts, strict=True):
                for _, piece in split(splitter, read_parts(io.StringIO(text))):
                    yield Passage(path, line, None, piece)


def read_parts(file: io.TextIOBase) -> Iterator[str]:
    """A text in parts of at most `PART` characters, which end behind a paragraph, a line or a word where there is one."""
    rest = ""
    try:
        while part := file.read(PART - len(rest)):
            rest += part
            if len(rest) < PART:
                continue
            ends = (rest.rfind(bound, PART // 2) + len(bound) for bound in ("\n\n", "\n", " "))
            end = next((end for end in ends if end > PART // 2), PART)
            yield rest[:end]
            rest = rest[end:]
    except UnicodeError as error:
        tried = "neither UTF-8 nor Windows-1252" if file.encoding == "cp1252" else f"no {file.encoding.upper()}"
        raise ValueError(f"{file.name} is {tried}: {error}") from error
    if rest:
        yield rest


def split(splitter, parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Line number and text of each passage. A heading that would stand alone leads the next one; NULs become spaces."""
    line = 1
    for part in parts:
        part = part.replace("\0", " ")
        position, heading = 0, None
        for start, piece in splitter.chunk_indices(part):
            if HEADINGS.fullmatch(piece) and start + len(piece) < len(part.rstrip()):
                heading = start if heading is None else heading
                continue
            begin = start if heading is None else heading
            line += part.count("\n", position, begin)
            yield line, part[begin : start + len(piece)]
            position, heading = begin, None
        line += part.count("\n", position)


def convert(path: str, encoding: str | None) -> str:
    """An HTML, PDF or Word document as Markdown, with form feeds between the pages of a PDF that tells them."""
    name, most = CONVERTED[Path(path).suffix.lower()]
    converters = needs("markitdown.converters", "markitdown[pdf,docx]", "HTML, PDF and Word files")
    from markitdown import StreamInfo

    try:
        size = os.path.getsize(path)
        if name == "DocxConverter":
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
        if size > most:
            raise ValueError(f"it has more than {most >> 20} MiB")
        data, charset = Path(path).read_bytes(), None
        if name == "HtmlConverter":
            charset = encoding
            if encoding == "cp1252":  # unless it says what it is
                from bs4.dammit import EncodingDetector

                charset = EncodingDetector.find_declared_encoding(data, is_html=True) or encoding
        logging.getLogger("pdfminer").setLevel(logging.ERROR)  # its warnings name no file
        return getattr(converters, name)().convert(io.BytesIO(data), StreamInfo(charset=charset)).markdown
    except Exception as error:  # the readers raise errors of all kinds on a damaged file
        raise ValueError(f"Cannot read {path}: {str(error) or type(error).__name__}") from error
