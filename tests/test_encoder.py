"""evaluation/encoder.py: what mteb gets: vectors, similarities, instructions, examples, noise, caches, ranks."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from eval_packs import counting, embed_in_a_process, load, retrieval_configs, scores, sentences, sts_rows, write_pack

from evaluation.encoder import Examples, Instructions, Noise
from evaluation.identity import load_for_mteb
from evaluation.report import load_paper, read_run
from evaluation.run import result_cache, run, run_task


mteb = pytest.importorskip("mteb")


pytestmark = pytest.mark.usefixtures("offline")


def test_mtebs_own_mock_tasks_pass(saved_dir):
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
    from mteb.mocks.mock_run import get_compatible_mock_tasks, mock_run
    from mteb.models import EncoderProtocol

    encoder = load_for_mteb(str(saved_dir))
    encoder.instruction_for = Instructions({task.metadata.name: "Compare" for task in ALL_MOCK_TASK_TEST_GRID})
    assert isinstance(encoder, EncoderProtocol)
    results = mock_run(encoder)
    expected = {task.metadata.name for task in get_compatible_mock_tasks(encoder)}
    assert len(expected) >= 25
    failed = {name: results[name] for name in expected if not hasattr(results[name], "scores")}
    assert not failed


class Precomputed:
    """What a plain script gives to mteb: vectors that were computed before."""

    def __init__(self, vectors: dict):
        from mteb.models import ModelMeta

        self.vectors = vectors
        self.mteb_model_meta = ModelMeta.create_empty({"name": "a/script", "revision": "1"})

    def encode(self, inputs, *, prompt_type=None, **kwargs):
        side = None if prompt_type is None else prompt_type.value
        return np.stack([self.vectors[side, text] for batch in inputs for text in batch["text"]])

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


SHARED = ROOT.parent / "shared" / "data" / "eval"


@pytest.mark.parametrize("source", ["tiny", "shared"])
def test_scores_equal_those_of_a_plain_script(saved_dir, tiny_model, tmp_path, monkeypatch, source):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # it goes by a folder's name alone
    if source == "shared":
        if not SHARED.is_dir():
            pytest.skip(f"no folder {SHARED.name} with real packs beside this clone")
        pairs, configs = subsampled_packs()
    else:
        pairs, configs = sts_rows(5, 20), retrieval_configs(6)
    write_pack(tmp_path / "data" / "STS16", {"default": {"test": pairs}})
    write_pack(tmp_path / "data" / "SciFact", configs)
    tasks, encoder = load(saved_dir, tmp_path / "data", tmp_path / "out")
    run(tasks, [encoder], tmp_path / "out")

    instructions = json.loads((ROOT / "instructions.json").read_text())
    pair_texts = [row[key] for row in pairs for key in ("sentence1", "sentence2")]
    queries = [row["text"] for row in configs["queries"]["test"]]
    documents = [f"{row['title']} {row['text']}".strip() for row in configs["corpus"]["test"]]
    vectors = {}
    for side, texts, instruction in (
        (None, pair_texts, instructions["STS16"]),
        ("query", queries, instructions["SciFact"]),
        ("document", documents, None),
    ):
        vectors |= zip([(side, text) for text in texts], tiny_model.encode(texts, instruction=instruction))
    for name in ("STS16", "SciFact"):
        task = copy.deepcopy(mteb.get_task(name, eval_splits=["test"]))
        task.metadata.dataset.update(path=str(tmp_path / "data" / name), revision="x")
        result = mteb.evaluate(Precomputed(vectors), task, cache=None, co2_tracker=False, show_progress_bar=False)
        plain = 100 * result[0].get_score()
        assert 0 < abs(plain) < 100
        assert scores(tmp_path / "out")[name] == pytest.approx(plain, abs=1e-4)  # mteb's files keep 6 decimals of 1
        ours = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
        assert ours[0].get_score() == pytest.approx(plain / 100, abs=1e-6)


def subsampled_packs():
    import pyarrow.parquet as pq

    def rows(path: str) -> list[dict]:
        return pq.read_table(next((SHARED / path).parent.glob(Path(path).name))).to_pylist()

    pairs = [{key: row[key] for key in ("sentence1", "sentence2", "score")} for row in rows("STS16/data/test-*")[::25]]
    relevant = rows("SciFact/default/test-*")[:15]
    queries, documents = {row["query-id"] for row in relevant}, {row["corpus-id"] for row in relevant}
    corpus = [row for i, row in enumerate(rows("SciFact/corpus/corpus-*")) if row["_id"] in documents or i % 150 == 0]
    return pairs, {
        "corpus": {"test": [{**row, "text": row["text"][:300]} for row in corpus]},
        "queries": {"test": [row for row in rows("SciFact/queries/queries-*") if row["_id"] in queries]},
        "default": {"test": relevant},
    }


def test_similarities_are_computed_in_fp32(saved_dir):
    encoder = load_for_mteb(str(saved_dir))
    a, b = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    expected = torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)
    similarities = encoder.similarity(a, b.float().numpy())
    assert similarities.dtype == torch.float32
    torch.testing.assert_close(similarities.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        encoder.similarity_pairwise(a, b[:5]).double(), expected[:, :5].diagonal(), atol=1e-6, rtol=0
    )


def test_vectors_are_fp32_whatever_the_models_dtype(saved_dir, data_dir, tmp_path):
    tasks, encoder = load(saved_dir, data_dir, tmp_path, "--dtype", "bf16")
    assert {parameter.dtype for parameter in encoder.backend.model.parameters()} == {torch.bfloat16}
    assert encoder.embed(["hi"], tasks[0].leaves()[0].metadata, None).dtype == np.float32


def test_vectors_that_are_not_finite_are_an_error(saved_dir, data_dir, tmp_path):
    tasks, encoder = load(saved_dir, data_dir, tmp_path)
    with torch.no_grad():
        encoder.backend.model.projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        encoder.embed(["hi"], tasks[0].leaves()[0].metadata, None)


def test_a_process_that_fails_does_not_leave_the_others_waiting(saved_dir, data_dir, tmp_path, monkeypatch):
    """It takes part in the exchange first, and the others learn there that its share is missing."""
    tasks, encoder = load(saved_dir, data_dir, tmp_path)
    met = []
    monkeypatch.setattr("evaluation.encoder.ranks", lambda: (0, 2))
    monkeypatch.setattr("evaluation.encoder.gather", lambda mine: met.append(mine) or mine)
    metadata = tasks[0].leaves()[0].metadata
    with pytest.raises(RuntimeError, match="Another process"):
        encoder.embed(["one", "two"], metadata, None)
    monkeypatch.setattr(encoder.backend, "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.embed(["three", "four"], metadata, None)
    assert [len(mine) for mine in met] == [1, 0]


def test_instructions_stand_before_queries_and_symmetric_texts():
    instructions = Instructions({"A": "Do A", "B": {"query": "Q", "document": "D"}, "C": ""})
    assert instructions(SimpleNamespace(name="A"), "query") == "Do A"
    assert instructions(SimpleNamespace(name="A"), "document") is None
    assert instructions(SimpleNamespace(name="A"), None) == "Do A"
    assert (
        instructions(SimpleNamespace(name="B"), "query") == "Q"
        and instructions(SimpleNamespace(name="B"), "document") == "D"
    )
    assert instructions(SimpleNamespace(name="C"), None) is None
    with pytest.raises(ValueError, match="No instruction for D"):
        instructions(SimpleNamespace(name="D"), None)


def test_every_benchmark_task_has_an_instruction():
    table = json.loads((ROOT / "instructions.json").read_text())
    assert set(table) == set(load_paper()["tasks"])
    assert all(isinstance(instruction, str) and instruction for instruction in table.values())


def test_parts_of_an_aggregate_have_its_instruction():
    from evaluation.tasks import select_tasks

    (task,) = select_tasks(["CQADupstackRetrieval"])
    instructions = Instructions.read(ROOT / "instructions.json", [task])
    parts = task.leaves()
    assert len(parts) == 12
    assert {instructions(part.metadata, "query") for part in parts} == {instructions.table["CQADupstackRetrieval"]}


def test_examples_reach_the_prefix_of_queries_only(saved_dir, data_dir, tmp_path):
    icl = tmp_path / "icl"
    icl.mkdir()
    for name in ("STS16", "SciFact", "X-Mine"):
        (icl / f"{name}.json").write_text(json.dumps([{"query": f"example of {name}", "response": "yes"}]))
    tasks, encoder = load(saved_dir, data_dir, tmp_path / "out", "--icl", str(icl))
    for task in tasks:
        metadata = task.leaves()[0].metadata
        instruction, examples = encoder.prompt(metadata, "query" if task.name == "SciFact" else None)
        assert examples == [{"query": f"example of {task.name}", "response": "yes"}]
        assert (
            f"<query>example of {task.name}\n<response>yes"
            in encoder.backend.describe("hi", instruction, examples)["decoder"]
        )
    assert encoder.prompt(tasks[0].leaves()[0].metadata, "document") == (None, None)

    (icl / "SciFact.json").unlink()
    (icl / "STS16.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks (SciFact|STS16).json, (SciFact|STS16).json"):
        load(saved_dir, data_dir, tmp_path / "out", "--icl", str(icl))


def test_examples_that_leave_no_room_for_text_are_left_out_and_counted(saved_dir, data_dir, tmp_path, capsys):
    tasks, encoder = load(saved_dir, data_dir, tmp_path / "out")
    examples = [{"query": "a long example " * 8, "response": "yes"} for _ in range(20)]
    encoder.examples_for = Examples({"STS16": examples})
    task = next(task for task in tasks if task.name == "STS16")
    instruction, fitting = encoder.prompt(task.leaves()[0].metadata, None)
    assert 0 < len(fitting) < 20 and fitting == examples[: len(fitting)]
    limit = encoder.backend.model.config.icl_max_seq_length
    prefix = encoder.backend.model.processor.encode_prefix
    assert (
        len(prefix(instruction, fitting)) <= limit - limit // 4 < len(prefix(instruction, examples[: len(fitting) + 1]))
    )
    record = run_task(task, encoder, tmp_path / "out", result_cache(tmp_path / "out"))
    assert record["examples"]["text"]["count"] == len(fitting) and record["examples"]["text"]["of"] == 20
    assert f"STS16, text: only {len(fitting)} of 20 examples leave room" in capsys.readouterr().err


def test_noise_depends_on_text_and_seed_alone():
    noise = Noise.read(ROOT / "evaluation" / "noise.txt", seed=3)
    texts = sentences(30, 0)
    noisy = [noise(text) for text in texts]
    assert noisy == [Noise.read(ROOT / "evaluation" / "noise.txt", seed=3)(text) for text in texts]
    assert all(after.startswith(before + " ") for before, after in zip(texts, noisy))
    appended = {after.removeprefix(before + " ") for before, after in zip(texts, noisy)}
    assert appended <= set(noise.lines) and len(appended) > 5
    other = Noise.read(ROOT / "evaluation" / "noise.txt", seed=4)
    assert noisy != [other(text) for text in texts] and other.digest != noise.digest


def test_an_empty_noise_file_is_an_error(tmp_path):
    (tmp_path / "noise.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no lines"):
        Noise.read(tmp_path / "noise.txt", 0)


def test_vectors_can_be_kept_on_disk(saved_dir, data_dir, tmp_path, monkeypatch):
    tasks, encoder = load(saved_dir, data_dir, tmp_path / "out", "--cache_dir", str(tmp_path / "vectors"))
    metadata = next(task for task in tasks if task.name == "SciFact").leaves()[0].metadata
    monkeypatch.setattr("evaluation.encoder.CHUNK", 4)
    texts = sentences(10, 0)
    first = encoder.embed(texts, metadata, "document")
    assert len(list((tmp_path / "vectors").glob("*.sqlite"))) == 1
    again = counting(encoder)
    np.testing.assert_array_equal(again.embed(texts, metadata, "document"), first)
    assert again.backend.texts == 0
    mixed = [texts[7], "new", texts[2], "new"]
    np.testing.assert_array_equal(again.embed(mixed, metadata, "document")[[0, 2]], first[[7, 2]])
    assert again.backend.texts == 1  # the one that is new, once
    again.embed(texts, metadata, "query")  # with an instruction
    assert again.backend.texts == 11
    other = counting(replace(encoder, settings={**encoder.settings, "revision": "another"}))
    other.embed(texts, metadata, "document")
    assert other.backend.texts == 10
    np.testing.assert_allclose(first, encoder.backend.model.encode(texts), atol=1e-5)


def test_texts_that_are_cut_are_counted(saved_dir, data_dir, tmp_path, monkeypatch):
    output = tmp_path / "out"
    tasks, encoder = load(saved_dir, data_dir, output, "--max_length", "100", "--cache_dir", str(tmp_path / "vectors"))
    metadata = next(task for task in tasks if task.name == "SciFact").leaves()[0].metadata
    monkeypatch.setattr("evaluation.encoder.CHUNK", 3)
    texts = ["hi", "z " * 39, "z " * 300, "z " * 300, "ho"]
    for _ in range(2):  # the second time from the cache
        encoder.truncated.clear()
        encoder.embed(texts, metadata, "document")
        assert encoder.truncated == {"texts": 3, "decoder": 2, "encoder": 3, "of": 5}
    encoder.embed(texts[:2], metadata, "query")  # has less room, for its instruction
    run(tasks, [encoder], output)
    for record in read_run(output).records.values():
        assert set(record["truncated"]) == {"texts", "decoder", "encoder", "of"}
        assert record["truncated"]["texts"] <= record["truncated"]["of"] <= record["texts"]


def test_no_texts_give_no_vectors(saved_dir, data_dir, tmp_path):
    tasks, encoder = load(saved_dir, data_dir, tmp_path / "out")
    vectors = encoder.embed([], tasks[0].leaves()[0].metadata, "document")
    assert vectors.shape == (0, encoder.backend.dim)


def test_processes_share_the_texts_and_all_get_all_vectors(tmp_path):
    torch.multiprocessing.spawn(
        embed_in_a_process, args=(str(tmp_path / "rendezvous"), str(tmp_path / "vectors")), nprocs=2
    )
    first, second = (np.load(tmp_path / f"vectors.{rank}.npy") for rank in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[:, 0], range(9))
    assert set(first[:, 1]) == {0, 1}  # both did a part
