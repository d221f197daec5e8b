"""Embedding a corpus with Ray Data: a driver that is killed, and what is refused. About 40 seconds, with one Ray."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch


pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

import ray  # noqa: E402

from serving.corpus import Encoder, Output, fingerprint_of, main  # noqa: E402
from serving.vectors import read_fingerprint  # noqa: E402
from tests.conftest import ROOT, TEXTS  # noqa: E402


ROWS = 480
SENTENCES = [f"{TEXTS[i % 6] or 'not empty'} {i}" for i in range(ROWS + 1)]
BAD = {7: None, 11: " ", 13: 5}  # by id


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of this process, which other processes can use too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def corpus(tmp_path):
    """A file of sentences, three of which cannot be embedded."""
    with (tmp_path / "texts.jsonl").open("w") as file:
        for number, text in enumerate(SENTENCES[:ROWS]):
            file.write(json.dumps({"id": number, "text": BAD.get(number, text)}) + "\n")
    return tmp_path / "texts.jsonl"


def arguments(corpus, output, model, *more) -> list[str]:
    given = {"--input": corpus, "--output": output, "--model": model, "--actors": 1, "--rows_per_file": 8}
    return [str(part) for pair in given.items() for part in pair] + list(more)


def test_a_killed_driver_is_resumed(cluster, corpus, tmp_path, saved_dir, tiny_model, capfd):
    output = Output(str(tmp_path / "out"))
    command = arguments(corpus, output.path, saved_dir, "--instruction", "find it", "--keep_text")
    driver = subprocess.Popen([sys.executable, "-m", "serving.corpus", *command, "--address", cluster], cwd=ROOT)
    while output.count_done() < 24:
        assert driver.poll() is None, "the driver ended by itself"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    time.sleep(1)  # its workers end
    kept = output.count_done()
    assert 24 <= kept < ROWS
    with corpus.open("a") as lines:
        lines.write(json.dumps({"id": ROWS, "text": SENTENCES[ROWS]}) + "\n")
    assert main(command) == 0
    run = output.read()
    assert run["summary"]["new_rows"] == ROWS + 1 - kept  # what the checkpoint knew was not embedded again
    assert run["summary"]["errors"] == dict.fromkeys(
        ["text is null or missing", "text is empty", "text is int, not a string"], 1
    )
    assert (run["summary"]["texts"], run["input_rows"], run["id_type"]) == (ROWS - 2, ROWS + 1, "int64")

    table = output.dataset().to_table().sort_by("id")
    assert table["id"].to_pylist() == list(range(ROWS + 1))
    assert [row_id for row_id, error in enumerate(table["error"].to_pylist()) if error] == list(BAD)
    assert table["embedding"].null_count == 3
    good = [number for number in range(ROWS + 1) if number not in BAD]
    vectors = np.stack(table["embedding"].take(good).to_numpy(zero_copy_only=False))
    expected = tiny_model.encode([SENTENCES[number] for number in good], instruction="find it", truncation="silent")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert table["text"].take(good).to_pylist() == [SENTENCES[number] for number in good]
    rows = tiny_model.processor.rows([SENTENCES[number] for number in good], "find it")
    assert table["n_tokens"].take(good).to_pylist() == [len(row.prefix_ids) + len(row.ids) for row in rows]
    assert table["truncated"].take(good).to_pylist() == [bool(row.cut) for row in rows]
    assert any(row.cut for row in rows) and not all(row.cut for row in rows)
    file = next((tmp_path / "out" / "data").glob("*.parquet"))
    assert read_fingerprint(file) == tiny_model.fingerprint("find it") == run["fingerprint"]

    # The same again has nothing to do; anything else is refused and changes nothing.
    assert main(command) == 0 and "already" in capfd.readouterr().out
    assert main(arguments(corpus, output.path, saved_dir, "--keep_text")) == 2
    assert "instruction ('find it' there, None here)" in capfd.readouterr().err
    assert main([*command, "--precision", "int8"]) == 2 and "precision" in capfd.readouterr().err
    assert output.read() == run

    # A file that the checkpoint does not know would be there twice.
    (tmp_path / "out" / "data" / "copy.parquet").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="something else wrote there"):
        output.summarize()


def test_ids_that_are_there_twice_are_told(cluster, tmp_path, saved_dir, capfd):
    for name, ids in (("a", "abc"), ("b", "cda"), ("c", "c")):
        pq.write_table(pa.table({"key": list(ids), "text": list(ids)}), tmp_path / f"{name}.parquet")
    command = arguments(f"{tmp_path}/*.parquet", tmp_path / "out", saved_dir, "--id_column", "key")
    assert main(command) == 2
    assert "2 ids of --input are there more than once: 'c' 3 times, 'a' 2 times" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_refused_before_ray_starts(tmp_path, corpus, saved_dir, capfd):
    output = tmp_path / "out"
    assert main(arguments(tmp_path / "nothing", output, saved_dir)) == 2 and "finds no file" in capfd.readouterr().err
    assert main(arguments(corpus, output, tmp_path)) == 2 and "model" in capfd.readouterr().err
    assert main(arguments(corpus, output, saved_dir, "--truncate_dim", "1000")) == 2
    assert "truncate_dim" in capfd.readouterr().err
    assert main(arguments(corpus, output, saved_dir, "--truncate_dim", "12", "--precision", "binary")) == 2
    assert "multiple of 8" in capfd.readouterr().err
    assert main(arguments(corpus, output, saved_dir, "--id_column", "key")) == 2
    assert "nothing under 'key'" in capfd.readouterr().err
    assert not output.exists()


@pytest.fixture
def encoder(tiny_model, saved_dir):
    """The actor's class in this process."""
    options = {"model": str(saved_dir), "revision": None, "dtype": "float32", "instruction": None, "dim": 32}
    options |= {"batch_size": 16, "batch_tokens": 4096, "precision": "float32", "keep_text": False, "id_type": "int64"}
    return Encoder(options, fingerprint_of(tiny_model, options), cpus=1)


def block(texts) -> "pa.Table":
    errors = pa.array([None if text else "text is empty" for text in texts], pa.string())
    return pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.large_string()), "error": errors})


def test_a_batch_that_does_not_fit_is_halved(encoder, tiny_model, monkeypatch):
    texts, whole, sizes = [*SENTENCES[:20], None, "huge"], encoder.forward, []
    decode = encoder.model.processor.tokenizer.batch_decode

    def forward(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 3 or "huge" in str(decode(batch["input_ids"])):
            raise torch.OutOfMemoryError
        return whole(batch)

    monkeypatch.setattr(encoder, "forward", forward)
    written = encoder(block(texts))
    assert max(sizes) > 3  # or nothing was halved
    assert written["error"].to_pylist()[:20] == [None] * 20
    assert written["error"][20].as_py() == "text is empty" and written["error"][21].as_py().startswith("out of memory")
    assert written["embedding"].is_null().to_pylist() == [False] * 20 + [True] * 2
    vectors = np.stack(written["embedding"][:20].to_numpy(zero_copy_only=False))
    expected = tiny_model.encode(texts[:20], truncate_dim=32, truncation="silent")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_block_without_any_text(encoder):
    written = encoder(block([None, ""]))
    assert written["embedding"].null_count == 2 and written.schema == encoder.schema


def test_another_model_on_a_machine_is_refused(encoder, saved_dir, other_model, tmp_path):
    other_model.save_pretrained(tmp_path / "other")
    options = {**encoder.options, "model": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="weights"):
        Encoder(options, fingerprint_of(encoder.model, options), cpus=1)
