"""Makes evaluation tasks of training rows and corpus texts: what to choose by, so that the tasks that are reported stay unseen.

Not part of the paper. The folders are tasks of one's own as mteb_tasks.py reads them. Rows may be among those that a model
was trained on: compare models that were trained on the same, and believe small differences only if many tasks agree.

    python dev_tasks.py --train_dir train --corpus_dir corpus --labels_dir runs/labels --output_dir runs/dev
    python eval_mteb.py --model . --tasks all --data_dir runs/dev --output runs/dev-scores

Of a task with classes, in-context examples are written too, one of each class, to `OUTPUT_DIR-examples/` for `--icl`.
"""

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import read_rows
from eval_report import write_json
from pretrain import read_documents


@dataclass(frozen=True)
class Source:
    """A training file, or a corpus shard, and the task that is made of it."""

    name: str
    type: str  # as in a task.json
    stem: str  # of the file
    instruction: str
    queries: int = 300
    documents: int = 1500


SOURCES = [
    Source(
        "DevMedQuAD", "Retrieval", "medquad", "Given a medical question, retrieve passages that answer the question"
    ),
    Source("DevPapers", "Retrieval", "papers_title_abstract", "Given the title of a paper, retrieve its abstract"),
    Source(
        "DevRACE", "Retrieval", "race_qa", "Given a statement, retrieve the passage that supports it", documents=500
    ),
    Source("DevSciTail", "Retrieval", "scitail", "Given a scientific statement, retrieve a sentence that supports it"),
    Source("DevParaSCI", "Retrieval", "parasci", "Retrieve semantically similar text"),
    Source("DevTLDR", "Retrieval", "tldr_pages", "Given a task on the command line, retrieve the command that does it"),
    Source("DevTrecQA", "Reranking", "trecqa_wang", "Given a question, retrieve passages that answer the question"),
    Source("DevSNLI", "PairClassification", "snli_devtest", "Retrieve semantically similar text", queries=600),
    Source("DevTextbook", "Clustering", "openstax_us_history", "Identify the main theme of the given paragraphs"),
    Source("DevPEPs", "Clustering", "peps", "Identify the topic or theme of the given paragraphs"),
    Source(
        "DevEmotion", "Classification", "emotion", "Classify the emotion expressed in the given text", documents=1200
    ),
    Source("DevSentiment", "Classification", "sentiment", "Classify the sentiment of the given text", documents=1200),
]
MAIN_SCORES = {
    "Retrieval": "ndcg_at_10",
    "Reranking": "map_at_1000",
    "PairClassification": "max_ap",
    "Clustering": "v_measure",
    "Classification": "accuracy",
}
Tables = dict[str, dict[str, list[dict]]]  # config -> split -> rows


def search(source: Source, rows: Sequence[dict], longest: int) -> Tables:
    """Positives of the first rows, to be found among those of all; in reranking, among the negatives of their query."""
    if source.type == "Reranking":
        rows = [row for row in rows if row["negatives"]][: source.queries]
    asked = rows[: source.queries]
    texts: dict[str, str] = {}  # text -> id
    queries: dict[str, str] = {}
    relevant: dict[str, set[str]] = {}  # query -> ids of texts
    ranked: dict[str, list[str]] = {}
    for row in asked:
        query = queries.setdefault(row["query"], f"q{len(queries)}")
        relevant.setdefault(query, set()).add(texts.setdefault(row["positive"][:longest], f"d{len(texts)}"))
    for row in rows:
        if source.type == "Reranking":
            found = [
                texts.setdefault(text[:longest], f"d{len(texts)}") for text in [row["positive"], *row["negatives"]]
            ]
            ranked.setdefault(queries[row["query"]], []).extend(found)
        elif len(texts) < source.documents:
            texts.setdefault(row["positive"][:longest], f"d{len(texts)}")
    tables = {
        "corpus": [{"_id": name, "title": "", "text": text} for text, name in texts.items()],
        "queries": [{"_id": name, "text": text} for text, name in queries.items()],
        "default": [
            {"query-id": query, "corpus-id": name, "score": 1} for query in relevant for name in sorted(relevant[query])
        ],
    }
    if ranked:
        tables["top_ranked"] = [
            {"query-id": query, "corpus-ids": list(dict.fromkeys(names))} for query, names in ranked.items()
        ]
    return {config: {"test": table} for config, table in tables.items()}


def pairs(source: Source, rows: Sequence[dict], longest: int) -> Tables:
    """Each query with its positive, 1, and with its first negative, 0."""
    table = []
    for row in [row for row in rows if row["negatives"]][: source.queries]:
        for label, text in ((1, row["positive"]), (0, row["negatives"][0])):
            table.append({"sentence1": row["query"][:longest], "sentence2": text[:longest], "labels": label})
    return {"default": {"test": table}}


def classes(source: Source, rows: Sequence[dict], longest: int) -> Tables:
    """Texts whose positive is the name of their class; as many to test as to draw examples from."""
    rows = [row for row in rows if len(row["query"]) <= longest][: source.documents]
    names = sorted({row["positive"] for row in rows})
    table = [{"text": row["query"], "label": names.index(row["positive"])} for row in rows]
    return {"default": {"train": table[::2], "test": table[1::2]}}


def class_examples(source: Source, rows: Sequence[dict], longest: int) -> list[dict]:
    """In-context examples: of each class the first row that [`classes`] leaves out, where there is one."""
    rows = [row for row in rows if len(row["query"]) <= longest][source.documents :]
    first = {row["positive"]: row["query"] for row in reversed(rows)}
    return [{"query": first[name], "response": name} for name in sorted(first)]


def groups(documents: Sequence[str], longest: int, rng: random.Random) -> Tables:
    """Paragraphs of up to 20 long documents, up to 25 of each, to be grouped by document."""
    lines = [[line for line in document.splitlines() if 150 <= len(line) <= longest] for document in documents]
    lines = [paragraphs for paragraphs in lines if len(paragraphs) >= 15]
    chosen = rng.sample(lines, min(20, len(lines)))
    table = [
        {"sentences": text, "labels": number}
        for number, paragraphs in enumerate(chosen)
        for text in rng.sample(paragraphs, min(25, len(paragraphs)))
    ]
    return {"default": {"test": table}}


def find_source(source: Source, args: argparse.Namespace) -> Path:
    """
    The file that a task is made of.

    Raises:
        FileNotFoundError: there is none, or no folder was given for it.
    """
    flag, ending = {
        "Clustering": ("corpus_dir", ".txt"),
        "Classification": ("labels_dir", ".jsonl.gz"),
    }.get(source.type, ("train_dir", ".jsonl.gz"))
    folder = getattr(args, flag)
    found = sorted(Path(folder).glob(f"{source.stem}{ending}*")) if folder else []
    if not found:
        raise FileNotFoundError(
            f"{source.name} is made of {source.stem}{ending}: give its folder as --{flag}, got {folder}."
        )
    return found[0]


def read_source(source: Source, path: Path, rng: random.Random) -> list:
    """What a task is made of: the documents of a corpus shard, or the rows of a file in the order in which it takes them."""
    if source.type == "Clustering":
        return list(read_documents(str(path)))
    rows = list(read_rows(str(path)))
    rng.shuffle(rows)
    return rows


def make_tables(source: Source, path: Path, found: list, longest: int, rng: random.Random) -> Tables:
    """
    What a task's folder holds, made of what [`read_source`] found in the file.

    Raises:
        ValueError: the file has nothing that the task could be made of.
    """
    if source.type == "Clustering":
        tables = groups(found, longest, rng)
    else:
        make = {"PairClassification": pairs, "Classification": classes}.get(source.type, search)
        tables = make(source, found, longest)
    empty = [f"{config}, {split}" for config, splits in tables.items() for split, table in splits.items() if not table]
    if empty:
        raise ValueError(f"{path} has no rows for {source.name} ({'; '.join(empty)}): are they of another kind?")
    return tables


def write_task(folder: Path, source: Source, tables: Tables) -> None:
    """Writes a task's folder, whole or not at all, over one of before."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lines = ["---", "configs:"]
    for config, splits in tables.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, table in splits.items():
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            file = temporary / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")
    (temporary / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    task = {"name": source.name, "type": source.type, "main_score": MAIN_SCORES[source.type]}
    task["instruction"] = source.instruction
    (temporary / "task.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [source.name for source in SOURCES]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, metavar="TASK", help=", ".join(names))
    parser.add_argument("--train_dir", help="folder of .jsonl.gz rows, for what is searched or compared")
    parser.add_argument(
        "--corpus_dir", help="folder of .txt or .txt.zst files, as for pretrain.py, for what is grouped"
    )
    parser.add_argument("--labels_dir", help="folder that label_rows.py wrote, for classes")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tasks, one folder each")
    parser.add_argument("--longest", type=int, default=1500, help="characters of a text at most (default: 1500)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of rows (default: 42)")
    args = parser.parse_args(argv)

    chosen = [(source, find_source(source, args)) for source in SOURCES if source.name in args.tasks]
    for source, path in chosen:
        rng = random.Random(f"{args.seed} {source.name}")
        found = read_source(source, path, rng)
        tables = make_tables(source, path, found, args.longest, rng)
        write_task(args.output_dir / source.name, source, tables)
        if source.type == "Classification":
            folder = args.output_dir.with_name(f"{args.output_dir.name}-examples")
            write_json(folder / f"{source.name}.json", class_examples(source, found, args.longest))
        sizes = [
            f"{len(table)} {config} {split}" for config, splits in tables.items() for split, table in splits.items()
        ]
        print(f"{source.name}: {', '.join(sizes)}", flush=True)


if __name__ == "__main__":
    main()
