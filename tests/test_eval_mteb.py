"""The wrapper, identity, resuming and the analyses. Nothing here may reach a network."""

import argparse
import copy
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from eval_packs import (
    embed_in_a_process,
    retrieval_configs,
    sentences,
    sts_rows,
    write_all_types,
    write_pack,
    write_sts,
)

import eval_mteb
from evaluation.encoder import Examples, Instructions, Noise
from evaluation.identity import folder_identity, load_for_mteb, locate
from evaluation.report import load_paper, read_run
from evaluation.run import result_cache, run, run_task
from saving_utils import VECTOR_CODE


mteb = pytest.importorskip("mteb")

SHARED = ROOT.parent / "shared" / "data" / "eval"


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture
def data_dir(tmp_path):
    """Two MTEB tasks and one of one's own."""
    folder = tmp_path / "data"
    write_sts(folder / "STS16", seed=1)
    write_pack(folder / "SciFact", retrieval_configs(2))
    write_sts(folder / "X-Mine", 3, {"name": "X-Mine", "type": "STS", "main_score": "spearman", "instruction": "Mine"})
    return folder


def options(checkpoint, data_dir, output, *more) -> argparse.Namespace:
    return eval_mteb.parse_args(
        ["--model", str(checkpoint), "--data_dir", str(data_dir), "--output", str(output), "--tasks", "all", *more]
    )


def load(checkpoint, data_dir, output, *more):
    """Tasks and encoder, as `main` makes them."""
    from evaluation.tasks import select_tasks

    args = options(checkpoint, data_dir, output, *more)
    tasks = select_tasks(args.tasks, args.data_dir)
    return tasks, eval_mteb.load_encoder(args, tasks)


class CountingBackend:
    """Counts the texts that reach the model; may fail before the n-th call."""

    def __init__(self, backend, fail_at=None, error=KeyboardInterrupt):
        self.backend, self.fail_at, self.error, self.calls, self.texts = backend, fail_at, error, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode(self, texts, *args):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise self.error("as if killed")
        self.texts += len(texts)
        return self.backend.encode(texts, *args)


def counting(encoder, **kwargs):
    return replace(encoder, backend=CountingBackend(encoder.backend, **kwargs), lengths=[])


def scores(output) -> dict[str, float]:
    scored = read_run(output)
    return {**scored.scores, **scored.other}


# ------------------------------------------------------------------------------------------------------------- protocol


def test_mtebs_own_mock_tasks_pass(checkpoint):
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
    from mteb.mocks.mock_run import get_compatible_mock_tasks, mock_run
    from mteb.models import EncoderProtocol

    encoder = load_for_mteb(str(checkpoint))
    encoder.instruction_for = Instructions({task.metadata.name: "Compare" for task in ALL_MOCK_TASK_TEST_GRID})
    assert isinstance(encoder, EncoderProtocol)
    results = mock_run(encoder)
    expected = {task.metadata.name for task in get_compatible_mock_tasks(encoder)}
    assert len(expected) >= 25
    failed = {name: results[name] for name in expected if not hasattr(results[name], "scores")}
    assert not failed


def test_all_seven_types_run_from_folders(checkpoint, tmp_path):
    main_scores = write_all_types(tmp_path / "data")
    tasks, encoder = load(checkpoint, tmp_path / "data", tmp_path / "out")
    assert {task.type for task in tasks} == set(load_paper()["categories"])
    assert run(tasks, [encoder], tmp_path / "out") == []

    scored = read_run(tmp_path / "out")
    assert scored.scores == {} and set(scored.other) == set(main_scores)
    for name, score in scored.other.items():
        record = scored.records[name]
        (entry,) = json.loads((tmp_path / "out" / record["result"]).read_text())["scores"]["test"]
        assert record["main_score"] == main_scores[name]
        assert score == pytest.approx(100 * entry[main_scores[name]]) and np.isfinite(score)
        assert record["texts"] > 0 and record["max_characters"] >= record["mean_characters"] > 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["means"] == {} and summary["other_mean"] == pytest.approx(np.mean(list(scored.other.values())))


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


@pytest.mark.parametrize("source", ["tiny", "shared"])
def test_scores_equal_those_of_a_plain_script(checkpoint, tiny_model, tmp_path, monkeypatch, source):
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
    tasks, encoder = load(checkpoint, tmp_path / "data", tmp_path / "out")
    run(tasks, [encoder], tmp_path / "out")

    instructions = json.loads((ROOT / "instructions.json").read_text())
    pair_texts = [row[key] for row in pairs for key in ("sentence1", "sentence2")]
    queries = [row["text"] for row in configs["queries"]["test"]]
    documents = [f"{row['title']} {row['text']}".strip() for row in configs["corpus"]["test"]]
    vectors = dict(
        zip([(None, text) for text in pair_texts], tiny_model.encode(pair_texts, instruction=instructions["STS16"]))
    )
    vectors |= dict(
        zip([("query", text) for text in queries], tiny_model.encode(queries, instruction=instructions["SciFact"]))
    )
    vectors |= dict(zip([("document", text) for text in documents], tiny_model.encode(documents)))
    for name in ("STS16", "SciFact"):
        task = copy.deepcopy(mteb.get_task(name, eval_splits=["test"]))
        task.metadata.dataset.update(path=str(tmp_path / "data" / name), revision="x")
        result = mteb.evaluate(Precomputed(vectors), task, cache=None, co2_tracker=False, show_progress_bar=False)
        plain = 100 * result[0].get_score()
        assert 0 < abs(plain) < 100
        assert scores(tmp_path / "out")[name] == pytest.approx(plain, abs=1e-4)  # mteb's files keep 6 decimals of 1
        assert encoder_score(encoder, task) == pytest.approx(plain / 100, abs=1e-6)


def encoder_score(encoder, task) -> float:
    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result[0].get_score()


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


def test_similarities_are_computed_in_fp32(checkpoint):
    encoder = load_for_mteb(str(checkpoint))
    a, b = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    expected = torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)
    similarities = encoder.similarity(a, b.float().numpy())
    assert similarities.dtype == torch.float32
    torch.testing.assert_close(similarities.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        encoder.similarity_pairwise(a, b[:5]).double(), expected[:, :5].diagonal(), atol=1e-6, rtol=0
    )


def test_vectors_are_fp32_whatever_the_models_dtype(checkpoint, data_dir, tmp_path):
    tasks, encoder = load(checkpoint, data_dir, tmp_path, "--dtype", "bf16")
    assert {parameter.dtype for parameter in encoder.backend.model.parameters()} == {torch.bfloat16}
    assert encoder.embed(["hi"], tasks[0].leaves()[0].metadata, None).dtype == np.float32


def test_vectors_that_are_not_finite_are_an_error(checkpoint, data_dir, tmp_path):
    tasks, encoder = load(checkpoint, data_dir, tmp_path)
    with torch.no_grad():
        encoder.backend.model.projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        encoder.embed(["hi"], tasks[0].leaves()[0].metadata, None)


def test_a_process_that_fails_does_not_leave_the_others_waiting(checkpoint, data_dir, tmp_path, monkeypatch):
    """It takes part in the exchange first, and the others learn there that its share is missing."""
    tasks, encoder = load(checkpoint, data_dir, tmp_path)
    met = []
    monkeypatch.setattr("evaluation.encoder.ranks", lambda: (0, 2))
    monkeypatch.setattr("evaluation.encoder.gather", lambda mine: met.append(mine) or mine)
    metadata = tasks[0].leaves()[0].metadata
    with pytest.raises(RuntimeError, match="Another process could not embed"):
        encoder.embed(["one", "two"], metadata, None)
    monkeypatch.setattr(encoder.backend, "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.embed(["three", "four"], metadata, None)
    assert [len(mine) for mine in met] == [1, 0]


# ------------------------------------------------------------------------------------------- what stands before a text


class Metadata:
    def __init__(self, name):
        self.name = name


def test_instructions_stand_before_queries_and_symmetric_texts():
    instructions = Instructions({"A": "Do A", "B": {"query": "Q", "document": "D"}, "C": ""})
    assert instructions(Metadata("A"), "query") == "Do A"
    assert instructions(Metadata("A"), "document") is None
    assert instructions(Metadata("A"), None) == "Do A"
    assert instructions(Metadata("B"), "query") == "Q" and instructions(Metadata("B"), "document") == "D"
    assert instructions(Metadata("C"), None) is None
    with pytest.raises(ValueError, match="No instruction for D in the table"):
        instructions(Metadata("D"), None)


def test_tasks_without_an_instruction_are_named_before_anything_runs(checkpoint, data_dir, tmp_path):
    file = tmp_path / "instructions.json"
    file.write_text('{"SciFact": "Find"}')
    write_sts(data_dir / "X-Bare", 4, {"name": "X-Bare", "type": "STS", "main_score": "spearman"})
    with pytest.raises(ValueError, match=rf"No instruction for STS16, X-Bare: add one to {file}"):
        load(checkpoint, data_dir, tmp_path / "out", "--instructions", str(file))
    assert not (tmp_path / "out").exists()


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


def test_print_prompts_shows_the_rows_that_the_model_reads(checkpoint, tiny_model, data_dir, tmp_path, capsys):
    eval_mteb.main([*cli(checkpoint, data_dir, None), "--print_prompts", "--tasks", "STS16", "SciFact"])
    printed = capsys.readouterr().out
    instructions = json.loads((ROOT / "instructions.json").read_text())
    processor = tiny_model.processor

    def decoder_row(text, instruction):
        return processor.tokenizer.decode(processor([text], instruction=instruction)["input_ids"][0])

    pair, configs = sts_rows(1)[0], retrieval_configs(2)
    document = configs["corpus"]["test"][0]
    for heading, row in {
        "STS16, text": decoder_row(pair["sentence1"], instructions["STS16"]),
        "SciFact, query": decoder_row(configs["queries"]["test"][0]["text"], instructions["SciFact"]),
        "SciFact, document": decoder_row(f"{document['title']} {document['text']}", None),
    }.items():
        assert f"{heading}, decoder reads:\n{row}\n" in printed
    assert "SciFact, document, encoder reads:\n[CLS]" in printed
    assert printed.count(instructions["SciFact"]) == 1
    assert printed.count("<|contextual|>") == 3


def cli(checkpoint, data_dir, output) -> list[str]:
    return ["--model", str(checkpoint), "--data_dir", str(data_dir)] + (["--output", str(output)] if output else [])


def test_examples_reach_the_head_of_queries_only(checkpoint, data_dir, tmp_path):
    icl = tmp_path / "icl"
    icl.mkdir()
    for name in ("STS16", "SciFact", "X-Mine"):
        (icl / f"{name}.json").write_text(json.dumps([{"query": f"example of {name}", "response": "yes"}]))
    tasks, encoder = load(checkpoint, data_dir, tmp_path / "out", "--icl", str(icl))
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
        load(checkpoint, data_dir, tmp_path / "out", "--icl", str(icl))


def test_examples_that_leave_no_room_for_text_are_left_out_and_counted(checkpoint, data_dir, tmp_path, capsys):
    tasks, encoder = load(checkpoint, data_dir, tmp_path / "out")
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


# ------------------------------------------------------------------------------------------------------------- noise


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


def test_noisy_scores_stand_beside_clean_ones(checkpoint, data_dir, tmp_path):
    output = tmp_path / "out"
    eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "all", "--noise"])
    scored = read_run(output)
    assert set(scored.noisy) == {"STS16", "SciFact", "X-Mine"}
    clean = {**scored.scores, **scored.other}
    assert all(scored.noisy[task] != clean[task] for task in clean)

    # what a noisy score is: the clean score of data that hold the noise themselves
    noise = Noise.read(ROOT / "evaluation" / "noise.txt", 0)
    rows = [
        {key: noise(value) if isinstance(value, str) else value for key, value in row.items()} for row in sts_rows(1)
    ]
    write_pack(tmp_path / "noisy" / "STS16", {"default": {"test": rows}})
    eval_mteb.main([*cli(checkpoint, tmp_path / "noisy", tmp_path / "out2"), "--tasks", "STS16"])
    assert scores(tmp_path / "out2")["STS16"] == pytest.approx(scored.noisy["STS16"], abs=1e-3)

    rows = json.loads((output / "summary.json").read_text())["noise"]
    assert [row["task"] for row in rows] == ["SciFact", "STS16", "X-Mine", "Mean over 3 tasks"]
    for row in rows[:-1]:
        assert row["drop"] == pytest.approx(clean[row["task"]] - scored.noisy[row["task"]])
    assert rows[-1]["drop"] == pytest.approx(np.mean([row["drop"] for row in rows[:-1]]))
    assert "With noise" in (output / "summary.md").read_text()


# --------------------------------------------------------------------------------------------------------- last token


def test_last_token_pooling_is_the_decoder_alone(checkpoint, data_dir, tmp_path):
    tasks, encoder = load(checkpoint, data_dir, tmp_path / "out", "--pooling", "last_token", "--batch_size", "4")
    backend, model = encoder.backend, encoder.backend.model
    texts = ["", "hi", *sentences(7, 0), "a long text " * 200]
    vectors = backend.encode(texts, "Find it", None, 4, None)
    assert vectors.shape == (10, model.config.hidden_size)

    tokenizer, limit = model.processor.tokenizer, model.config.max_seq_length
    prefix = tokenizer("Find it")["input_ids"]  # with BOS
    for text, vector in zip(texts, vectors):
        ids = [*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]][: limit - 1] + [tokenizer.eos_token_id]
        with torch.no_grad():
            state = model.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(state, dim=-1), atol=1e-5)
    assert "<|contextual|>" not in backend.describe("hi", "Find it", None)["decoder"]
    assert model.encoder is None and model.projector is None
    assert encoder.mteb_model_meta.embed_dim == model.config.hidden_size


def test_last_token_pooling_works_with_left_padding(checkpoint, data_dir, tmp_path):
    _, encoder = load(checkpoint, data_dir, tmp_path / "out", "--pooling", "last_token")
    texts = ["hi", *sentences(5, 0)]
    right = encoder.backend.encode(texts, None, None, 8, None)
    encoder.backend.model.processor.tokenizer.padding_side = "left"
    rows = encoder.backend.rows(texts, None, None)
    assert rows["attention_mask"][0, 0] == 0
    np.testing.assert_allclose(encoder.backend.encode(texts, None, None, 8, None), right, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ identity


def test_two_checkpoints_never_share_a_result(checkpoint, tiny_model, data_dir, tmp_path):
    other = tmp_path / "other" / "tiny"  # the same leaf name
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.decoder.norm.weight[::2] *= -3
    changed.save_pretrained(other)
    names = ["--tasks", "STS16"]
    eval_mteb.main([*cli(checkpoint, data_dir, tmp_path / "a"), *names])
    with pytest.raises(
        ValueError, match=r"holds results of another revision \(\w{40}, now \w{40}\). Use another --output"
    ):
        eval_mteb.main([*cli(other, data_dir, tmp_path / "a"), *names])
    eval_mteb.main([*cli(other, data_dir, tmp_path / "b"), *names])
    assert scores(tmp_path / "a") != scores(tmp_path / "b")

    # and in mteb's own store, were they to share it
    metas = [load_for_mteb(str(folder)).mteb_model_meta for folder in (checkpoint, other)]
    cache = result_cache(tmp_path / "shared")
    paths = {cache.get_task_result_path("STS16", meta) for meta in metas}
    assert len(paths) == 2 and metas[0].name == metas[1].name == "local/tiny"


def test_identity_is_of_weights_configuration_tokenizers_and_code(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    identity = folder_identity(folder, True)
    assert identity == folder_identity(checkpoint, True) and len(identity) == 40
    (folder / "README.md").write_text("changed")
    (folder / "results").mkdir()
    (folder / "results" / "x.json").write_text("{}")
    assert folder_identity(folder, True) == identity
    for name in ("config.json", "tokenizer.json", "encoder_tokenizer/tokenizer.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("{", "{ ", 1))
        assert folder_identity(folder, True) != identity, name
        (folder / name).write_text(text)
    assert folder_identity(folder, True) == identity

    code = tmp_path / "code"
    code.mkdir()
    for name in VECTOR_CODE:
        shutil.copy(ROOT / name, code)
    monkeypatch.setattr("evaluation.identity.ROOT", code)
    file = code / "modeling_causal2vec.py"
    text = file.read_text()
    file.write_text(text.replace('"""', '"""Another docstring. ', 1) + "\n# a comment\n")
    assert folder_identity(folder, True) == identity
    file.write_text(text + "\nx = 1\n")
    assert folder_identity(folder, True) != identity


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json nor modules.json"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "causal2vec"}')
    with pytest.raises(FileNotFoundError, match="no weights"):
        locate(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No folder"):
        locate("./nowhere")
    with pytest.raises(FileNotFoundError, match="No Python package"):
        locate("package:no_such_package")


def test_a_hub_id_is_identified_by_its_commit(monkeypatch, tmp_path):
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / ("c0ffee" * 6 + "0000")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "causal2vec"}')
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    location = locate("org/model", "main")
    assert asked == [("org/model", "config.json", "main")]
    assert (location.name, location.revision, location.commit) == ("org/model", snapshot.name, snapshot.name)
    assert location.is_causal2vec


def test_another_setting_needs_another_folder(checkpoint, data_dir, tmp_path):
    output = tmp_path / "out"
    eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "STS16"])
    for more, message in {
        ("--dtype", "bf16"): r"another dtype \(fp32, now bf16\)",
        ("--pooling", "last_token"): "another pooling",
        ("--max_length", "16"): "another max_length",
        ("--unnormalized",): "another normalized",
    }.items():
        with pytest.raises(ValueError, match=message):
            eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "STS16", *more])
    eval_mteb.main(["--output", str(output), "--export", str(tmp_path / "kept")])
    assert scores(tmp_path / "kept") == scores(output)
    assert not set(read_run(tmp_path / "kept").records["STS16"]) & set(
        json.loads((output / "settings.json").read_text())
    )
    with pytest.raises(ValueError, match="Use another --output"):
        eval_mteb.main([*cli(checkpoint, data_dir, tmp_path / "kept"), "--tasks", "STS16"])


def test_results_made_with_another_instruction_or_other_data_are_not_reused(checkpoint, data_dir, tmp_path, capsys):
    output, file = tmp_path / "out", tmp_path / "instructions.json"
    eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "STS16"])
    before = scores(output)
    file.write_text('{"STS16": "Something else"}')
    changed = [*cli(checkpoint, data_dir, output), "--tasks", "STS16", "--instructions", str(file)]
    with pytest.raises(SystemExit, match="1 of 1 tasks failed: STS16"):
        eval_mteb.main(changed)
    assert "records another instruction" in capsys.readouterr().err
    assert scores(output) == before
    eval_mteb.main([*changed, "--overwrite"])
    assert scores(output) != before

    before = scores(output)
    write_sts(data_dir / "STS16", seed=9)
    with pytest.raises(SystemExit, match="STS16"):
        eval_mteb.main(changed)
    assert "records another data" in capsys.readouterr().err
    eval_mteb.main([*changed, "--overwrite"])
    assert scores(output) != before


def test_model_meta_says_what_the_model_is(checkpoint, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text("---\ndatasets:\n- org/one\n- two\nlicense: apache-2.0\n---\n# Model\n")
    meta = load_for_mteb(str(folder)).mteb_model_meta
    assert meta.name == "local/model" and meta.revision == folder_identity(folder, True)
    assert meta.loader.func is load_for_mteb
    assert meta.embed_dim == 2 * tiny_model.config.hidden_size and meta.max_tokens == tiny_model.config.max_seq_length
    assert meta.n_parameters == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert meta.training_datasets == {"org/one", "two"} and meta.use_instructions
    assert load_for_mteb(str(checkpoint)).mteb_model_meta.training_datasets is None


# ------------------------------------------------------------------------------------------------------------ resuming


def test_an_interrupted_run_goes_on_where_it_was(checkpoint, data_dir, tmp_path):
    output = tmp_path / "out"
    tasks, encoder = load(checkpoint, data_dir, output)
    whole = counting(encoder)
    run(tasks, [whole], tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):  # every task calls twice
        run(tasks, [counting(encoder, fail_at=3)], output)
    assert set(scores(output)) == {tasks[0].name}
    assert not json.loads((output / "records" / f"{tasks[1].name}.json").read_text())["finished"]

    rest = counting(encoder)
    assert run(tasks, [rest], output) == []
    assert rest.backend.calls == whole.backend.calls - 2
    assert scores(output) == scores(tmp_path / "whole")

    nothing = counting(encoder)
    run(tasks, [nothing], output)
    assert nothing.backend.calls == 0


def test_a_finished_split_is_not_computed_again(checkpoint, tmp_path):
    task = {"name": "X-Two", "type": "STS", "main_score": "spearman", "instruction": "", "eval_splits": ["a", "b"]}
    write_pack(tmp_path / "data" / "X-Two", {"default": {"a": sts_rows(1), "b": sts_rows(2)}}, task)
    tasks, encoder = load(checkpoint, tmp_path / "data", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(tasks, [counting(encoder, fail_at=2)], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no finished results"):
        read_run(tmp_path / "out")
    rest = counting(encoder)
    run(tasks, [rest], tmp_path / "out")
    assert rest.backend.calls == 2
    run(tasks, [encoder], tmp_path / "whole")
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")


def test_scoring_again_can_be_interrupted_too(checkpoint, data_dir, tmp_path):
    """What was there before is not taken for the new result."""
    output = tmp_path / "out"
    tasks, encoder = load(checkpoint, data_dir, output, "--tasks", "STS16")
    run(tasks, [encoder], output)
    before = scores(output)
    changed = replace(encoder, instruction_for=Instructions({"STS16": "Another"}), lengths=[])
    with pytest.raises(KeyboardInterrupt):
        run(tasks, [counting(changed, fail_at=1)], output, overwrite=True)
    assert run(tasks, [changed], output) == []
    assert scores(output) != before
    run(tasks, [changed], tmp_path / "whole")
    assert scores(output) == scores(tmp_path / "whole")


def test_parts_of_an_aggregate_are_not_reused_under_another_instruction(checkpoint, tmp_path, capsys):
    from evaluation.tasks import select_tasks

    (whole,) = select_tasks(["CQADupstackRetrieval"])
    for seed, part in enumerate(whole.leaves()):
        write_pack(tmp_path / "data" / part.metadata.name, retrieval_configs(seed))
    output = tmp_path / "out"
    tasks, encoder = load(checkpoint, tmp_path / "data", output)
    with pytest.raises(KeyboardInterrupt):  # in the third part
        run(tasks, [counting(encoder, fail_at=5)], output)
    changed = replace(
        encoder, instruction_for=Instructions({name: "Another" for name in encoder.instruction_for.table})
    )
    assert run(tasks, [changed], output) == ["CQADupstackRetrieval"]
    assert "records another instruction" in capsys.readouterr().err
    rest = counting(encoder)
    assert run(tasks, [rest], output) == []
    assert rest.backend.calls == 2 * (12 - 2)
    parts = [
        json.loads(next((output / "results").rglob(f"{part.metadata.name}.json")).read_text())
        for part in whole.leaves()
    ]
    main_scores = [100 * part["scores"]["test"][0]["main_score"] for part in parts]
    assert scores(output) == {"CQADupstackRetrieval": pytest.approx(np.mean(main_scores), abs=1e-4)}
    assert max(main_scores) > 0


def test_a_half_written_result_never_appears(checkpoint, data_dir, tmp_path, monkeypatch):
    from mteb.results import TaskResult

    def write_half(self, path):
        path.write_text('{"dataset_revision": "x", "sc')
        raise KeyboardInterrupt

    output = tmp_path / "out"
    tasks, encoder = load(checkpoint, data_dir, output)
    with monkeypatch.context() as patch:
        patch.setattr(TaskResult, "to_disk", write_half)
        with pytest.raises(KeyboardInterrupt):
            run(tasks, [encoder], output)
    assert not list(output.rglob("SciFact.json"))[1:]  # the record, which says that it is not finished
    assert run(tasks, [encoder], output) == []
    assert set(scores(output)) == {"SciFact", "STS16", "X-Mine"}
    assert not [path for path in output.rglob("*") if "incomplete" in path.name]


def test_a_task_that_fails_does_not_stop_the_others(checkpoint, data_dir, tmp_path, capsys):
    output = tmp_path / "out"
    tasks, encoder = load(checkpoint, data_dir, output)
    failing = counting(encoder, fail_at=0, error=RuntimeError)
    assert run(tasks, [failing], output) == [tasks[0].name]
    assert "as if killed" in capsys.readouterr().err
    assert set(scores(output)) == {task.name for task in tasks[1:]}
    assert run(tasks, [encoder], output) == []


def test_vectors_can_be_kept_on_disk(checkpoint, data_dir, tmp_path, monkeypatch):
    tasks, encoder = load(checkpoint, data_dir, tmp_path / "out", "--cache_dir", str(tmp_path / "vectors"))
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


def test_texts_that_are_cut_are_counted(checkpoint, data_dir, tmp_path, monkeypatch):
    output = tmp_path / "out"
    tasks, encoder = load(checkpoint, data_dir, output, "--max_length", "100", "--cache_dir", str(tmp_path / "vectors"))
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


def test_no_texts_give_no_vectors(checkpoint, data_dir, tmp_path):
    tasks, encoder = load(checkpoint, data_dir, tmp_path / "out")
    vectors = encoder.embed([], tasks[0].leaves()[0].metadata, "document")
    assert vectors.shape == (0, encoder.backend.dim)


def test_outputs_hold_no_paths_and_mteb_reads_them(checkpoint, data_dir, tmp_path):
    output = tmp_path / "out"
    eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "all", "--noise"])
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        for private in (str(tmp_path), str(checkpoint.parent), str(Path.home())):
            assert private not in path.read_text(), path
    results = mteb.ResultCache(output).load_results(require_model_meta=False)
    assert {result.task_name for model in results for result in model} >= {"STS16", "SciFact"}
    record = json.loads((output / "records" / "SciFact.json").read_text())
    for key in ("revision", "dtype", "commit", "mteb", "torch", "transformers", "batch_size", "seconds", "data"):
        assert record[key], key
    assert record["instruction"] == {
        "query": json.loads((ROOT / "instructions.json").read_text())["SciFact"],
        "document": None,
    }


# --------------------------------------------------------------------------------------------- sentence-transformers


@pytest.fixture(scope="module")
def sentence_transformer(backbone_dir, tmp_path_factory):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    transformer = Transformer(backbone_dir("bert"))
    transformer.max_seq_length = 32
    model = SentenceTransformer(
        modules=[transformer, Pooling(24), Normalize()], prompts={"query": "query: ", "document": "doc: "}, device="cpu"
    )
    folder = tmp_path_factory.mktemp("st") / "plain"
    model.save(str(folder))
    return folder


def test_any_sentence_transformers_model_can_be_scored(sentence_transformer, data_dir, tmp_path):
    from sentence_transformers import SentenceTransformer

    tasks, encoder = load(sentence_transformer, data_dir, tmp_path / "out", "--name", "org/plain")
    assert run(tasks, [encoder], tmp_path / "out") == []
    assert set(scores(tmp_path / "out")) == {"STS16", "SciFact", "X-Mine"}
    assert read_run(tmp_path / "out").name == "org/plain"

    model = SentenceTransformer(str(sentence_transformer), device="cpu")
    metadata = next(task for task in tasks if task.name == "SciFact").leaves()[0].metadata
    for side, prompt in {"query": "query: ", "document": "doc: ", None: None}.items():
        np.testing.assert_allclose(
            encoder.embed(["some text"], metadata, side), model.encode(["some text"], prompt=prompt), atol=1e-6
        )
    assert encoder.backend.describe("some text", *encoder.prompt(metadata, "query")) == {"text": "query: some text"}
    encoder.backend.model.default_prompt_name = "document"
    assert encoder.prompt(metadata, None)[0] == "doc: "  # as sentence-transformers puts it before them


def test_options_of_ours_do_not_fit_other_models(sentence_transformer, data_dir, tmp_path):
    with pytest.raises(ValueError, match="--pooling last_token, --max_length: only for Causal2Vec checkpoints"):
        load(sentence_transformer, data_dir, tmp_path, "--pooling", "last_token", "--max_length", "9")


def test_a_model_inside_a_python_package_is_found(sentence_transformer, tmp_path, monkeypatch):
    package = tmp_path / "packaged_model"
    shutil.copytree(sentence_transformer, package / "model")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    location = locate("package:packaged_model", name="org/packaged")
    assert location.name == "org/packaged" and not location.is_causal2vec
    assert location.revision == folder_identity(sentence_transformer, False)


# ------------------------------------------------------------------------------------------------------------ analyses


def test_lengths_and_norms_are_what_they_say(checkpoint, tiny_model, data_dir, tmp_path):
    icl, output = tmp_path / "icl", tmp_path / "out"
    icl.mkdir()
    for name in ("STS16", "SciFact", "X-Mine"):
        (icl / f"{name}.json").write_text(json.dumps([{"query": "example", "response": "yes"}] * 2))
    eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "STS16", "SciFact", "--analyze", "--icl", str(icl)])
    lengths = json.loads((output / "lengths.json").read_text())
    norms = json.loads((output / "norms.json").read_text())
    instruction = json.loads((ROOT / "instructions.json").read_text())["SciFact"]
    queries = [row["text"] for row in retrieval_configs(2)["queries"]["test"]]
    examples = json.loads((icl / "SciFact.json").read_text())
    rows = tiny_model.processor(queries, instruction=instruction)["attention_mask"]
    longer = tiny_model.processor(queries, instruction=instruction, examples=examples)["attention_mask"]
    assert lengths["SciFact"]["without_examples"] == pytest.approx(rows.sum(1).float().mean().item())
    assert lengths["SciFact"]["with_examples"] == pytest.approx(longer.sum(1).float().mean().item())
    assert lengths["SciFact"]["with_examples"] > lengths["SciFact"]["without_examples"] + 10
    vectors = tiny_model.encode(queries, instruction=instruction, normalize_embeddings=False)
    contextual, eos = tiny_model.split_states(vectors)
    assert norms["SciFact"]["contextual"] == pytest.approx(np.linalg.norm(contextual, axis=1).mean(), rel=1e-5)
    assert norms["SciFact"]["eos"] == pytest.approx(np.linalg.norm(eos, axis=1).mean(), rel=1e-5)
    for name in ("lengths.png", "norms.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    settings = json.loads((output / "settings.json").read_text())
    assert settings["revision"] == folder_identity(checkpoint, True)
    with pytest.raises(ValueError, match="holds results of another dtype"):
        eval_mteb.main([*cli(checkpoint, data_dir, output), "--tasks", "STS16", "--analyze", "--dtype", "bf16"])


# ------------------------------------------------------------------------------------------------------ several processes


def test_processes_share_the_texts_and_all_get_all_vectors(tmp_path):
    torch.multiprocessing.spawn(
        embed_in_a_process, args=(str(tmp_path / "rendezvous"), str(tmp_path / "vectors")), nprocs=2
    )
    first, second = (np.load(tmp_path / f"vectors.{rank}.npy") for rank in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[:, 0], range(9))
    assert set(first[:, 1]) == {0, 1}  # both did a part


def test_only_the_first_process_writes(tmp_path, checkpoint, data_dir):
    from mteb.results import TaskResult

    tasks, encoder = load(checkpoint, data_dir, tmp_path / "out")
    entry = {"test": {"default": {"main_score": 0.5}}}
    result = TaskResult.from_task_results(tasks[0].task, entry, evaluation_time=1)
    for writes in (False, True):
        cache = result_cache(tmp_path / "cache", writes=writes)
        cache.save_to_cache(result, encoder.mteb_model_meta)
        assert cache.get_task_result_path(tasks[0].name, encoder.mteb_model_meta).exists() == writes


# ------------------------------------------------------------------------------------------------------- command line


def test_every_argument_has_help(capsys):
    with pytest.raises(SystemExit):
        eval_mteb.parse_args(["--help"])
    shown = capsys.readouterr().out
    names = set(vars(eval_mteb.parse_args(["--compare", "a", "b", "--output", "c"])))
    assert len(names) > 20
    for name in names:
        _, _, after = shown.partition(f"  --{name} ")
        assert len(after.split("\n  --")[0].split()) > 5, name


@pytest.mark.parametrize(
    "argv, missing",
    [
        ([], "--model, --tasks, --output"),
        (["--compare", "a"], "--output"),
        (["--prefetch", "d"], "--tasks"),
        (["--print_prompts", "--model", "m"], "--tasks"),
    ],
)
def test_missing_arguments_are_named(argv, missing, capsys):
    with pytest.raises(SystemExit):
        eval_mteb.parse_args(argv)
    assert f"needs {missing}\n" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--print_prompts"], ["--analyze", "--output", "o"]])
def test_noise_is_only_for_scores(flags, capsys):
    with pytest.raises(SystemExit):
        eval_mteb.parse_args(["--model", "m", "--tasks", "STS16", "--noise", *flags])
    assert "--noise only changes what is scored" in capsys.readouterr().err


def test_a_data_folder_switches_the_network_off(checkpoint, data_dir, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    eval_mteb.main([*cli(checkpoint, data_dir, None), "--print_prompts", "--tasks", "STS16"])
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_help_needs_nothing_heavy():
    """The modules that are slow to import are imported when they are needed."""
    import ast

    files = [ROOT / "eval_mteb.py", ROOT / "saving_utils.py", *(ROOT / "evaluation").glob("*.py")]
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.name != "tasks.py" else ():
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            )
            for module in modules:
                assert module.partition(".")[0] in {*sys.stdlib_module_names, "evaluation", "saving_utils"}, (
                    file,
                    module,
                )
                assert module != "evaluation.tasks", file
