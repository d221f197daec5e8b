"""Development scores during training: a local pack in mteb's layout (STS or retrieval) or rows held out of training.

Never a test set: hyperparameters are chosen on data that no result is reported on.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.local_data import folder_revision, own_cache


RETRIEVAL_CONFIGS = ("corpus", "queries", "default")


@dataclass
class STSDev:
    """Sentence pairs with gold scores; scored by Spearman's correlation of their cosines."""

    name: str
    first: list[str]
    second: list[str]
    gold: list[float]
    instruction: str | None

    def embed(self, model, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of first and second sentences, `(pairs, dim)` each."""
        first = model.encode(self.first, instruction=self.instruction, convert_to_tensor=True, **kwargs)
        return first, model.encode(self.second, instruction=self.instruction, convert_to_tensor=True, **kwargs)

    def compare(self, first: torch.Tensor, second: torch.Tensor) -> float:
        """The score of vectors of length 1."""
        from scipy.stats import spearmanr

        return float(spearmanr((first * second).sum(-1), self.gold).statistic)


@dataclass
class RetrievalDev:
    """Queries, a corpus, and which documents (by place) answer which query; scored by nDCG@10."""

    name: str
    queries: list[str]
    corpus: list[str]
    relevant: list[set[int]]
    instruction: str | None

    def embed(self, model, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of queries `(queries, dim)` and documents `(documents, dim)`."""
        queries = model.encode(self.queries, instruction=self.instruction, convert_to_tensor=True, **kwargs)
        return queries, model.encode(self.corpus, convert_to_tensor=True, **kwargs)

    def compare(self, queries: torch.Tensor, corpus: torch.Tensor) -> float:
        """The score of vectors of length 1."""
        best = (queries @ corpus.T).argsort(dim=1, descending=True, stable=True)[:, :10]  # (queries, 10)
        return ndcg_at_10(best.tolist(), self.relevant)


def ndcg_at_10(ranked: Sequence[Sequence[int]], relevant: Sequence[set[int]]) -> float:
    """Mean over queries of the discounted gain of the relevant documents among the first ten, over the best possible."""
    discount = 1 / torch.log2(torch.arange(2, 12).double())  # (10,)
    scores = []
    for documents, wanted in zip(ranked, relevant, strict=True):
        gains = torch.tensor([document in wanted for document in documents[:10]]).double()
        scores.append(float((gains * discount[: len(gains)]).sum() / discount[: min(10, len(wanted))].sum()))
    return sum(scores) / len(scores)


def load_pack(folder: str, instruction: str | None, limit: int | None = None) -> STSDev | RetrievalDev:
    """
    Reads a local pack: `sentence1`, `sentence2`, `score` columns, or the configs `corpus`, `queries`, `default`.

    Raises:
        ValueError: the folder is neither.
    """
    import datasets

    name = os.path.basename(os.path.normpath(folder))
    configs = datasets.get_dataset_config_names(folder)
    is_retrieval = {"corpus", "queries"} <= set(configs)
    with own_cache(folder_revision(Path(folder))):
        tables = [_only_split(folder, config) for config in (RETRIEVAL_CONFIGS if is_retrieval else configs[:1])]
    if is_retrieval:
        corpus, queries, qrels = tables
        places = {row["_id"]: place for place, row in enumerate(corpus)}
        relevant: dict[str, set[int]] = {}
        for row in qrels:
            if row["score"] > 0 and row["corpus-id"] in places:
                relevant.setdefault(row["query-id"], set()).add(places[row["corpus-id"]])
        asked = [row for row in queries if row["_id"] in relevant][:limit]
        return RetrievalDev(
            name,
            [row["text"] for row in asked],
            [f"{row.get('title') or ''} {row['text']}".strip() for row in corpus],
            [relevant[row["_id"]] for row in asked],
            instruction,
        )
    (rows,) = tables
    if not {"sentence1", "sentence2", "score"} <= set(rows.column_names):
        raise ValueError(
            f"{folder} is neither an STS pack (sentence1, sentence2, score) nor a retrieval pack (configs corpus, "
            f"queries, default): it has the configs {configs} and columns {rows.column_names}."
        )
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    return STSDev(name, rows["sentence1"][:], rows["sentence2"][:], rows["score"][:], instruction)


def _only_split(folder: str, config: str):
    import datasets

    splits = datasets.load_dataset(folder, config)
    return splits["test"] if "test" in splits else next(iter(splits.values()))


def held_out(rows, spec, count: int, seed: int):
    """
    Splits rows into training rows and a [`RetrievalDev`] of `count` held-out queries. No training row has the query or
    positive of a held-out one.

    Raises:
        ValueError: no row would be left to train on.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if count >= len(rows):
        raise ValueError(f"--dev_rows {count} leaves nothing to train on: {spec.name} has {len(rows)} rows.")
    shuffled = rows.shuffle(seed=seed)
    dev = shuffled.select(range(count)).to_list()
    rest = shuffled.select(range(count, len(rows)))
    known = pa.array(sorted({row[name] for row in dev for name in ("query", "positive")}), pa.string())
    texts = rest.select_columns(["query", "positive"]).with_format("arrow").iter(10_000)
    leaks = [pc.or_(*(pc.is_in(batch[name], known) for name in batch.column_names)).to_numpy() for batch in texts]
    rest = rest.select(np.flatnonzero(~np.concatenate(leaks)))
    corpus = sorted({text for row in dev for text in (row["positive"], *row["negatives"])})
    places = {text: place for place, text in enumerate(corpus)}
    answers: dict[str, set[int]] = {}
    for row in dev:
        answers.setdefault(row["query"], set()).add(places[row["positive"]])
    return rest, RetrievalDev(spec.name, list(answers), corpus, list(answers.values()), spec.instructions[0])
