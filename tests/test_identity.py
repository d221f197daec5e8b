"""evaluation/identity.py: which model it is, and that no two are taken for one."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from eval_packs import cli, load, scores, sentences

import eval_mteb
from evaluation.identity import folder_identity, load_for_mteb, locate
from evaluation.report import read_run
from evaluation.run import result_cache, run
from saving_utils import VECTOR_CODE


mteb = pytest.importorskip("mteb")


pytestmark = pytest.mark.usefixtures("offline")


def test_two_checkpoints_never_share_a_result(saved_dir, tiny_model, data_dir, tmp_path):
    other = tmp_path / "other" / "model"  # the same leaf name
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.decoder.norm.weight[::2] *= -3
    changed.save_pretrained(other)
    names = ["--tasks", "STS16"]
    eval_mteb.main([*cli(saved_dir, data_dir, tmp_path / "a"), *names])
    with pytest.raises(ValueError, match=r"another revision \(\w{40}, now \w{40}\)"):
        eval_mteb.main([*cli(other, data_dir, tmp_path / "a"), *names])
    eval_mteb.main([*cli(other, data_dir, tmp_path / "b"), *names])
    assert scores(tmp_path / "a") != scores(tmp_path / "b")

    # and in mteb's own store, were they to share it
    metas = [load_for_mteb(str(folder)).mteb_model_meta for folder in (saved_dir, other)]
    cache = result_cache(tmp_path / "shared")
    paths = {cache.get_task_result_path("STS16", meta) for meta in metas}
    assert len(paths) == 2 and metas[0].name == metas[1].name == "local/model"


def test_identity_is_of_weights_configuration_tokenizers_and_code(saved_dir, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(saved_dir, folder)
    identity = folder_identity(folder, True)
    assert identity == folder_identity(saved_dir, True) and len(identity) == 40
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
    with pytest.raises(FileNotFoundError, match="config.json.*modules.json"):
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


def test_model_meta_says_what_the_model_is(saved_dir, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved_dir, folder)
    (folder / "README.md").write_text("---\ndatasets:\n- org/one\n- two\nlicense: apache-2.0\n---\n# Model\n")
    meta = load_for_mteb(str(folder)).mteb_model_meta
    assert meta.name == "local/model" and meta.revision == folder_identity(folder, True)
    assert meta.loader.func is load_for_mteb
    assert meta.embed_dim == 2 * tiny_model.config.hidden_size and meta.max_tokens == tiny_model.config.max_seq_length
    assert meta.n_parameters == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert meta.training_datasets == {"org/one", "two"} and meta.use_instructions
    assert load_for_mteb(str(saved_dir)).mteb_model_meta.training_datasets is None


def test_last_token_pooling_is_the_decoder_alone(saved_dir, data_dir, tmp_path):
    tasks, encoder = load(saved_dir, data_dir, tmp_path / "out", "--pooling", "last_token", "--batch_size", "4")
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


def test_last_token_pooling_works_with_left_padding(saved_dir, data_dir, tmp_path):
    _, encoder = load(saved_dir, data_dir, tmp_path / "out", "--pooling", "last_token")
    texts = ["hi", *sentences(5, 0)]
    right = encoder.backend.encode(texts, None, None, 8, None)
    encoder.backend.model.processor.tokenizer.padding_side = "left"
    rows = encoder.backend.rows(texts, None, None)
    assert rows["attention_mask"][0, 0] == 0
    np.testing.assert_allclose(encoder.backend.encode(texts, None, None, 8, None), right, atol=1e-5)


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
    with pytest.raises(ValueError, match="--pooling last_token, --max_length"):
        load(sentence_transformer, data_dir, tmp_path, "--pooling", "last_token", "--max_length", "9")


def test_a_model_inside_a_python_package_is_found(sentence_transformer, tmp_path, monkeypatch):
    package = tmp_path / "packaged_model"
    shutil.copytree(sentence_transformer, package / "model")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    location = locate("package:packaged_model", name="org/packaged")
    assert location.name == "org/packaged" and not location.is_causal2vec
    assert location.revision == folder_identity(sentence_transformer, False)
