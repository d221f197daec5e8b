"""sentence_causal2vec.py: sentence-transformers gives the vectors of `Causal2VecModel.encode` and keeps the folder whole."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, incomplete


sentence_transformers = pytest.importorskip("sentence_transformers")
from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402

from loading_utils import position_limit  # noqa: E402
from saving_utils import SHIPPED_CODE  # noqa: E402


INSTRUCTION = "Given a question, retrieve passages that answer it"


@pytest.fixture(scope="module")
def model(saved_dir):
    return load(saved_dir)


def load(folder, **options) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


def close(first, second) -> bool:
    assert np.shape(first) == np.shape(second)
    return np.abs(np.asarray(first) - np.asarray(second)).max() < 1e-6


def test_remote_code_needs_to_be_trusted(saved_dir):
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        SentenceTransformer(str(saved_dir), device="cpu")


def test_default_vectors_are_encodes(model, tiny_model):
    vectors = model.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert close(vectors, tiny_model.encode(TEXTS))
    assert close(model.encode(TEXTS[0]), tiny_model.encode(TEXTS[0]))
    assert close(model.encode(TEXTS, batch_size=2), vectors)
    assert close(model.encode(TEXTS, convert_to_tensor=True), vectors)


def test_prompts_are_instructions(model, tiny_model):
    with_instruction = tiny_model.encode(TEXTS, instruction=INSTRUCTION)
    assert np.abs(with_instruction - tiny_model.encode(TEXTS)).max() > 1e-3
    assert model.prompts == {"query": INSTRUCTION, "document": ""}
    assert close(model.encode(TEXTS, prompt=INSTRUCTION), with_instruction)
    assert close(model.encode(TEXTS, prompt_name="query"), with_instruction)
    assert close(model.encode_query(TEXTS), tiny_model.encode_query(TEXTS))
    assert close(model.encode_query(TEXTS), with_instruction)
    assert close(model.encode_document(TEXTS), tiny_model.encode_document(TEXTS))
    with pytest.raises(ValueError, match="nonsense"):
        model.encode(TEXTS, prompt_name="nonsense")


def test_examples_reach_the_prefix(model, tiny_model):
    examples = [{"query": "what is it", "response": "a thing"}]
    expected = tiny_model.encode(TEXTS, instruction=INSTRUCTION, examples=examples)
    assert close(model.encode(TEXTS, prompt=INSTRUCTION, examples=examples), expected)
    assert np.abs(expected - tiny_model.encode(TEXTS, instruction=INSTRUCTION)).max() > 1e-3


@pytest.mark.parametrize("dim", [2, 7, 64])
def test_truncation_cuts_both_states(model, tiny_model, dim):
    expected = tiny_model.encode(TEXTS, truncate_dim=dim)
    assert close(model.encode(TEXTS, truncate_dim=dim, normalize_embeddings=True), expected)
    assert close(model.encode(TEXTS, truncate_dim=dim), tiny_model.encode(TEXTS)[:, :dim])  # as it cuts all models
    with model.truncate_embeddings(dim):
        assert model.get_embedding_dimension() == dim
        assert close(model.encode(TEXTS, normalize_embeddings=True), expected)


def test_texts_that_are_cut_are_counted_and_told_once(saved_dir, caplog):
    model = load(saved_dir)
    texts = ["hi", "word " * 30, "word " * 600]
    model.encode(texts[:1])
    assert not model[0].truncated and not caplog.records
    for _ in range(2):
        model.encode(texts, batch_size=1)
    assert model[0].truncated == {"texts": 4, "decoder": 2, "encoder": 4}
    (record,) = [record for record in caplog.records if "512" in record.getMessage()]
    assert record.levelname == "WARNING"


def test_the_fast_path_is_used(model):
    cache = model[0].model.prefix_cache
    cache.clear()
    model.encode(TEXTS, prompt=INSTRUCTION, batch_size=2)
    assert (cache.misses, cache.hits) == (1, 2)  # three batches, one prefix
    cache.clear()


def test_odd_inputs(model, tiny_model):
    assert len(model.encode([])) == 0
    odd = ["", "   ", "\ud800", "</s><|contextual|>", "\x00", "word " * 2000]
    vectors = model.encode(odd)
    assert np.isfinite(vectors).all() and close(vectors, tiny_model.encode(odd))
    with pytest.raises(TypeError, match="position 1"):
        model.encode(["a", None])


def test_similarity_and_dimensions(model):
    vectors = model.encode(TEXTS)
    assert model.similarity_fn_name == "cosine"
    assert close(model.similarity(vectors, vectors), vectors @ vectors.T)
    assert model.get_embedding_dimension() == vectors.shape[1] == 64
    assert model.max_seq_length == model[0].model.config.max_seq_length
    assert model.tokenizer.eos_token == "</s>"


def test_max_seq_length_is_the_models(saved_dir, tiny_model, tmp_path):
    model = load(saved_dir)
    model.max_seq_length = 12
    shortened = model.encode(TEXTS)
    assert close(shortened, tiny_model.encode(TEXTS, max_length=12))
    assert np.abs(shortened - tiny_model.encode(TEXTS)).max() > 1e-3
    model.save(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["max_seq_length"] == 12
    for wrong in (0, position_limit(tiny_model.decoder) + 1):  # a folder saved with the latter would not load
        with pytest.raises(ValueError, match="max_seq_length"):
            model.max_seq_length = wrong


def test_multi_process_pool(model):
    pool = model.start_multi_process_pool(target_devices=["cpu"])  # one worker: each imports everything anew
    try:
        vectors = model.encode(TEXTS, pool=pool, prompt_name="query", truncate_dim=32, chunk_size=4)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.abs(vectors - model.encode(TEXTS, prompt_name="query", truncate_dim=32)).max() < 1e-6


def test_token_embeddings_are_not_promised(model):
    with pytest.raises(KeyError):
        model.encode(TEXTS, output_value="token_embeddings")
    features = model.encode(TEXTS[:2], output_value=None)
    assert [set(row) >= {"sentence_embedding", "input_ids", "encoder_ids"} for row in features] == [True, True]


def test_other_backends_and_settings_are_refused(saved_dir):
    with pytest.raises(ValueError, match="`backend`"):
        load(saved_dir, backend="onnx")
    with pytest.raises(ValueError, match="processor_kwargs"):
        load(saved_dir, processor_kwargs={"padding_side": "left"})


def test_dtype_reaches_the_model(saved_dir, tiny_model):
    model = load(saved_dir, model_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    vectors = model.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert 0 < np.abs(vectors - tiny_model.encode(TEXTS)).max() < 0.1


def test_save_leaves_a_complete_folder(model, tiny_model, tmp_path):
    model.prompts["code"] = "Find code"
    try:
        model.save(str(tmp_path / "first"))
    finally:
        del model.prompts["code"]
    again = load(tmp_path / "first")
    assert again.prompts["code"] == "Find code"
    again.save(str(tmp_path / "first"))  # over itself
    again.save(str(tmp_path / "second"))
    shutil.rmtree(tmp_path / "first")
    assert incomplete(tmp_path / "second") == []
    for name in (*SHIPPED_CODE, "modules.json", "README.md"):
        assert (tmp_path / "second" / name).is_file(), name
    third = load(tmp_path / "second")
    assert third.prompts["code"] == "Find code"
    assert close(third.encode(TEXTS), tiny_model.encode(TEXTS))

    from transformers import AutoModel

    plain = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert close(plain.encode_query(TEXTS), tiny_model.encode_query(TEXTS))


def test_unnormalised_vectors_by_a_setting(saved_dir, tiny_model, tmp_path):
    folder = shutil.copytree(saved_dir, tmp_path / "model")
    (folder / "sentence_causal2vec_config.json").write_text('{"normalize": false}')
    model = load(folder)
    expected = tiny_model.encode(TEXTS, normalize_embeddings=False)
    assert not np.allclose(np.linalg.norm(expected, axis=1), 1)
    assert np.abs(model.encode(TEXTS) - expected).max() < 1e-5  # not of length 1
    expected = tiny_model.encode(TEXTS, normalize_embeddings=False, truncate_dim=16)
    assert np.abs(model.encode(TEXTS, truncate_dim=16) - expected).max() < 1e-5


@pytest.mark.parametrize("matryoshka", [False, True])
def test_its_trainer_fine_tunes_every_part(saved_dir, tmp_path, matryoshka):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = load(saved_dir)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = losses.MultipleNegativesRankingLoss(model)
    if matryoshka:
        loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=[64, 16])
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            prompts={"anchor": INSTRUCTION},
        ),
        train_dataset=Dataset.from_dict(
            {"anchor": [f"question {i}" for i in range(8)], "positive": [f"answer {i}" for i in range(8)]}
        ),
        loss=loss,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    features, _ = trainer.collect_features(inputs)
    assert len(features) == 2  # anchor and positive: no feature was taken for another sentence
    trainer.train()
    for part in ("encoder", "projector", "decoder"):
        changed = [not torch.equal(p.detach(), before[n]) for n, p in model.named_parameters() if f".{part}." in n]
        assert changed and any(changed), part
    checkpoint = str(Path(tmp_path, "run", "checkpoint-2"))
    reloaded = load(checkpoint)
    assert close(reloaded.encode(TEXTS), model.encode(TEXTS))


MATRYOSHKA = {
    "plain": lambda model: losses.MultipleNegativesRankingLoss(model),
    "symmetric": lambda model: losses.MultipleNegativesSymmetricRankingLoss(model),
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
}


@pytest.mark.filterwarnings("ignore:The MultipleNegativesSymmetricRankingLoss")  # newer versions have another name
@pytest.mark.parametrize("kind", MATRYOSHKA)
def test_what_matryoshka_trains_is_what_truncation_keeps(model, tiny_model, kind, monkeypatch):
    """The vectors that the wrapped loss compares at each size are the ones that `encode(truncate_dim=size)` gives."""
    from sentence_transformers.util import normalize_embeddings

    inner = MATRYOSHKA[kind](model)
    compared = []

    def spy(similarity):
        def compare(first, second, *args, **kwargs):
            compared.append((first.detach(), second.detach()))
            return similarity(first, second, *args, **kwargs)

        return compare

    monkeypatch.setattr(inner, "similarity_fct", spy(inner.similarity_fct))
    loss = losses.MatryoshkaLoss(model, inner, matryoshka_dims=[64, 16, 7])
    features = [model.preprocess(TEXTS[:3]), model.preprocess(TEXTS[3:])]
    loss(features, None).backward()
    assert {first.shape[-1] for first, _ in compared} == {64, 16, 7}
    for dim in (64, 16, 7):
        expected = torch.from_numpy(tiny_model.encode(TEXTS, truncate_dim=dim))
        for pair in compared:
            for side in pair:
                if side.shape[-1] == dim:
                    nearest = (normalize_embeddings(side) @ expected.T).max(dim=1).values
                    assert torch.allclose(nearest, torch.ones(len(side)), atol=1e-5)
    with pytest.raises(ValueError, match="embedding dimension of 64"):
        losses.MatryoshkaLoss(model, inner, matryoshka_dims=[65])(features, None)
