"""Makes training rows out of plain text: a paragraph as query, the paragraph after it as its positive.

Not part of the paper. The public pairs that train.py reads are about papers, medicine and shells; novels, speeches and
forum posts bring the everyday language that they lack. Rows go into one .jsonl.gz, as data.py reads it.

    python corpus_pairs.py --corpus_dir ../shared/data/corpus --shards novels nltk_texts --output runs/corpus_pairs.jsonl.gz
"""

import argparse
import gzip
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pretrain import corpus_files, read_documents


def neighbours(document: str, shortest: int, longest: int) -> Iterator[tuple[str, str]]:
    """Paragraphs (lines) of a document that follow each other, both of `shortest` to `longest` characters, none twice."""
    paragraphs = [line.strip() for line in document.splitlines()]
    place = 0
    while place + 1 < len(paragraphs):
        pair = paragraphs[place], paragraphs[place + 1]
        if all(shortest <= len(text) <= longest for text in pair) and pair[0] != pair[1]:
            yield pair
            place += 1
        place += 1


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes rows into a .jsonl.gz, whole or not at all, and the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus_dir", required=True, help="folder of .txt or .txt.zst files, as for pretrain.py")
    parser.add_argument("--shards", nargs="+", help="file stems to use (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl.gz to write")
    parser.add_argument("--rows", type=int, default=30_000, help="rows in all, spread over shards by size")
    parser.add_argument("--shortest", type=int, default=40, help="characters of a paragraph at least (default: 40)")
    parser.add_argument("--longest", type=int, default=500, help="characters of a paragraph at most (default: 500)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of rows (default: 42)")
    args = parser.parse_args(argv)
    if not args.output.name.endswith(".jsonl.gz"):
        parser.error(f"--output must end in .jsonl.gz, got {args.output}")

    pairs = [
        pair
        for path in corpus_files(args.corpus_dir, args.shards)
        for document in read_documents(path)
        for pair in neighbours(document, args.shortest, args.longest)
    ]
    if not pairs:
        parser.error(f"no two neighbouring paragraphs of {args.shortest} to {args.longest} characters")
    chosen = random.Random(args.seed).sample(pairs, min(args.rows, len(pairs)))
    write_rows(args.output, ({"query": query, "positive": positive} for query, positive in chosen))
    print(f"{args.output}: {len(chosen)} of {len(pairs)} pairs")


if __name__ == "__main__":
    main()
