"""The index: only what is new is embedded, nothing is there twice, and other vectors are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("lancedb")
pytest.importorskip("semantic_text_splitter")

from filelock import FileLock

from scripts import index, passages
from scripts.index import Index, UnreadableFile, Update, is_under, locked, quote
from scripts.passages import Splitters


FINGERPRINT = {"weights": "a", "instruction": None, "dimensions": 8, "max_length": 512}
WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()


def embed(texts: list[str]) -> np.ndarray:
    """Counts words, so that what is near can be told beforehand."""
    vectors = np.array([[text.count(word) + 0.01 for word in WORDS] for text in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Embedder:
    """Remembers what it was given; stops once it has seen so many texts."""

    def __init__(self, stop: int | None = None):
        self.texts, self.stop = [], stop

    def __call__(self, texts: list[str]) -> np.ndarray:
        if self.stop is not None and len(self.texts) + len(texts) > self.stop:
            raise KeyboardInterrupt
        self.texts += texts
        return embed(texts)


@pytest.fixture(scope="module")
def splitters(tiny_model):
    return Splitters(tiny_model.processor.tokenizer, 20)


@pytest.fixture
def db(tmp_path) -> str:
    (tmp_path / "db").mkdir()
    return str(tmp_path / "db" / "my.lance")


@pytest.fixture
def docs(tmp_path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    return folder


def write(path: Path, *paragraphs: str) -> str:
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return str(path)


def bring_up(db: str, folder: Path, splitters: Splitters, embedder: Embedder | None = None) -> Embedder:
    """What the command `index` does."""
    from scripts.passages import walk

    embedder, files = embedder or Embedder(), walk([str(folder)]).files
    there = Index(db) if Path(db).exists() else Index.create(db, FINGERPRINT, 20)
    update = Update(there, embedder, splitters, "text")
    for path in files:
        if update.is_new(path):
            update.add(path)
    update.write()
    there.drop(update.gone([str(folder)], files, []))
    there.finish()
    return embedder


def content(db: str) -> list[tuple[str, int, str]]:
    """Name, line and text of all passages, each of which must be there once."""
    rows = Index(db).table.to_arrow().to_pylist()
    found = sorted((Path(row["path"]).name, row["line"], row["text"]) for row in rows if row["text"] is not None)
    assert len({(row["path"], row["number"]) for row in rows}) == len(rows)
    for row in rows:
        if row["text"] is not None:
            np.testing.assert_allclose(row["vector"], embed([row["text"]])[0], atol=1e-6)
    return found


PARAGRAPHS = [f"{word} stands in this paragraph, and in no other one of them." for word in WORDS]


def test_only_what_is_new_is_embedded(db, docs, splitters):
    write(docs / "a.txt", *PARAGRAPHS[:3])
    b = write(docs / "it's b.txt", *PARAGRAPHS[3:5])
    write(docs / "empty.txt", " ")
    assert len(bring_up(db, docs, splitters).texts) == len(content(db)) > 5
    first = content(db)
    assert bring_up(db, docs, splitters).texts == [] and content(db) == first

    os.utime(b, ns=(1, 1))  # another time, the same content
    assert bring_up(db, docs, splitters).texts == [] and content(db) == first

    write(Path(b), PARAGRAPHS[5])
    write(docs / "c.md", f"# Title\n\n{PARAGRAPHS[6]}")
    embedded = bring_up(db, docs, splitters).texts
    assert any("zeta" in text for text in embedded) and any(text.startswith("# Title") for text in embedded)
    assert not any("alpha" in text for text in embedded)
    found = content(db)
    assert [row for row in found if row[0] == "a.txt"] == [row for row in first if row[0] == "a.txt"]
    assert not any("delta" in text for _, _, text in found)

    (docs / "a.txt").unlink()
    assert bring_up(db, docs, splitters).texts == []
    assert {name for name, _, _ in content(db)} == {"it's b.txt", "c.md"}


def test_only_what_was_under_the_roots_leaves(db, docs, splitters, tmp_path):
    (tmp_path / "docs2").mkdir()
    write(docs / "a.txt", "alpha")
    write(tmp_path / "docs2" / "b.txt", "beta")
    bring_up(db, docs, splitters)
    bring_up(db, tmp_path / "docs2", splitters)
    assert {name for name, _, _ in content(db)} == {"a.txt", "b.txt"}
    update = Update(Index(db), embed, splitters, "text")
    assert update.gone([str(docs)], [], []) == [str(docs / "a.txt")]
    assert update.gone([str(docs), str(tmp_path)], [], [str(docs)]) == [str(tmp_path / "docs2" / "b.txt")]
    assert is_under("/a/b", "/a") and is_under("/a", "/a") and is_under("/a", "/") and not is_under("/ab", "/a")


@pytest.mark.parametrize("stop", [0, 4, 8, 12])
def test_an_interruption_loses_the_batch_in_hand_alone(db, docs, splitters, monkeypatch, stop):
    monkeypatch.setattr(index, "BATCH", 4)
    write(docs / "a.txt", *PARAGRAPHS)
    write(docs / "b.txt", *PARAGRAPHS[::-1])
    interrupted = Embedder(stop)
    with pytest.raises(KeyboardInterrupt):
        bring_up(db, docs, splitters, interrupted)
    assert len(interrupted.texts) == stop == len(content(db))
    assert stop == 0 or any("alpha" in hit.text for hit in Index(db).search(embed(["beta"])[0], 99, "alpha"))
    resumed = bring_up(db, docs, splitters)
    assert len(interrupted.texts) + len(resumed.texts) == len(content(db)) > 16
    whole = str(Path(db).with_name("whole.lance"))
    bring_up(whole, docs, splitters)
    assert content(db) == content(whole)


def test_a_changed_file_keeps_its_old_passages_until_the_new_ones_are_there(db, docs, splitters, monkeypatch):
    monkeypatch.setattr(index, "BATCH", 4)
    path = docs / "a.txt"
    write(path, *PARAGRAPHS[:2])
    bring_up(db, docs, splitters)
    before = content(db)
    old = {text for _, _, text in before}
    write(path, *PARAGRAPHS[2:])
    with pytest.raises(KeyboardInterrupt):
        bring_up(db, docs, splitters, Embedder(4))
    rows = Index(db).table.to_arrow().to_pylist()
    assert old < {row["text"] for row in rows} and len(rows) == len(before) + 4
    there = os.stat(path)
    write(path, *PARAGRAPHS[:2])  # as it was, and as if it had never been changed
    os.utime(path, ns=(there.st_atime_ns, rows[0]["mtime_ns"]))
    assert bring_up(db, docs, splitters).texts == []
    assert content(db) == before


def test_an_interruption_before_the_old_passages_left(db, docs, splitters, monkeypatch):
    write(docs / "a.txt", *PARAGRAPHS[:2])
    bring_up(db, docs, splitters)
    write(docs / "a.txt", *PARAGRAPHS[2:])

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index.Index, "drop", stop)
        patch.setattr("lancedb.table.LanceTable.delete", stop)
        with pytest.raises(KeyboardInterrupt):
            bring_up(db, docs, splitters)
    assert bring_up(db, docs, splitters).texts == []
    assert not any("alpha" in text for _, _, text in content(db))


def test_a_file_that_fails_half_way_leaves_nothing(db, docs, splitters, monkeypatch):
    monkeypatch.setattr(index, "BATCH", 2)
    monkeypatch.setattr(passages, "ROWS", 2)
    good = write(docs / "a.txt", *PARAGRAPHS)
    rows = [json.dumps({"text": word}) for word in WORDS[:7]]
    bad = docs / "b.jsonl"
    bad.write_text("\n".join(rows))
    bring_up(db, docs, splitters)
    before = content(db)
    bad.write_text("\n".join([*rows[::-1], '{"text": null}']))
    update = Update(Index(db), embed, splitters, "text")
    with pytest.raises(UnreadableFile, match="b.jsonl:8 must have a string under 'text', got None"):
        update.add(str(bad))
    update.write()
    assert content(db) == before and update.embedded >= 4 and not update.is_new(good) and update.is_new(str(bad))


def test_a_file_that_goes_meanwhile_is_named(db, docs, splitters):
    update = Update(Index.create(db, FINGERPRINT, 20), embed, splitters, "text")
    gone = str(docs / "gone.txt")
    assert update.is_new(gone)
    with pytest.raises(UnreadableFile, match="No such file or directory: .*gone.txt"):
        update.add(gone)


def test_what_embedding_raises_is_not_the_files_fault(db, docs, splitters):
    def fail(texts):
        raise ValueError("max_length leaves no room")

    write(docs / "a.txt", *PARAGRAPHS)
    update = Update(Index.create(db, FINGERPRINT, 20), fail, splitters, "text")
    update.add(str(docs / "a.txt"))
    with pytest.raises(ValueError, match="no room") as error:
        update.write()
    assert not isinstance(error.value, UnreadableFile)


def test_search_finds_the_nearest_with_their_cosine(db, docs, splitters, monkeypatch):
    write(docs / "a.txt", *PARAGRAPHS)
    write(docs / "empty.txt", "")  # has a row without vector
    bring_up(db, docs, splitters)
    texts = [text for _, _, text in content(db)]
    query = embed(["beta beta gamma"])[0]
    cosines = embed(texts) @ query
    hits = Index(db).search(query, 1000)
    assert len(hits) == len(texts) == Index(db).count()
    np.testing.assert_allclose([hit.score for hit in hits], sorted(cosines, reverse=True), atol=1e-5)
    assert hits[0].text.startswith("beta") and hits[0].line == 3 and hits[0].path == str(docs / "a.txt")
    assert [hit.text for hit in Index(db).search(query, 2)] == [hit.text for hit in hits[:2]]

    monkeypatch.setattr(index, "APPROXIMATE_FROM", 4)
    Index(db).finish()
    assert any("vector" in each.columns for each in Index(db).table.list_indices())
    assert [hit.text for hit in Index(db).search(query, 2)] == [hit.text for hit in hits[:2]]


def test_hybrid_search_joins_words_and_vectors(db, docs, splitters):
    write(docs / "a.txt", *PARAGRAPHS, "a zebra beside the theta")
    bring_up(db, docs, splitters)
    query = embed(["beta"])[0]
    hits = Index(db).search(query, 3, "Zebras?")
    assert {"beta", "zebra"} <= {word for hit in hits for word in hit.text.split()}
    # Reciprocal rank fusion: 1 / (60 + rank) of either ranking, which count from 0 or from 1.
    assert hits[0].score == pytest.approx(1 / 60, abs=1e-3) and hits[0].score >= hits[-1].score
    for text in ('"', "' OR 1=1 --", "the", "AND (", "*:?~^", "\0", "日本"):
        assert len(Index(db).search(query, 3, text)) == 3
    assert Index(db).search(query, 3, " ") == Index(db).search(query, 3)
    write(docs / "b.txt", "an okapi")
    bring_up(db, docs, splitters)
    assert any("okapi" in hit.text for hit in Index(db).search(query, 3, "okapi"))


def test_other_vectors_are_refused(db):
    there = Index.create(db, FINGERPRINT, 20)
    there.check(dict(FINGERPRINT))
    with pytest.raises(
        ValueError, match=r"my.lance differs .* in weights. Use the same model, .* Another --db keeps both"
    ):
        there.check({**FINGERPRINT, "weights": "b"})
    with pytest.raises(ValueError, match=r"instruction \(None there, 'Find' here\). Use the same arguments"):
        Index(db).check({**FINGERPRINT, "instruction": "Find"})
    Index(db).check({**FINGERPRINT, "instruction": "Find"}, ignore=["instruction"])


def test_what_is_no_index_is_told(tmp_path, db):
    for path in ("my.db", str(tmp_path / "gone" / "my.lance")):
        with pytest.raises(ValueError, match="An index must be a folder NAME.lance within a folder that is there, got"):
            Index(path)
    with pytest.raises(ValueError, match=r'There is no index .*Make it: python -m scripts.embed index FOLDER --db ".*'):
        Index(db)
    Path(db).mkdir()
    with pytest.raises(ValueError, match="my.lance is no index of passages, or is damaged: Table 'my' was not found"):
        Index(db)
    import lancedb

    lancedb.connect(tmp_path).create_table("other", [{"a": 1}])
    with pytest.raises(ValueError, match="other.lance is no index of passages"):
        Index(str(tmp_path / "other.lance"))


def test_there_is_one_writer_at_a_time(db):
    with FileLock(Path(db).with_name(".my.lance.lock")):
        with pytest.raises(ValueError, match="Another process writes to .*my.lance"), locked(db):
            raise AssertionError("the lock was not held")
    with locked(db):
        pass
    with locked(db):
        pass


def test_quotes():
    assert quote("it's") == "'it''s'"
