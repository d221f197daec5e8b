"""training/data.py: rows of every layout, broken rows, single-dataset batches, in-context examples."""

import codecs
import gzip
import json
from collections import Counter

import pytest
import torch
from conftest import write_rows

from training.data import (
    BadRow,
    Collator,
    DatasetSpec,
    SingleDatasetBatchSampler,
    StreamedBatches,
    TrainingData,
    load_rows,
    normalise_row,
    read_data_file,
    read_rows,
    stream_rows,
    text_id,
)


def rows_of(name, count, negatives=0):
    return [
        {
            "query": f"{name} query {i}",
            "positive": f"{name} positive {i}",
            "negatives": [f"{name} negative {i} {j}" for j in range(negatives)],
        }
        for i in range(count)
    ]


def training_data(**kwargs):
    specs = [
        DatasetSpec("a", "a.jsonl", ["find a"]),
        DatasetSpec("b", "b.jsonl", ["find b", "similar b"], symmetric=["similar b"]),
        DatasetSpec("c", "c.jsonl", ["find c"], sample_ratio=0.5),
    ]
    return TrainingData(specs, [rows_of("a", 21, 3), rows_of("b", 16), rows_of("c", 40, 1)], **kwargs)


@pytest.mark.parametrize(
    "row, negatives",
    [
        ({"query": "q", "positive": "p", "negative": "n"}, ["n"]),
        ({"query": "q", "positive": "p", "negatives": ["n", "m"]}, ["n", "m"]),
        ({"query": "q", "positive": "p", "negatives": []}, []),
        ({"anchor": "q", "positive": "p"}, []),
        ({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, ["n", "m"]),
        ({"query": "q", "positive": ["p", "other"], "negative": ["n"]}, ["n"]),
        ({"sentence1": "q", "sentence2": "p"}, []),
        ({"query": "q", "positive": "p", "neg": ["n"], "negative_10": "m"}, ["n", "m"]),
        # What miners write beside their negatives is no text to train on.
        (
            {"query": "q", "positive": "p", "negative_1": "n", "negative_score": "0.5", "negative_ids": ["d1", "d2"]},
            ["n"],
        ),
    ],
)
def test_layouts(row, negatives):
    assert normalise_row(row, "here") == {"query": "q", "positive": "p", "negatives": negatives}


BROKEN = [
    (b'{"query": "q"}', "no positive"),
    (b'{"query": "", "positive": "p"}', "query is empty"),
    (b'{"query": "q", "positive": "  "}', "positive is empty"),
    (b'{"query": 5, "positive": "p"}', "query must be a string, got int"),
    (b'{"query": "q", "positive": "p", "negatives": ["n", null]}', "no negative"),
    (b'["q", "p"]', "expected an object"),
    (b'{"query": "q", "positive": "p\xff"}', "invalid UTF-8 at byte 29"),
    (b'{"query": "q", ', "not JSON"),
    (rb'{"query": "half \ud83d char", "positive": "p"}', "query is no Unicode text"),
    (rb'{"query": "q", "positive": "p", "negatives": ["n", "\udc00"]}', "negative is no Unicode text"),
    (b'{"query": "q", "positive": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"query": "q", "positive": "p", "id": ' + b"7" * 5_000 + b"}", "not JSON"),
]


@pytest.mark.parametrize("line, reason", BROKEN)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_broken_rows_stop_with_file_line_and_reason(tmp_path, line, reason, suffix):
    path = str(tmp_path / f"rows{suffix}")
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as file:
        file.write(b'{"query": "q", "positive": "p"}\n\n' + line + b"\n")
    with pytest.raises(BadRow) as error:
        list(read_rows(path))
    assert f"{path}, line 3: " in str(error.value) and reason in str(error.value)


def test_broken_rows_are_counted_when_skipped(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line, _ in BROKEN) + b'{"query": "q", "positive": "p"}\n')
    assert [row["query"] for row in read_rows(str(path), skip_bad_rows=True)] == ["q"]
    assert f"skipped {len(BROKEN)} bad rows" in caplog.text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """As editors on Windows write it; files put together have one in the middle."""
    row, mark = b'{"query": "q", "positive": "p"}\n', codecs.BOM_UTF8
    (tmp_path / "rows.jsonl").write_bytes(mark + row + row + mark + row + mark)
    assert [row["query"] for row in read_rows(str(tmp_path / "rows.jsonl"))] == ["q"] * 3
    listed = json.dumps([{"name": "a", "path": "a.jsonl", "instructions": ["find"]}]).encode()
    (tmp_path / "data.json").write_bytes(mark + listed)
    assert read_data_file(str(tmp_path / "data.json"))[0].name == "a"


@pytest.mark.parametrize(
    "content, told",
    [
        (b'[\n {"name": "a",}\n]', "line 2: .*column"),
        (b'[{"name": "\xff"}]', "UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" + b"7" * 5_000 + b"]", "digits"),
    ],
)
def test_a_data_file_that_cannot_be_read_is_named(tmp_path, content, told):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{told}"):
        read_data_file(str(path))


def damaged(content: bytes, how: str) -> bytes:
    half = len(content) // 2
    return content[:half] if how == "cut off" else content[:half] + bytes(255 - b for b in content[half:])


@pytest.mark.parametrize("how", ["cut off", "overwritten"])
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet"])
def test_a_damaged_file_is_named(tmp_path, name, how):
    import datasets

    rows = rows_of("x", 2000, 1)
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    path.write_bytes(damaged(path.read_bytes(), how))
    for load in (
        lambda: list(read_rows(str(path), skip_bad_rows=True)),
        lambda: load_rows(DatasetSpec("x", name, ["find"]), str(tmp_path), str(tmp_path / "cache"), skip_bad_rows=True),
    ):
        with pytest.raises(OSError, match=f"{path} cannot be read"):
            load()


def test_a_parquet_file_with_text_that_is_none(tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"q", b"\xff"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"query": text, "positive": ["p", "p"]}), tmp_path / "x.parquet")
    with pytest.raises(OSError, match="x.parquet cannot be read"):
        list(read_rows(str(tmp_path / "x.parquet")))


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_bad_row_is_told_wherever_it_is(tmp_path, bad):
    lines = [b'{"query": "q", "positive": "p"}'] * 3
    lines[bad - 1] = b'{"query": "q"}'
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    spec = DatasetSpec("x", "x.jsonl", ["find"])
    with pytest.raises(BadRow, match=f"x.jsonl, line {bad}: no positive"):
        load_rows(spec, str(tmp_path), str(tmp_path / "cache"))
    rows = load_rows(spec, str(tmp_path), str(tmp_path / "cache"), skip_bad_rows=True)
    assert rows["query"][:] == ["q", "q"]


def test_files_become_memory_mapped_rows(tmp_path):
    import datasets

    rows = rows_of("x", 5, 2)
    write_rows(tmp_path / "x.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        loaded = load_rows(DatasetSpec("x", name, ["find"]), str(tmp_path), str(tmp_path / "cache"))
        assert loaded.to_list() == rows
        assert loaded.cache_files


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "x.jsonl"
    spec = DatasetSpec("x", "x.jsonl", ["find"])
    write_rows(path, [{"query": "old", "positive": "p"}])
    assert load_rows(spec, str(tmp_path), str(tmp_path / "cache"))["query"][:] == ["old"]
    write_rows(path, [{"query": "newer", "positive": "p"}])
    assert load_rows(spec, str(tmp_path), str(tmp_path / "cache"))["query"][:] == ["newer"]


def test_a_file_beside_the_data_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "here.jsonl", [{"query": "q", "positive": "p"}])
    spec = DatasetSpec("x", "here.jsonl", ["find"])
    assert load_rows(spec, "elsewhere", str(tmp_path / "cache"))["query"][:] == ["q"]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_rows(DatasetSpec("x", "x.jsonl", ["find"]), str(tmp_path), str(tmp_path / "cache"))
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no usable row"):
        load_rows(DatasetSpec("x", "x.jsonl", ["find"]), str(tmp_path), str(tmp_path / "cache"))


def test_data_files(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"name": "a", "path": "a.jsonl", "instructions": ["find"]}]))
    assert [spec.name for spec in read_data_file(str(path))] == ["a"]
    with pytest.raises(ValueError, match=r"\['b'\].*\['a'\]"):
        read_data_file(str(path), ["b"])
    for entries, message in (
        ([], "at least one dataset"),
        ([{"name": "a", "path": "a", "instructions": []}], "at least one instruction"),
        ([{"name": "a", "path": "a", "instructions": ["f"], "sample_ratio": 2}], "sample_ratio"),
        ([{"name": "a", "path": "a", "instructions": "find"}], "`instructions` must be a list of strings, got 'find'"),
        ([{"name": "a", "path": "a", "instructions": ["f"], "symmetric": ["g"]}], "symmetric"),
        ([{"name": "a", "path": "a", "instructions": ["f"], "ratio": 1}], "each entry has the fields"),
    ):
        path.write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=message):
            read_data_file(str(path))


def test_a_global_batch_has_one_dataset_and_one_instruction():
    sampler = SingleDatasetBatchSampler(training_data(), batch_size=2, micro_batches=4, num_global_batches=9)
    micro = list(sampler)
    assert len(micro) == len(sampler) == 36
    for start in range(0, 36, 4):
        keys = [key for batch in micro[start : start + 4] for key in batch]
        assert len(keys) == 8
        assert len({(key.dataset, key.epoch, key.instruction) for key in keys}) == 1


def test_every_row_is_seen_once_per_epoch_and_the_remainder_reported():
    sampler = SingleDatasetBatchSampler(training_data(), batch_size=4, micro_batches=2)
    assert sampler.dropped == {"a": 5, "b": 0, "c": 4}
    for epoch in (0, 1):
        seen = Counter((key.dataset, key.row) for batch in sampler.epoch(epoch) for key in batch)
        assert set(seen.values()) == {1}
        assert Counter(dataset for dataset, _ in seen) == {0: 16, 1: 16, 2: 16}
    assert {k.row for b in sampler.epoch(0) for k in b if k.dataset == 2} != {
        k.row for b in sampler.epoch(1) for k in b if k.dataset == 2
    }


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return list(SingleDatasetBatchSampler(training_data(), 4, 2, num_global_batches=12, seed=seed))

    assert order(1) == order(1) != order(2)


def test_instructions_alternate():
    data = training_data()
    batches = SingleDatasetBatchSampler(data, 4, 1, num_global_batches=40).epoch(0)
    assert Counter(batch[0].instruction for batch in batches if batch[0].dataset == 1) == {0: 2, 1: 2}


def test_a_dataset_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="'b'.* 16 .* 18"):
        SingleDatasetBatchSampler(training_data(), 18)


def test_documents_carry_the_instruction_only_when_symmetric():
    data = training_data()
    by_instruction = {}
    for batch in SingleDatasetBatchSampler(data, 4).epoch(0):
        example = data[batch[0]]
        by_instruction[example.instruction] = example.document_instruction
    assert by_instruction == {"find a": None, "find b": None, "similar b": "similar b", "find c": None}


def test_in_context_examples_never_hold_the_row_itself():
    rows = rows_of("a", 30) + [{"query": "a query 3", "positive": "a positive 4", "negatives": []}]
    data = TrainingData([DatasetSpec("a", "a", ["find"])], [rows], max_examples=5)
    counts = Counter()
    for batch in SingleDatasetBatchSampler(data, 31, num_global_batches=20):
        for key in batch:
            example = data[key]
            counts[len(example.examples)] += 1
            texts = {text for shot in example.examples for text in shot.values()}
            assert not texts & {example.query, example.positive}
            assert data[key] == example  # drawn from the seed, the epoch and the row
    assert set(counts) == {0, 1, 2, 3, 4, 5} and min(counts.values()) > 50


def test_the_collator_gives_positives_then_negatives(tiny_model):
    data = training_data(num_negatives=2)
    batch = [data[key] for key in next(b for b in SingleDatasetBatchSampler(data, 4).epoch(0) if b[0].dataset == 0)]
    tensors = Collator(tiny_model.processor, share_prefix=False)(batch)
    documents = [e.positive for e in batch] + [text for e in batch for text in e.negatives]
    assert len(documents) == 12
    assert tensors["document_ids"].tolist() == [text_id(text) for text in documents]
    expected = tiny_model.processor(documents)
    assert tensors["documents"]["input_ids"].equal(expected["input_ids"])
    assert tensors["queries"]["input_ids"].equal(tiny_model.processor([e.query for e in batch], "find a")["input_ids"])
    assert tensors["dataset"] == "a" and tensors["rows"] == [e.row for e in batch]
    shared = Collator(tiny_model.processor)(batch)
    prefix_ids = shared["queries"]["prefix_ids"]  # (1, prefix_len)
    assert prefix_ids[0].tolist() == tiny_model.processor.encode_prefix("find a")
    rows = torch.cat([prefix_ids.expand(4, -1), shared["queries"]["input_ids"]], dim=-1)
    assert rows.equal(tensors["queries"]["input_ids"])
    # What several rows begin with is read once.
    tokens = [
        sum(int(side["attention_mask"].sum()) for side in (t["queries"], t["documents"])) for t in (shared, tensors)
    ]
    assert (
        shared["decoder_tokens"]
        == tokens[0] + prefix_ids.numel() + shared["documents"]["prefix_ids"].numel()
        < tokens[1]
    )


def test_the_collator_gives_each_query_its_own_examples(tiny_model):
    data = TrainingData([DatasetSpec("a", "a", ["find"])], [rows_of("a", 30)], max_examples=3)
    batch = [data[key] for key in SingleDatasetBatchSampler(data, 8).epoch(0)[0]]
    assert len({len(e.examples) for e in batch}) > 1
    tensors = Collator(tiny_model.processor)(batch)
    for place, example in enumerate(batch):
        alone = tiny_model.processor(example.query, "find", examples=example.examples or None)["input_ids"][0]
        ids = tensors["queries"]["input_ids"][place]
        assert ids[tensors["queries"]["attention_mask"][place].bool()].equal(alone)


def streams(tmp_path, **counts):
    """Streams of as many rows as asked, from files of several kinds."""
    import datasets

    specs = []
    for name, count in counts.items():
        rows = rows_of(name, count, negatives=1)
        if name == "p":
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
        else:
            write_rows(tmp_path / f"{name}.jsonl", rows)
        instructions = [f"find {name}", f"similar {name}"]
        path = f"{name}.{'parquet' if name == 'p' else 'jsonl'}"
        specs.append(DatasetSpec(name, path, instructions, symmetric=instructions[1:]))
    return specs, [stream_rows(spec, str(tmp_path)) for spec in specs]


def test_streamed_batches_hold_every_row_once_per_pass(tmp_path):
    data = TrainingData(*streams(tmp_path, a=22, p=12), num_negatives=1, seed=3)
    stream = StreamedBatches(data, batch_size=2, micro_batches=2, num_global_batches=40, shuffle_buffer=8)
    batches = list(stream)
    assert len(batches) == len(stream) == 80
    queries: dict[str, list[str]] = {"a": [], "p": []}
    for first, second in zip(batches[::2], batches[1::2]):
        names = {example.dataset for example in first + second}
        assert len(names) == len({example.instruction for example in first + second}) == 1
        queries[names.pop()] += [example.query for example in first + second]
    for name, (rows, used) in {"a": (22, 20), "p": (12, 12)}.items():
        passes = [queries[name][start : start + used] for start in range(0, len(queries[name]) - used + 1, used)]
        assert len(passes) >= 2
        for part in passes:
            assert len(set(part)) == used and set(part) <= {f"{name} query {i}" for i in range(rows)}
        assert passes[0] != passes[1] != sorted(passes[1])
    assert list(stream) == batches  # the same again, as a resumed run needs
    assert {example.document_instruction for batch in batches for example in batch} >= {None, "similar a"}


def test_ranks_and_workers_share_a_stream_out(tmp_path):
    data = TrainingData(*streams(tmp_path, a=24), seed=1)
    make = dict(batch_size=3, micro_batches=4, num_global_batches=5, shuffle_buffer=5)
    everything = list(StreamedBatches(data, **make))
    for rank in range(2):
        share = StreamedBatches(data, **make, rank=rank, world_size=2)
        assert list(share) == everything[rank::2] and len(share) == 10


def test_examples_of_streamed_rows_come_from_their_batch(tmp_path):
    data = TrainingData(*streams(tmp_path, a=24), max_examples=3, seed=1)
    drawn = 0
    for batch in StreamedBatches(data, batch_size=8, num_global_batches=6, shuffle_buffer=5):
        queries = {example.query for example in batch}
        for example in batch:
            drawn += len(example.examples)
            assert {shown["query"] for shown in example.examples} <= queries - {example.query}
    assert drawn > 20


def test_a_stream_stops_where_it_must(tmp_path):
    data = TrainingData(*streams(tmp_path, a=3))
    with pytest.raises(ValueError, match="'a'.* 3 .* 4 "):
        list(StreamedBatches(data, batch_size=4))
    (tmp_path / "a.jsonl").write_text('{"query": "q", "positive": "p"}\n{"query": "q"}\n')
    with pytest.raises(BadRow, match="line 2: no positive"):
        list(StreamedBatches(data, batch_size=1, num_global_batches=2))
    with pytest.raises(FileNotFoundError, match="no file"):
        stream_rows(DatasetSpec("x", "x.jsonl", ["find"]), str(tmp_path))


def test_examples_that_leave_no_room_are_left_out(tiny_model):
    row = {"query": "a question", "positive": "a long answer " * 20, "negatives": []}
    rows = [{**row, "query": f"question {i}", "positive": f"{row['positive']} {i}"} for i in range(20)]
    data = TrainingData([DatasetSpec("a", "a", ["find"])], [rows], max_examples=5)
    batch = [data[key] for key in SingleDatasetBatchSampler(data, 8).epoch(0)[0]]
    assert max(len(e.examples) for e in batch) > 2
    limit = tiny_model.processor.icl_max_seq_length
    assert len(tiny_model.processor.encode_prefix("find", batch[0].examples[:1] or batch[1].examples[:1])) < limit
    queries = Collator(tiny_model.processor)(batch)["queries"]
    assert queries["input_ids"].shape[1] <= limit
    assert (queries["input_ids"] == tiny_model.config.contextual_token_id).sum() == len(batch)
