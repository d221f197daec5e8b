"""benchmarks/onnx.py: its scores against closed forms, and who takes turns."""

import numpy as np
import pytest
from eval_packs import write_pack

from benchmarks.onnx import measure_quality, measure_speed, ndcg


def test_ndcg():
    assert ndcg([True] + 9 * [False], 1) == 1
    assert ndcg([False, True] + 8 * [False], 1) == pytest.approx(1 / np.log2(3))
    assert ndcg([True, False, True], 2) == pytest.approx(1.5 / (1 + 1 / np.log2(3)))
    assert ndcg(10 * [False], 3) == 0


class Engine:
    """Gives each text the vector that a table has, turned by an angle for some."""

    def __init__(self, vectors: dict[str, float], log: list, wrong: tuple[str, ...] = ()):
        self.vectors, self.log, self.wrong = vectors, log, wrong

    def encode(self, texts, instruction=None):
        self.log.append((self, instruction))
        angles = np.array([self.vectors[text] + (1.5 if text in self.wrong else 0) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], -1), len(self.log), 0.0


def test_engines_take_turns_and_the_first_round_warms_up():
    log = []
    engines = {name: Engine({"a": 0.0}, log) for name in ("torch", "other")}
    found = measure_speed(engines, ["a"], "Find", repeats=2)
    assert [engine for engine, _ in log] == [*engines.values()] * 3 and {task for _, task in log} == {"Find"}
    assert found["texts_per_second"] == {"torch": 1 / 3, "other": 1 / 4} and found["times_torch"]["other"] == 0.75


def test_quality(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("scipy")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs = [{"sentence1": "a", "sentence2": text, "score": score} for text, score in (("a", 5), ("b", 3), ("c", 1))]
    write_pack(tmp_path / "STSBenchmark", {"default": {"test": pairs}})
    corpus = [{"_id": f"d{text}", "title": "", "text": text} for text in "abcxyz"]
    relevant = [{"query-id": "q", "corpus-id": "da", "score": 1}, {"query-id": "q", "corpus-id": "dc", "score": 1}]
    queries = [{"_id": "q", "text": "a"}, {"_id": "unused", "text": "b"}]
    configs = {"corpus": {"corpus": corpus}, "queries": {"queries": queries}, "default": {"test": relevant}}
    write_pack(tmp_path / "SciFact", configs)
    angles = {text: 0.4 * place for place, text in enumerate("abcxyz")}
    engines = {"torch": Engine(angles, []), "worse": Engine(angles, [], wrong=("b",))}
    scores = measure_quality(engines, tmp_path, pairs=3, queries=1, documents=4)
    assert (scores["queries"], scores["documents"], scores["pairs"]) == (1, 4, 3)
    assert scores["torch"]["STSBenchmark"] == pytest.approx(100) and scores["torch"]["min_cosine"] == pytest.approx(1)
    assert scores["torch"]["SciFact"] == pytest.approx(100 * 1.5 / (1 + 1 / np.log2(3)))
    assert scores["worse"]["STSBenchmark"] == pytest.approx(50) and scores["worse"]["SciFact"] == pytest.approx(100)
    assert scores["worse"]["min_cosine"] == pytest.approx(np.cos(1.5))
