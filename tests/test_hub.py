"""Pushing and pulling over HTTP, against hub_server.py: what arrives works, what breaks says so and leaves nothing half.

The client is one process of its own, because huggingface_hub reads its endpoint, cache and token when it is imported.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXTS, difference
from hub_server import TOKEN, File, HubServer, Repo

from saving_utils import SHIPPED_CODE


WORKER = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
connect = socket.socket.connect
def only_loopback(self, address):
    if address[0] != "127.0.0.1":
        raise OSError(f"a connection to {address} was tried")
    return connect(self, address)
socket.socket.connect = only_loopback
from pathlib import Path
from huggingface_hub import HfApi
from transformers import AutoModel
def load(name, **options):
    return AutoModel.from_pretrained(name, trust_remote_code=True, **options)
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    space = {"Path": Path, "api": HfApi(), "load": load}
    try:
        exec(json.loads(line), space)
        answer = {"value": space.get("value")}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=out, flush=True)
"""


class ClientError(Exception):
    """What was raised there."""


class Client:
    """Runs Python in a process whose Hub is the loopback server; the variable `value` comes back."""

    def __init__(self, url: str, home: Path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.log = open(home / "client.log", "w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT)], env=environment, cwd=home, **pipes)

    def run(self, code: str, **variables):
        told = {name: str(value) if isinstance(value, Path) else value for name, value in variables.items()}
        assignments = "".join(f"{name} = {value!r}\n" for name, value in told.items())
        self.process.stdin.write(json.dumps(assignments + code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the client died: {Path(self.log.name).read_text()[-2000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(f"{answer['error']}: {answer['message']}")
        return answer["value"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=600)
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def fresh(hub):
    hub.repos.clear()
    hub.lfs.clear()
    hub.faults.clear()
    hub.log.clear()


def pull(client, repo_id: str, cache: Path, **options):
    code = "value = load(repo_id, use_safetensors=True, cache_dir=cache, **options).encode_query(texts).tolist()"
    return client.run(code, repo_id=repo_id, cache=cache, texts=TEXTS, options=options)


def are_of(vectors, model) -> bool:
    return difference(np.array(vectors), model.encode_query(TEXTS)) < 1e-6


def test_pushed_model_comes_back_from_an_empty_cache(client, hub, saved_dir, tiny_model, tmp_path):
    client.run("load(folder).push_to_hub('tester/pushed', commit_message='first')", folder=saved_dir)
    assert len(hub.repos["tester/pushed"].commits) == 2  # the empty one and ours: one commit
    files = hub.files("tester/pushed")
    card = files["README.md"].decode()
    assert "More Information Needed" not in card and f"{2 * tiny_model.config.hidden_size} numbers" in card
    for name in SHIPPED_CODE:
        assert files[name] == (saved_dir / name).read_bytes()
    for name in ("instructions.json", "modules.json", "processor_config.json", "encoder_tokenizer/tokenizer.json"):
        assert name in files
    assert are_of(pull(client, "tester/pushed", tmp_path / "cache"), tiny_model)

    vectors = client.run(
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer('tester/pushed', trust_remote_code=True, cache_folder=cache, device='cpu')\n"
        "value = model.encode_query(texts).tolist()\n"
        "model.push_to_hub('tester/again')\n",
        cache=tmp_path / "cache2",
        texts=TEXTS,
    )
    assert are_of(vectors, tiny_model)
    assert set(hub.files("tester/again")) >= set(files)
    assert are_of(pull(client, "tester/again", tmp_path / "cache3"), tiny_model)


def test_a_card_in_the_repository_stays(client, hub, saved_dir):
    card = b"---\nlicense: mit\n---\nmine"
    client.run(
        "api.create_repo('tester/card')\n"
        "api.upload_file(path_or_fileobj=card, path_in_repo='README.md', repo_id='tester/card')\n"
        "load(folder).push_to_hub('tester/card')",
        folder=saved_dir,
        card=card,
    )
    assert hub.files("tester/card")["README.md"].decode().endswith("mine")
    assert "model.safetensors" in hub.files("tester/card")


def test_no_template_of_a_card_is_published(client, hub, saved_dir):
    """Whatever transformers calls what it does between saving and uploading: nothing of that is used."""
    code = """
from transformers.utils import PushToHubMixin
kept = PushToHubMixin._upload_modified_files
del PushToHubMixin._upload_modified_files
try:
    model = load(folder)
    model.push_to_hub("tester/model", tags=["mine"])
    model.config.push_to_hub("tester/config")
    model.processor.push_to_hub("tester/processor", commit_message="hello")
finally:
    PushToHubMixin._upload_modified_files = kept
"""
    client.run(code, folder=saved_dir)
    card = hub.files("tester/model")["README.md"].decode()
    assert "More Information Needed" not in card and "- mine" in card and "- causal2vec" in card
    assert "config.json" in hub.files("tester/config") and "README.md" not in hub.files("tester/config")
    assert "encoder_tokenizer/tokenizer.json" in hub.files("tester/processor")
    assert "README.md" not in hub.files("tester/processor")


def test_new_weights_replace_the_old_ones(client, hub, saved_dir, complete_dir, tiny_model, tmp_path):
    """A single file pushed before the shards would win over them, and an adapter over either."""
    code = """
model = load(folder)
model.projector.linear_1.weight.data.mul_(-1)
model.push_to_hub("tester/sharded")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="tester/sharded")
model.projector.linear_1.weight.data.mul_(-1)
model.push_to_hub("tester/sharded", max_shard_size="60KB")
"""
    client.run(code, folder=saved_dir)
    names = hub.files("tester/sharded").keys()
    assert len([name for name in names if name.startswith("model-")]) > 1
    assert not {"model.safetensors", "adapter_config.json"} & names
    assert are_of(pull(client, "tester/sharded", tmp_path / "cache"), tiny_model)
    push_files(client, complete_dir, "tester/both")
    push_files(client, saved_dir, "tester/both")  # as `upload_folder` leaves them
    with pytest.raises(ClientError, match="model.safetensors.*shards"):
        pull(client, "tester/both", tmp_path / "cache2")


def test_save_with_push_to_hub_pushes_everything(client, hub, saved_dir, tiny_model, tmp_path):
    options = dict(push_to_hub=True, repo_id="tester/saved", private=True, max_shard_size="60KB")
    code = "load(folder).save_pretrained(target, **options)"
    client.run(code, folder=saved_dir, target=tmp_path / "target", options=options)
    assert hub.repos["tester/saved"].private
    assert (tmp_path / "target" / "modules.json").is_file()
    assert {"modules.json", "processor_config.json", *SHIPPED_CODE} <= set(hub.files("tester/saved"))
    assert "model.safetensors" not in hub.files("tester/saved"), "not sharded"
    assert are_of(pull(client, "tester/saved", tmp_path / "cache"), tiny_model)


def test_pinned_revision_is_what_is_loaded(client, hub, saved_dir, tiny_model, tmp_path):
    code = """
model = load(folder)
model.push_to_hub("tester/pinned")
model.projector.linear_1.weight.data.mul_(-1)
model.push_to_hub("tester/pinned")
model.push_to_hub("tester/pinned", revision="other")
"""
    client.run(code, folder=saved_dir)
    _, first, second = hub.repos["tester/pinned"].commits  # the branch has main's files, so it needs no commit
    assert hub.repos["tester/pinned"].refs["main"] == second
    assert are_of(pull(client, "tester/pinned", tmp_path / "cache", revision=first), tiny_model)
    latest = pull(client, "tester/pinned", tmp_path / "cache")
    assert not are_of(latest, tiny_model)
    assert difference(pull(client, "tester/pinned", tmp_path / "cache", revision="other"), latest) < 1e-6
    hub.log.clear()
    pull(client, "tester/pinned", tmp_path / "cache", revision=first)
    assert not hub.requests("GET", "/lfs/")  # the weights are in the cache
    with pytest.raises(ClientError, match="[Rr]evision|not a valid git identifier"):
        pull(client, "tester/pinned", tmp_path / "cache", revision="f" * 40)


def test_adapter_alone_can_be_pushed(client, hub, saved_dir, tmp_path):
    code = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
base = load(folder)
base.push_to_hub("tester/base")
base = load("tester/base", cache_dir=cache)
config = LoraConfig(r=2, target_modules=r"decoder\\..*(q_proj|v_proj)", modules_to_save=["projector"])
model = get_peft_model(base, config)
torch.manual_seed(0)
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.3)
model.push_to_hub("tester/adapter")
trained = model.encode_query(texts)
base = load("tester/base", cache_dir=cache)
before = base.encode_query(texts)
pulled = PeftModel.from_pretrained(base, "tester/adapter", cache_dir=cache)
again = pulled.encode_query(texts)
merged = pulled.merge_and_unload()
merged.save_pretrained(target)
merged_again = load(target).encode_query(texts)
alone = load("tester/adapter", cache_dir=cache)
assert abs(alone.encode_query(texts) - again).max() < 1e-6
value = [float(abs(trained - other).max()) for other in (before, again, merged_again)]

# Beside weights, it is theirs only if it names them; and nobody else has the base of one that was made here.
api.upload_folder(repo_id="tester/adapter", folder_path=target)
beside = load("tester/adapter", cache_dir=cache)
assert abs(beside.encode_query(texts) - merged_again).max() < 1e-6
local = load(folder)
local.add_adapter(LoraConfig(r=2, target_modules=r"decoder\\..*q_proj"))
try:
    local.push_to_hub("tester/local")
except ValueError as error:
    assert "adapter_config.json names the base" in str(error)
"""
    folders = {"folder": saved_dir, "cache": tmp_path / "cache", "target": tmp_path / "merged"}
    before, again, merged = client.run(code, texts=TEXTS, **folders)
    assert before > 1e-3 and again < 1e-6 and merged < 1e-5
    files = hub.files("tester/adapter")
    assert "adapter_model.safetensors" in files and "tester/local" not in hub.repos
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    assert set(SHIPPED_CODE) <= {path.name for path in (tmp_path / "merged").iterdir()}


def test_interrupted_upload_goes_on_where_it_stopped(client, hub, complete_dir, tiny_model, tmp_path):
    shards = len(list(complete_dir.glob("model-*.safetensors")))
    last = sorted(complete_dir.glob("model-*.safetensors"))[-1]
    hub.fail("PUT", f"/lfs/{hashlib.sha256(last.read_bytes()).hexdigest()}", status=403)
    code = """
import argparse
from scripts.push_to_hub import files_to_push, push
args = argparse.Namespace(repo_id="tester/broken", private=False, revision=None, message="m")
push(Path(folder), files_to_push(Path(folder)), args)
"""
    with pytest.raises(ClientError, match=last.name):
        client.run(code, folder=complete_dir)
    assert hub.files("tester/broken") == {}  # no commit, so nothing that could pass for a model
    with pytest.raises(ClientError, match="tester/broken"):
        pull(client, "tester/broken", tmp_path / "cache")
    hub.log.clear()
    client.run(code, folder=complete_dir)
    assert len(hub.requests("PUT", "/lfs/")) < shards  # what had arrived was not sent again
    assert len(hub.lfs) == shards
    assert are_of(pull(client, "tester/broken", tmp_path / "cache2"), tiny_model)


def push_files(client, folder: Path, repo_id: str) -> None:
    code = "api.create_repo(repo_id, exist_ok=True)\napi.upload_folder(repo_id=repo_id, folder_path=folder)"
    client.run(code, folder=folder, repo_id=repo_id)


def test_full_disk_leaves_nothing(client, hub, saved_dir, tmp_path):
    limit = (saved_dir / "model.safetensors").stat().st_size // 2
    code = (
        "import resource\n"
        "old = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))\n"  # writing more than this fails, as on a full disk
        "try:\n    {}\nfinally:\n    resource.setrlimit(resource.RLIMIT_FSIZE, old)\n"
    )
    save = "model.save_pretrained(target)"
    load = "model = load(folder)\n"
    target = tmp_path / "target"
    with pytest.raises(ClientError, match="too large|space|[Ii]/?[Oo]|Errno"):
        client.run(load + code.format(save), limit=limit, folder=saved_dir, target=target)
    assert list(target.iterdir()) == []
    client.run(load + save, folder=saved_dir, target=target)
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    changed = load + "model.projector.linear_1.weight.data.mul_(2)\n" + code.format(save)
    with pytest.raises(ClientError, match="too large|space|[Ii]/?[Oo]|Errno"):
        client.run(changed, limit=limit, folder=saved_dir, target=target)
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == before  # the old one stands


def test_wrong_token_and_missing_repository_say_so(client, hub, saved_dir, tmp_path):
    with pytest.raises(ClientError, match="401"):
        client.run("load(folder).push_to_hub('tester/secret', token='hf_wrong')", folder=saved_dir)
    assert hub.repos == {}
    with pytest.raises(ClientError, match="tester/nothing"):
        pull(client, "tester/nothing", tmp_path / "cache")
    push_files(client, saved_dir, "tester/private")
    hub.repos["tester/private"].private = True
    with pytest.raises(ClientError, match="tester/private|401"):
        pull(client, "tester/private", tmp_path / "cache", token=False)


def test_truncated_shard_in_a_repository(client, hub, complete_dir, tmp_path):
    folder = shutil.copytree(complete_dir, tmp_path / "truncated")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    push_files(client, folder, "tester/truncated")
    with pytest.raises(ClientError, match="tester/truncated.*cut off"):
        pull(client, "tester/truncated", tmp_path / "cache")


def test_script_pushes_in_one_commit(client, hub, complete_dir, tiny_model, tmp_path):
    code = "from scripts import push_to_hub; value = push_to_hub.main([folder, 'tester/script', '--private', '--message', 'hello'])"
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    assert client.run(code, folder=folder) == 0
    repo = hub.repos["tester/script"]
    assert len(repo.commits) == 2 and repo.private
    assert are_of(pull(client, "tester/script", tmp_path / "cache"), tiny_model)

    # The next version has one file of weights instead of shards: these go with the same commit.
    tiny_model.save_pretrained(folder)
    assert not list(folder.glob("model-*"))
    assert client.run(code.replace("hello", "again"), folder=folder) == 0
    assert len(repo.commits) == 3
    weights = [name for name in hub.files("tester/script") if name.startswith("model") and "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_a_dataset_on_the_hub_becomes_training_rows(client, hub, tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"p{i}", "negative_1": f"n{i}"} for i in range(5)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.repos["tester/pairs"] = repo = Repo()
    repo.commit("main", {"data/train-00000-of-00001.jsonl": File(content, lfs=False)})
    code = """
from training.data import DatasetSpec, load_rows, stream_rows
spec = DatasetSpec("pairs", "tester/pairs", ["find"])
value = [load_rows(spec, "nowhere", cache).to_list(), list(stream_rows(spec, "nowhere"))]
"""
    expected = [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}"]} for i in range(5)]
    assert client.run(code, cache=tmp_path) == [expected, expected]
    with pytest.raises(ClientError, match="tester/none"):
        client.run(code.replace("tester/pairs", "tester/none"), cache=tmp_path)
