"""Searches and encodes text files with a Causal2Vec checkpoint, from the command line.

    python -m scripts.embed search "how is the model trained" README.md notes.txt corpus.jsonl
    python -m scripts.embed encode sentences.txt -o vectors.npy

`search` cuts the files into passages and prints those with the highest cosine to the query. `encode` writes one vector
per line of a .txt file or row of a .jsonl file. Invariants: a file that gives nothing is an error, never skipped; an
output file is replaced by a complete one or left alone.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scripts.exits import exit_code
from serving.loading import load_model


ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "bfloat16", "float16", "auto")
MAX_CHARS = 1000  # of a passage; some 250 tokens of English, half of what the bundled model reads

HEADING = re.compile(r" {0,3}#{1,6}(?:\s+|$)(.*?)(?:\s+#+)?\s*$")
FENCE = re.compile(r"\s*(`{3,}|~{3,})[^`]*$")  # opens a code block
BLOCK_START = re.compile(f"{HEADING.pattern}|{FENCE.pattern}")  # ends a paragraph without a blank line
RULE = re.compile(r" {0,3}([-*_])(\s*\1){2,}\s*$")  # a thematic break such as ---
# Where a long text may be cut, best first: behind a sentence or a line, behind white space.
BOUNDS = (re.compile(r"[.!?]['\")\]]*\s+|[。！？]|\n"), re.compile(r"\s+"))


class Passage(NamedTuple):
    """A text and where it stands."""

    path: str
    line: int
    text: str


def split_plain_text(text: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each paragraph, cut where it is longer than `MAX_CHARS`."""
    for blank, group in groupby(enumerate(text.split("\n"), 1), key=lambda item: not item[1].strip()):
        if not blank:
            numbers, lines = zip(*group, strict=True)
            yield from cut(numbers[0], "\n".join(lines))


def cut(line: int, text: str) -> Iterator[tuple[int, str]]:
    """Pieces of at most `MAX_CHARS`: cut at the last good bound in their second half, without one anywhere."""
    start = 0
    while start < len(text):
        end = start + MAX_CHARS
        if end < len(text):
            for bound in BOUNDS:
                ends = [match.end() for match in bound.finditer(text, start + MAX_CHARS // 2, end)]
                if ends:
                    end = ends[-1]
                    break
        if piece := text[start:end].strip():
            yield line, piece
        line += text.count("\n", start, end)
        start = end


def split_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each passage: a heading and the blocks under it, as many as fit into `MAX_CHARS`.

    A heading leads every passage of its section; headings without a block between them stand together. A code block is
    never cut. YAML front matter and thematic breaks are dropped.
    """
    is_heading, title_line, title = False, 0, ""
    for is_heading, group in groupby(markdown_blocks(text.split("\n")), key=lambda block: block[0] == "heading"):
        blocks = list(group)
        if is_heading:
            title_line, title = blocks[0][1], "\n".join(block for _, _, block in blocks)
            continue
        for line, body in join_blocks(blocks):
            yield line, f"{title}\n\n{body}" if title else body
    if is_heading:  # nothing follows the last one
        yield title_line, title


def markdown_blocks(lines: list[str]) -> Iterator[tuple[str, int, str]]:
    """Kind ("heading", "code" or "text"), line number and text of each block."""
    position = front_matter_length(lines)
    while position < len(lines):
        start, line = position, lines[position]
        position += 1
        if fence := FENCE.match(line):
            closing = re.compile(rf"\s*{fence[1]}{fence[1][0]}*\s*$")
            while position < len(lines) and not closing.match(lines[position]):
                position += 1
            position += 1  # the closing line; an unclosed block runs to the end of the file
            yield "code", start + 1, "\n".join(lines[start:position])
        elif heading := HEADING.match(line):
            if heading[1]:
                yield "heading", start + 1, heading[1]
        elif line.strip() and not RULE.match(line):
            while position < len(lines) and lines[position].strip() and not BLOCK_START.match(lines[position]):
                position += 1
            yield "text", start + 1, "\n".join(lines[start:position])


def front_matter_length(lines: list[str]) -> int:
    """How many lines the YAML front matter takes, its two markers included; 0 without any."""
    if lines[0].rstrip() != "---":
        return 0
    return next((number for number, line in enumerate(lines[1:], 2) if line.rstrip() in ("---", "...")), 0)


def join_blocks(blocks: list[tuple[str, int, str]]) -> Iterator[tuple[int, str]]:
    """Cuts what is too long, code aside, and joins neighbours as long as they fit into `MAX_CHARS` together."""
    first, body = 0, ""
    for kind, start, block in blocks:
        for line, piece in [(start, block)] if kind == "code" else cut(start, block):
            if body and len(body) + len(piece) + 2 > MAX_CHARS:
                yield first, body
                body = ""
            first, body = (first, f"{body}\n\n{piece}") if body else (line, piece)
    yield first, body


def read_text(path: str) -> str:
    """The text of a UTF-8 file, with `\\n` as its only line end."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start}. Convert it, "
            f"for example with iconv."
        ) from error
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: str, text_column: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each row of a .jsonl file; a title, where there is one, is the text's first line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} must be a JSON object on one line, got {line!r:.80}: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            raise ValueError(
                f"{path}:{number} must be an object with a string under {text_column!r}, got {line!r:.80}. Name another "
                f"field with --text_column."
            )
        title = row.get("title") if text_column != "title" else None
        text = f"{title}\n{row[text_column]}" if isinstance(title, str) and title else row[text_column]
        yield number, re.sub("[\ud800-\udfff]", "\ufffd", text)  # JSON escapes can hold half a character


def reader_for(path: str, readers: dict[str, Callable]) -> Callable:
    """The entry of `readers` for the file's suffix."""
    suffix = Path(path).suffix.lower()
    if not Path(path).exists():
        raise ValueError(f"There is no file {path}.")
    if suffix not in readers:
        raise ValueError(f"{path} must end in one of {', '.join(readers)}: the suffix tells how to read it.")
    return readers[suffix]


def read_passages(paths: list[str], text_column: str) -> list[Passage]:
    """The passages of all files, in order."""
    readers = {
        ".txt": lambda path: split_plain_text(read_text(path)),
        ".md": lambda path: split_markdown(read_text(path)),
        ".markdown": lambda path: split_markdown(read_text(path)),
        ".jsonl": lambda path: ((line, text) for line, text in read_rows(path, text_column) if text.strip()),
    }
    passages: list[Passage] = []
    for path in paths:
        found = [Passage(path, line, text) for line, text in reader_for(path, readers)(path)]
        if not found:
            raise ValueError(f"No passages in {path}: it holds no text. Leave it out, or fill it.")
        passages += found
    return passages


def search(args: argparse.Namespace) -> None:
    """Prints the passages that are nearest to the query."""
    passages = read_passages(args.files, args.text_column)
    model = load_model(args.model, args.dtype)
    limits = {"batch_size": args.batch_size, "max_length": args.max_length, "truncation": "silent"}
    query = model.encode_query(args.query, instruction=args.instruction, **limits)  # (dim,)
    scores = model.encode_document([passage.text for passage in passages], **limits) @ query  # (passages,)
    tell_truncated(model, len(passages) + 1, args.max_length)
    width = min(shutil.get_terminal_size().columns, 120)
    for index in (-scores).argsort(kind="stable")[: args.top_k]:
        path, line, text = passages[index]
        text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)  # control characters would reach the terminal
        shown = textwrap.wrap(text, max(width - 8, 20), max_lines=4, placeholder=" ...")
        print(f"{scores[index]:.4f}  {path}:{line}", *shown, sep="\n        ", end="\n\n")


def encode(args: argparse.Namespace) -> None:
    """Writes the vectors of a file's texts."""
    output = Path(args.output)
    if output.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--output must end in .npy or .parquet, got {output}.")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} for {output}; make it first.")
    if output.is_dir():
        raise ValueError(f"--output must be a file, and {output} is a folder.")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("A .parquet output needs pyarrow: pip install pyarrow, or write .npy.")
    readers = {
        ".txt": lambda path: read_text(path).removesuffix("\n").split("\n"),
        ".jsonl": lambda path: [text for _, text in read_rows(path, args.text_column)],
    }
    texts = reader_for(args.input, readers)(args.input)
    if not any(text.strip() for text in texts):
        raise ValueError(f"No texts in {args.input}: it is empty.")

    with new_file(output) as file:
        model = load_model(args.model, args.dtype)
        vectors = model.encode(
            texts,
            instruction=args.instruction,
            batch_size=args.batch_size,
            max_length=args.max_length,
            normalize_embeddings=args.normalize,
            truncate_dim=args.truncate_dim,
            truncation="silent",
        )  # (texts, dim)
        with naming(output):
            write_vectors(file, output.suffix, texts, vectors)
    tell_truncated(model, len(texts), args.max_length)
    print(f"Wrote {vectors.shape[0]} vectors of {vectors.shape[1]} numbers to {output}")


def tell_truncated(model, total: int, max_length: int | None) -> None:
    """One line on standard error when texts were read only in part."""
    from tokenization_utils import describe_cut

    if model.truncated:
        told = describe_cut(model.truncated, total, model.processor.limits(max_length))
        print(f"embed: {told}", file=sys.stderr)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror or error}.") from error


@contextmanager
def new_file(output: Path) -> Iterator[BinaryIO]:
    """A file to write; it takes the place of `output` if all goes well, and is removed otherwise."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with naming(output):
        file = open(temporary, "wb")
    try:
        yield file
        with naming(output):
            file.close()
            os.replace(temporary, output)
    finally:
        with suppress(OSError):  # of a full disk, which is told already
            file.close()
        temporary.unlink(missing_ok=True)


def write_vectors(file: BinaryIO, suffix: str, texts: list[str], vectors) -> None:
    """Writes .npy, the vectors alone, or .parquet with the columns `text` and `embedding`."""
    if suffix == ".npy":
        import numpy as np

        header = np.lib.format.header_data_from_array_1_0(vectors)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(vectors.data)  # np.save writes past Python, and cannot say why the disk took no more
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "embedding": embedding}), file)
    file.flush()


def positive(value: str) -> int:
    """A whole number above 0, for argparse."""
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {value!r}")
    return int(value)


def build_parser() -> argparse.ArgumentParser:
    """The two commands and their arguments."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    add("--batch_size", type=positive, default=32, help="texts per forward pass (default: 32)")
    add("--dtype", choices=DTYPES, default="float32", help="of the computation; auto: as saved (default: float32)")
    add("--max_length", type=positive, help="longest decoder input in tokens (default: the checkpoint's)")
    add("--text_column", default="text", help="field of a .jsonl row that holds the text (default: text)")

    parser = argparse.ArgumentParser(prog="python -m scripts.embed", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    searching = commands.add_parser("search", parents=[common], help="print the passages nearest to a query")
    searching.set_defaults(run=search)
    add = searching.add_argument
    add("query", help="what to look for")
    add("files", nargs="+", help="files to look in: .txt, .md or .jsonl")
    add("--instruction", help="task of the query; '' for none (default: the checkpoint's for queries)")
    add("--top_k", type=positive, default=5, help="passages to print (default: 5)")

    encoding = commands.add_parser("encode", parents=[common], help="write the vectors of a file's texts")
    encoding.set_defaults(run=encode)
    add = encoding.add_argument
    add("input", help="a .txt file with a text per line, or a .jsonl file with one per row")
    add("-o", "--output", required=True, help="file to write: .npy, or .parquet with the texts")
    add("--instruction", help="task of all texts (default: none)")
    add("--truncate_dim", type=positive, help="numbers to keep of each vector (default: all)")
    add("--normalize", action=argparse.BooleanOptionalAction, default=True, help="scale to length 1 (default: yes)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; see [`exit_code`] for what it returns."""
    args = build_parser().parse_args(argv)
    return exit_code("embed", lambda: args.run(args))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode still shows the rest
    sys.exit(main())
