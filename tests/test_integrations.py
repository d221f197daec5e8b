"""The libraries that people search with, the real packages: each gives the vectors of `encode`, on texts and queries.

Skipped only where a package is not installed: pip install -e ".[integrations]".
"""

import asyncio
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, TEXTS


pytest.importorskip("sentence_transformers")

INSTRUCTION = "Given a question, retrieve passages that answer it"
QUESTION = "How much protein should a female eat?"


@pytest.fixture(scope="module")
def documents(tiny_model) -> np.ndarray:
    return tiny_model.encode_document(TEXTS)


@pytest.fixture(scope="module")
def query(tiny_model) -> np.ndarray:
    """One vector, with the stored instruction; not what the bare text would give."""
    vector = tiny_model.encode_query(QUESTION)
    assert np.abs(vector - tiny_model.encode(QUESTION)).max() > 1e-3
    return vector


@pytest.fixture(scope="module")
def best(documents, query) -> list[int]:
    return np.argsort(-(documents @ query), kind="stable").tolist()


def close(first, second) -> bool:
    return np.abs(np.asarray(first) - second).max() < 1e-6


@pytest.fixture
def langchain_embeddings(tiny_model):
    """As docs/integrations.md has it."""
    embeddings = pytest.importorskip("langchain_core.embeddings")
    (code,) = re.findall(
        r"^class \w+\(Embeddings\):\n(?: .*\n|\n)+", (ROOT / "docs" / "integrations.md").read_text(), re.M
    )
    names = {"Embeddings": embeddings.Embeddings}
    exec(compile(code, "integrations.md", "exec"), names)
    return names["Causal2VecEmbeddings"](tiny_model)


def test_langchain(langchain_embeddings, documents, query, best):
    from langchain_core.vectorstores import InMemoryVectorStore

    assert close(langchain_embeddings.embed_documents(TEXTS), documents)
    assert close(langchain_embeddings.embed_query(QUESTION), query)
    assert close(asyncio.run(langchain_embeddings.aembed_query(QUESTION)), query)
    store = InMemoryVectorStore(langchain_embeddings)
    store.add_texts(TEXTS)
    found = store.similarity_search(QUESTION, k=3)
    assert [document.page_content for document in found] == [TEXTS[i] for i in best[:3]]


def test_llama_index(saved_dir, documents, query, tmp_path):
    """It replaces the stored prompts by its own arguments, so the instruction is passed."""
    module = pytest.importorskip("llama_index.embeddings.huggingface")
    embedding = module.HuggingFaceEmbedding(
        model_name=str(saved_dir),
        trust_remote_code=True,
        query_instruction=INSTRUCTION,
        device="cpu",
        cache_folder=str(tmp_path),
    )
    assert close(embedding.get_text_embedding_batch(TEXTS), documents)
    assert close(embedding.get_query_embedding(QUESTION), query)


def test_haystack(saved_dir, documents, query, best, monkeypatch):
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    from haystack import Document
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore
    from haystack.utils import ComponentDevice

    common = {
        "model": str(saved_dir),
        "trust_remote_code": True,
        "device": ComponentDevice.from_str("cpu"),
        "progress_bar": False,
    }
    for_documents = embedders.SentenceTransformersDocumentEmbedder(**common)
    for_queries = embedders.SentenceTransformersTextEmbedder(**common, encode_kwargs={"prompt_name": "query"})
    for_documents.warm_up()
    for_queries.warm_up()
    embedded = for_documents.run([Document(id=str(i), content=text) for i, text in enumerate(TEXTS)])["documents"]
    assert close([document.embedding for document in embedded], documents)
    vector = for_queries.run(QUESTION)["embedding"]
    assert close(vector, query)

    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    store.write_documents(embedded)
    found = InMemoryEmbeddingRetriever(store, top_k=3).run(query_embedding=vector)["documents"]
    assert [document.id for document in found] == [str(i) for i in best[:3]]


def test_faiss(documents, query, best, tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(documents.shape[1])  # a dot product of unit vectors is the cosine
    index.add(documents)
    faiss.write_index(index, str(tmp_path / "index"))
    scores, ids = faiss.read_index(str(tmp_path / "index")).search(query[None], 3)
    assert ids[0].tolist() == best[:3]
    assert close(scores[0], (documents @ query)[best[:3]])


def test_lancedb(documents, query, best, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    rows = [{"id": i, "text": text, "vector": vector} for i, (text, vector) in enumerate(zip(TEXTS, documents))]
    lancedb.connect(tmp_path / "db").create_table("passages", rows)
    table = lancedb.connect(tmp_path / "db").open_table("passages")  # from disk
    found = table.search(query).distance_type("cosine").limit(3).to_list()
    assert [row["id"] for row in found] == best[:3]
    assert [row["text"] for row in found] == [TEXTS[i] for i in best[:3]]
    assert np.abs(1 - np.array([row["_distance"] for row in found]) - (documents @ query)[best[:3]]).max() < 1e-5


@pytest.fixture
def mteb(monkeypatch):
    """With its registry as it was, after the test."""
    mteb = pytest.importorskip("mteb")
    from mteb.models import get_model_meta, model_implementations

    registry = dict(model_implementations.MODEL_REGISTRY)
    monkeypatch.setattr(model_implementations, "MODEL_REGISTRY", registry)
    monkeypatch.setattr(get_model_meta, "MODEL_REGISTRY", registry)
    return mteb


def test_mteb_gets_a_registered_model(mteb, saved_dir, tiny_model, tmp_path):
    """By name, with our loader; mteb scores it as the model that it is."""
    from evaluation.identity import register

    name = register(str(saved_dir), name="tester/tiny")
    assert name == "tester/tiny"
    meta = mteb.get_model_meta(name)
    assert meta.embed_dim == 2 * tiny_model.config.hidden_size and len(meta.revision) == 40
    assert meta.n_parameters == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert str(saved_dir) not in str(meta.to_dict())

    model = mteb.get_model(name)
    assert model.mteb_model_meta.name == name and model.mteb_model_meta.revision == meta.revision
    from mteb.mocks.mock_tasks import MockSTSTask

    from evaluation.encoder import Instructions

    model.instruction_for = Instructions({"MockSTSTask": INSTRUCTION})
    result = mteb.evaluate(model, MockSTSTask(), cache=None, co2_tracker=False, show_progress_bar=False)
    assert result.model_name == name and result.model_revision == meta.revision


@pytest.mark.parametrize("baseline", ["last_token", "embedding_concat", "token_prepending"])
def test_mteb_gets_a_baseline(mteb, make_model, tmp_path, baseline):
    from evaluation.identity import register

    model = make_model(baseline=baseline)
    model.save_pretrained(tmp_path / "baseline")
    name = register(str(tmp_path / "baseline"))
    assert mteb.get_model_meta(name).embed_dim == model.config.embedding_size
    assert abs(mteb.get_model(name).backend.model.encode(["a text"]) - model.eval().encode(["a text"])).max() < 1e-5


def test_mteb_is_told_what_cannot_be_registered(mteb, saved_dir, backbone_dir, tmp_path):
    from evaluation.identity import register

    with pytest.raises(ValueError, match="not a Causal2Vec checkpoint"):
        register(backbone_dir("bert"))
    folder = shutil.copytree(saved_dir, tmp_path / "model")
    name = register(str(folder))
    assert name == "local/model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "query_instruction": "another"}))
    with pytest.raises(ValueError, match="has changed"):
        mteb.get_model(name)
