"""Indexes, searches and encodes files with a Causal2Vec checkpoint, from the command line.

    python -m scripts.embed index docs notes --db my.lance
    python -m scripts.embed search "how is the model trained" --db my.lance
    python -m scripts.embed search "how is the model trained" README.md docs
    python -m scripts.embed encode corpus.jsonl -o vectors.parquet

`index` keeps the passages of documents and their vectors in a LanceDB table, and embeds only what is new at the next call.
`search` prints the passages with the highest cosine to the query, of an index or of files that it embeds for the occasion.
`encode` writes one vector per row of a file. Invariants: what cannot be read is named and ends in exit code 2, an output is
replaced by a complete one or left alone, and files are read in parts, so that they may have any size.
"""

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from scripts.cli import exit_code, positive
from scripts.index import BATCH, Index, UnreadableFile, Update, check_name, locked
from scripts.passages import Found, Passage, Splitters, default_tokens, examine, read_passages, walk
from scripts.tables import KINDS, read_rows
from scripts.writers import Parts, check_output
from serving.loading import DTYPES, load_model
from serving.precision import PRECISIONS, check_precision, store


ROOT = Path(__file__).resolve().parent.parent


def search(args: argparse.Namespace) -> None:
    """Prints the passages that are nearest to a query."""
    if bool(args.files) == bool(args.db):
        raise ValueError("Say where to look: files and folders, or an index by --db, and not both.")
    if args.files and (args.hybrid or args.query == "-"):
        raise ValueError(
            "--hybrid and queries from standard input need an index: python -m scripts.embed index, then --db."
        )
    if args.files:
        search_files(args)
    else:
        search_index(args)


def search_index(args: argparse.Namespace) -> None:
    """Searches an index; nothing but the query is embedded."""
    index = Index(args.db)
    model = load_model(args.model, args.dtype, args.revision)
    index.check(model.fingerprint(), ignore=("instruction", "dimensions", "max_length"))
    limits = {"max_length": args.max_length, "truncate_dim": index.fingerprint["dimensions"]}
    queries = [args.query] if args.query != "-" else filter(None, (line.strip() for line in sys.stdin))
    for query in queries:
        vector = model.encode_query(query, instruction=args.instruction, **limits)  # (dim,)
        hits = index.search(vector, args.top_k, query if args.hybrid else None)
        show(args, query, [(hit.score, Passage(*hit[1:])) for hit in hits])


def search_files(args: argparse.Namespace) -> None:
    """Embeds the passages of files, and keeps the best of them."""
    found = walk(args.files)
    encodings, errors = {}, dict(found.unreadable)
    for path in found.files:
        try:
            encodings[path] = examine(path).encoding
        except ValueError as error:
            errors[path] = str(error)
    model = load_model(args.model, args.dtype, args.revision) if encodings else None
    best: list[tuple[float, Passage]] = []
    total = 0
    if model is not None:
        limits = {"batch_size": args.batch_size, "max_length": args.max_length, "truncation": "silent"}
        query = model.encode_query(args.query, instruction=args.instruction, **limits)  # (dim,)
        splitters = Splitters(model.processor.tokenizer, default_tokens(model.processor.limits(args.max_length)))
        passages = chain.from_iterable(
            readable(path, splitters, args.text_column, encoding, errors) for path, encoding in encodings.items()
        )
        while batch := list(islice(passages, BATCH)):
            scores = model.encode_document([passage.text for passage in batch], **limits) @ query  # (passages,)
            best = sorted([*best, *zip(map(float, scores), batch)], key=lambda hit: -hit[0])[: args.top_k]
            total += len(batch)
        tell_truncated(model, total + 1, args.max_length)
    tell_found(found, [path for path, encoding in encodings.items() if encoding == "cp1252" and path not in errors])
    if total:
        show(args, args.query, best)
    refuse_unreadable(errors)
    if not total:
        raise ValueError(f"There is no text in {', '.join(args.files)}.")


def readable(
    path: str, splitters: Splitters, text_column: str, encoding: str | None, errors: dict[str, str]
) -> Iterator[Passage]:
    """The passages of a file up to an error, which is noted."""
    try:
        yield from read_passages(path, splitters, text_column, encoding)
    except ValueError as error:
        errors[path] = str(error)


def index(args: argparse.Namespace) -> None:
    """Brings an index up to date with files and folders."""
    from transformers.utils.logging import tqdm

    check_name(args.db)
    found = walk(args.files)
    errors = dict(found.unreadable)
    with locked(args.db):
        there = Index(args.db, writes=True) if Path(args.db).exists() else None
        model = load_model(args.model, args.dtype, args.revision)
        limits = {"max_length": args.max_length, "truncate_dim": args.truncate_dim}
        quiet = {"batch_size": args.batch_size, "truncation": "silent", "show_progress_bar": False}
        fingerprint = model.fingerprint(args.instruction, **limits)
        if there is None:
            tokens = args.passage_tokens or default_tokens(model.processor.limits(args.max_length))
            there = Index.create(args.db, fingerprint, tokens)
        there.check(fingerprint)
        if args.passage_tokens not in (None, there.tokens):
            raise ValueError(f"The passages of {args.db} have {there.tokens} tokens. Another --db can have others.")

        def embed(texts: list[str]):
            return model.encode(texts, instruction=args.instruction, **quiet, **limits)

        update = Update(there, embed, Splitters(model.processor.tokenizer, there.tokens), args.text_column)
        new, empty = [path for path in found.files if update.is_new(path)], 0
        changed = len(new)
        with tqdm(new, unit="file", disable=None) as progress:
            for path in progress:
                try:
                    count = update.add(path)
                    changed -= count < 0
                    empty += count == 0
                except UnreadableFile as error:
                    errors[path] = str(error)
                    changed -= 1
                progress.set_postfix(passages=update.embedded)
            update.write()
        gone = update.gone([os.path.abspath(root) for root in args.files], found.files, [*found.unreadable])
        there.drop(gone)
        there.finish()
        tell_truncated(model, update.embedded, args.max_length)
        tell_found(found, update.guessed, empty)
        print(
            f"{args.db}: {there.count():,} passages. {changed:,} files new or changed, with {update.embedded:,} passages "
            f"embedded; {len(gone):,} gone; {len(found.files) - changed - len(errors) + len(found.unreadable):,} as before."
        )
    refuse_unreadable(errors)


def encode(args: argparse.Namespace) -> None:
    """Writes the vectors of a file's rows."""
    from transformers.utils.logging import tqdm

    output = Path(args.output).absolute()
    check_output(output)
    if args.input != "-" and not Path(args.input).is_file():
        raise ValueError(f"There is no file {args.input}.")
    kind = args.format or ("txt" if args.input == "-" else KINDS.get(Path(args.input).suffix.lower()))
    if kind is None:
        raise ValueError(f"{args.input} must end in one of {', '.join(KINDS)}, or --format say what it is.")
    windows = read_rows(args.input, args.text_column, BATCH, kind)
    first = next(windows, None)  # a mistake is told before a model is loaded
    if first is None:
        raise ValueError(f"No texts in {args.input}: it is empty.")
    names = first.columns[0] if isinstance(first.columns, list) else first.columns.column_names
    if args.embedding_column in names:
        raise ValueError(
            f"{args.input} has a column {args.embedding_column!r} already: name another --embedding_column."
        )

    model = load_model(args.model, args.dtype, args.revision)
    limits = {"max_length": args.max_length, "truncate_dim": args.truncate_dim, "normalize_embeddings": args.normalize}
    quiet = {"batch_size": args.batch_size, "truncation": "silent", "show_progress_bar": False}
    fingerprint = model.fingerprint(args.instruction, **limits)
    check_precision(args.precision, fingerprint["dimensions"])
    settings = {"fingerprint": fingerprint, "precision": args.precision, "text_column": args.text_column}
    encoded = number = 0
    with Parts(output, settings, args.embedding_column) as parts, tqdm(unit=" texts", disable=None) as progress:
        for number, rows in enumerate(chain([first], windows), 1):
            if not parts.has(number - 1, rows):
                vectors = model.encode(rows.texts, instruction=args.instruction, **quiet, **limits)  # (rows, dim)
                parts.write(number - 1, rows, store(vectors, args.precision))
                encoded += len(rows.texts)
            progress.update(len(rows.texts))
        count, size = parts.join(number)
    tell_truncated(model, encoded, args.max_length)
    resumed = f", {count - encoded:,} of them from before" if count > encoded else ""
    print(f"Wrote {count:,} vectors of {size} numbers to {args.output}{resumed}")


def show(args: argparse.Namespace, query: str, hits: list[tuple[float, Passage]]) -> None:
    """Prints what a query has found: one line of JSON, or the beginnings of passages for a terminal."""
    if args.json:
        found = [{"score": round(score, 6), **passage._asdict()} for score, passage in hits]
        print(json.dumps({"query": query, "hits": found}, ensure_ascii=False), flush=True)
        return
    width = min(shutil.get_terminal_size().columns, 120)
    for score, (path, line, page, text) in hits:
        path = os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
        place = f":{line}" if line else f", page {page}" if page else ""
        text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)  # control characters would reach the terminal
        shown = textwrap.wrap(text, max(width - 8, 20), max_lines=4, placeholder=" ...")
        print(f"{score:.4f}  {path}{place}", *shown, sep="\n        ", end="\n\n")
    sys.stdout.flush()


def tell_found(found: Found, guessed: Iterable[str], empty: int = 0) -> None:
    """On standard error: what was passed over, and what was guessed."""
    if guessed := [*guessed]:
        print(f"embed: not UTF-8, so read as Windows-1252: {', '.join(guessed)}", file=sys.stderr)
    passed_over = {**found.passed_over} | ({"without text": empty} if empty else {})
    if passed_over:
        told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed_over.items()))
        print(f"embed: passed over: {told}", file=sys.stderr)


def refuse_unreadable(errors: dict[str, str]) -> None:
    """Raises ValueError that names what could not be read; all else has been."""
    told = [error if path in error else f"Cannot read {path}: {error}" for path, error in errors.items()]
    if len(told) == 1:
        raise ValueError(told[0])
    if told:
        print(*(f"embed: {line}" for line in told), sep="\n", file=sys.stderr)
        raise ValueError(f"{len(told)} files could not be read; all others were.")


def tell_truncated(model, total: int, max_length: int | None) -> None:
    """One line on standard error when texts were read only in part."""
    from tokenization_utils import describe_cut

    if model.truncated:
        told = describe_cut(model.truncated, total, model.processor.limits(max_length))
        print(f"embed: {told}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The three commands and their arguments."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    add("--revision", help="of a Hub id: a commit, branch or tag (default: main)")
    add("--batch_size", type=positive, default=32, help="texts per forward pass (default: 32)")
    add("--dtype", choices=DTYPES, default="float32", help="of the computation; auto: as saved (default: float32)")
    add("--max_length", type=positive, help="longest decoder input in tokens (default: the checkpoint's)")
    add("--text_column", default="text", help="column of a table that holds the text (default: text)")

    parser = argparse.ArgumentParser(prog="python -m scripts.embed", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    searching = commands.add_parser("search", parents=[common], help="print the passages nearest to a query")
    searching.set_defaults(run=search)
    add = searching.add_argument
    add("query", help="what to look for; with --db, - reads queries from standard input, one per line")
    add("files", nargs="*", help="files and folders to look in")
    add("--db", metavar="NAME.lance", help="index to look in")
    add("--instruction", help="task of the query; '' for none (default: the checkpoint's for queries)")
    add("--top_k", type=positive, default=5, help="passages to print (default: 5)")
    add("--hybrid", action="store_true", help="of an index: join the ranking by vectors with that by words")
    add("--json", action="store_true", help="print one line of JSON per query, with whole passages")

    indexing = commands.add_parser("index", parents=[common], help="keep the passages of files and their vectors")
    indexing.set_defaults(run=index)
    add = indexing.add_argument
    add("files", nargs="+", help="files and folders")
    add("--db", metavar="NAME.lance", required=True, help="index to make or bring up to date")
    add("--instruction", help="task of all passages (default: none)")
    add("--truncate_dim", type=positive, help="numbers to keep of each vector (default: all)")
    add("--passage_tokens", type=positive, help="most tokens of a passage (default: so many that both towers read)")

    encoding = commands.add_parser("encode", parents=[common], help="write the vectors of a file's rows")
    encoding.set_defaults(run=encode)
    add = encoding.add_argument
    add("input", help=f"a file that ends in one of {', '.join(KINDS)}, or - for standard input")
    add("-o", "--output", required=True, help="what to write: .parquet or .lance with all columns, or .npy")
    add("--format", choices=sorted(set(KINDS.values())), help="of the input (default: by suffix; txt: a text per line)")
    add("--instruction", help="task of all texts (default: none)")
    add("--truncate_dim", type=positive, help="numbers to keep of each vector (default: all)")
    add("--normalize", action=argparse.BooleanOptionalAction, default=True, help="scale to length 1 (default: yes)")
    add("--precision", choices=PRECISIONS, default="float32", help="of what is written (default: float32)")
    add("--embedding_column", default="embedding", help="column of the vectors (default: embedding)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; see [`exit_code`] for what it returns."""
    args = build_parser().parse_args(argv)
    return exit_code("embed", lambda: args.run(args))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode still shows the rest
    sys.exit(main())
