"""training/dev.py: development scores; packs from folders, rows held out, nDCG by hand."""

import math
import shutil

import pytest
from eval_packs import write_pack

from training.data import DatasetSpec
from training.dev import RetrievalDev, STSDev, held_out, load_pack, ndcg_at_10


def pack(folder, **configs) -> str:
    """A folder in mteb's layout: one split of each configuration."""
    return str(write_pack(folder, {name: {"test": rows} for name, rows in configs.items()}))


class Letters:
    """Embeds a text as the counts of its letters."""

    def encode(self, texts, instruction=None, **kwargs):
        import torch

        counts = torch.tensor([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]).float()
        return torch.nn.functional.normalize(counts, dim=-1)


def test_an_sts_pack(tmp_path):
    pairs = [("abc", "abc", 5.0), ("abc", "abd", 3.0), ("abc", "xyz", 0.0)]
    rows = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in pairs]
    dev = load_pack(pack(tmp_path / "STS", default=rows), "find")
    assert isinstance(dev, STSDev) and dev.name == "STS"
    assert dev.compare(*dev.embed(Letters())) == pytest.approx(1.0)
    dev.gold.reverse()
    assert dev.compare(*dev.embed(Letters())) == pytest.approx(-1.0)
    assert len(load_pack(str(tmp_path / "STS"), "find", limit=2).first) == 2


def test_a_retrieval_pack(tmp_path):
    configs = {
        "corpus": [{"_id": "d1", "title": "", "text": "abc"}, {"_id": "d2", "title": "x", "text": "yz"}],
        "queries": [{"_id": "q1", "text": "cab"}, {"_id": "q2", "text": "aabbcc"}, {"_id": "q3", "text": "no answer"}],
        "default": [
            {"query-id": "q1", "corpus-id": "d1", "score": 1},
            {"query-id": "q2", "corpus-id": "d2", "score": 1},
            {"query-id": "q3", "corpus-id": "d1", "score": 0},
        ],
    }
    dev = load_pack(pack(tmp_path / "Retrieval", **configs), "find")
    assert isinstance(dev, RetrievalDev)
    assert dev.queries == ["cab", "aabbcc"] and dev.corpus == ["abc", "x yz"]
    assert dev.compare(*dev.embed(Letters())) == pytest.approx((1 + 1 / math.log2(3)) / 2)


@pytest.mark.parametrize("again", ["packs", "elsewhere"])
def test_a_pack_of_another_content_is_another_pack(tmp_path, again):
    """Although it has the name of one that was read before."""
    for parent, text in (("packs", "old"), (again, "new")):
        rows = [{"sentence1": text, "sentence2": "b", "score": 1.0}]
        shutil.rmtree(tmp_path / parent, ignore_errors=True)
        assert load_pack(pack(tmp_path / parent / "STS", default=rows), "find").first == [text]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="STS pack"):
        load_pack(pack(tmp_path / "Other", default=[{"text": "a", "label": 1}]), "find")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_ndcg():
    assert ndcg_at_10([[3, 1, 2]], [{3}]) == 1
    assert ndcg_at_10([[1, 2, 3]], [{3}]) == pytest.approx(1 / math.log2(4))
    assert ndcg_at_10([[1, 2, 3]], [{2, 3}]) == pytest.approx(
        (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    )
    assert ndcg_at_10([list(range(20))], [{15}]) == 0


def test_held_out_rows_are_not_trained_on():
    import datasets

    rows = [{"query": f"q{i // 2}", "positive": f"p{i}", "negatives": [f"n{i}"]} for i in range(40)]
    spec = DatasetSpec("a", "a.jsonl", ["find"])
    rest, dev = held_out(datasets.Dataset.from_list(rows), spec, 10, seed=1)
    assert 0 < len(rest) <= 30 and dev.instruction == "find"
    with pytest.raises(ValueError, match="--dev_rows 40.*a has 40"):
        held_out(datasets.Dataset.from_list(rows), spec, 40, seed=1)
    assert not set(rest["query"]) & set(dev.queries)
    assert not set(rest["positive"]) & set(dev.corpus)
    for query, places in zip(dev.queries, dev.relevant):
        for place in places:
            assert {"query": query, "positive": dev.corpus[place]} in [
                {"query": row["query"], "positive": row["positive"]} for row in rows
            ]


def test_holding_out_reads_no_row_to_train_on_into_python(monkeypatch):
    """Of a million, that would take minutes. The rows are the same, in the same order."""
    import datasets

    rows = [{"query": f"q{i // 2}", "positive": f"p{i % 37}", "negatives": []} for i in range(400)]
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=1).to_list()
    known = {text for row in shuffled[:10] for text in (row["query"], row["positive"])}
    expected = [row for row in shuffled[10:] if not known & {row["query"], row["positive"]}]
    read, iterate = [], datasets.Dataset.__iter__
    monkeypatch.setattr(datasets.Dataset, "__iter__", lambda self: (read.append(row) or row for row in iterate(self)))
    rest, _ = held_out(datasets.Dataset.from_list(rows), DatasetSpec("a", "a.jsonl", ["find"]), 10, seed=1)
    assert rest.to_list() == expected and 0 < len(expected) < 390
    assert not read
