"""dev_tasks.py: folders that mteb_tasks.py reads, made of a few rows."""

import pytest

import dev_tasks
from corpus_pairs import write_rows


mteb = pytest.importorskip("mteb")
from mteb_tasks import folder_revision, select_tasks  # noqa: E402


@pytest.fixture
def sources(tmp_path):
    """Flags for folders with every file that a task is made of; rows are numbered, every second has a negative."""
    rows = [
        {"query": f"query {n // 2}", "positive": f"positive {n}", "negatives": [f"negative {n}"] * (n % 2)}
        for n in range(40)
    ]
    for source in dev_tasks.SOURCES:
        if source.type == "Clustering":
            lines = [f"{source.stem}, line {n} of a document " + "x" * 150 for n in range(16)]
            (tmp_path / f"{source.stem}.txt").write_text("\n\n".join("\n".join(lines) for _ in range(3)))
        elif source.type == "Classification":
            labels = [{"query": f"text {n}", "positive": "abc"[n % 3]} for n in range(30)]
            write_rows(tmp_path / "labels" / f"{source.stem}.jsonl.gz", labels)
        else:
            write_rows(tmp_path / f"{source.stem}.jsonl.gz", rows)
    return f"--train_dir {tmp_path} --corpus_dir {tmp_path} --labels_dir {tmp_path / 'labels'}".split()


def test_mteb_reads_every_task(sources, tmp_path):
    output = tmp_path / "dev"
    dev_tasks.main([*sources, "--output_dir", str(output)])
    tasks = {task.name: task for task in select_tasks(["all"], output)}
    assert set(tasks) == {source.name for source in dev_tasks.SOURCES}
    for source in dev_tasks.SOURCES:
        task = tasks[source.name]
        task.task.load_data()
        assert (task.type, task.instruction) == (source.type, source.instruction)

    found = tasks["DevRACE"].task.dataset["default"]["test"]
    texts = {row["id"]: row["text"] for row in found["corpus"]}
    queries = {row["id"]: row["text"] for row in found["queries"]}
    assert sorted(texts.values()) == sorted(f"positive {n}" for n in range(40))
    pairs = {(queries[query], texts[name]) for query, names in found["relevant_docs"].items() for name in names}
    assert pairs == {(f"query {n // 2}", f"positive {n}") for n in range(40)}

    found = tasks["DevTrecQA"].task.dataset["default"]["test"]
    texts = {row["id"]: row["text"] for row in found["corpus"]}
    queries = {row["id"]: row["text"] for row in found["queries"]}
    ranked = {queries[query]: {texts[name] for name in names} for query, names in found["top_ranked"].items()}
    assert ranked == {f"query {n // 2}": {f"positive {n}", f"negative {n}"} for n in range(1, 40, 2)}

    table = tasks["DevSNLI"].task.dataset["test"]
    assert {(row["sentence2"].split()[0], row["labels"]) for row in table} == {("positive", 1), ("negative", 0)}
    assert sorted(path.name for path in (tmp_path / "dev-examples").iterdir()) == [
        "DevEmotion.json",
        "DevSentiment.json",
    ]
    table = tasks["DevEmotion"].task.dataset
    assert {len(table[split]) for split in ("train", "test")} == {15}
    assert {(int(row["text"].split()[1]) % 3, row["label"]) for row in table["test"]} == {(0, 0), (1, 1), (2, 2)}
    assert set(tasks["DevPEPs"].task.dataset["test"]["labels"]) == {0, 1, 2}


def test_examples_are_one_of_each_class_and_not_of_the_task():
    rows = [{"query": f"q{n}", "positive": "ab"[n % 2]} for n in range(9)] + [{"query": "long" * 9, "positive": "c"}]
    source = dev_tasks.Source("Dev", "Classification", "x", "y", documents=4)
    asked = dev_tasks.classes(source, rows, longest=9)["default"]
    assert sorted(row["text"] for table in asked.values() for row in table) == ["q0", "q1", "q2", "q3"]
    assert dev_tasks.class_examples(source, rows, longest=9) == [
        {"query": "q4", "response": "a"},
        {"query": "q5", "response": "b"},
    ]
    assert dev_tasks.class_examples(source, rows[:4], longest=9) == []


def test_the_same_seed_makes_the_same_tasks(sources, tmp_path):
    def revision(name: str, *flags: str) -> str:
        dev_tasks.main([*sources, "--tasks", "DevParaSCI", "--output_dir", str(tmp_path / name), *flags])
        return folder_revision(tmp_path / name / "DevParaSCI")

    first = revision("a")
    assert revision("a") == first  # written over
    assert revision("b") == first
    assert revision("b", "--seed", "1") != first
    assert [folder.name for folder in (tmp_path / "a").iterdir()] == ["DevParaSCI"]


def test_rows_and_texts_are_as_many_and_as_long_as_asked():
    rows = [{"query": f"q{n}", "positive": f"p{n}" * 9, "negatives": []} for n in range(9)]
    source = dev_tasks.Source("Dev", "Retrieval", "x", "y", queries=2, documents=5)
    tables = dev_tasks.search(source, rows, longest=4)
    assert {name: len(splits["test"]) for name, splits in tables.items()} == {"corpus": 5, "queries": 2, "default": 2}
    assert [row["text"] for row in tables["corpus"]["test"]] == [f"p{n}p{n}" for n in range(5)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "DevRACE"], "DevRACE is made of race_qa.jsonl.gz: give its folder as --train_dir, got None"),
        (["--tasks", "DevEmotion", "--labels_dir", "."], "give its folder as --labels_dir, got ."),
        (["--tasks", "DevPEPs"], "DevPEPs is made of peps.txt: give its folder as --corpus_dir, got None"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises(FileNotFoundError) as error:
        dev_tasks.main([*flags, "--output_dir", str(tmp_path / "dev")])
    assert message in str(error.value)
    assert not (tmp_path / "dev").exists()


def test_rows_of_another_kind_are_an_error(sources, tmp_path):
    write_rows(tmp_path / "trecqa_wang.jsonl.gz", [{"query": "a", "positive": "b", "negatives": []}])
    with pytest.raises(ValueError, match="trecqa_wang.jsonl.gz has no rows for DevTrecQA"):
        dev_tasks.main([*sources, "--tasks", "DevTrecQA", "--output_dir", str(tmp_path / "dev")])
    assert not (tmp_path / "dev").exists()
