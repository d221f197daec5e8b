"""Pushing and pulling over HTTP, against hub_server.py: what arrives works, what breaks says so and leaves nothing half.

The client is one process of its own, because huggingface_hub reads its endpoint, cache and token when it is imported.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXTS
from hub_server import TOKEN, File, HubServer, Repo

from saving_utils import SHIPPED_CODE, code_table
from training.card import write_card


WORKER = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
connect = socket.socket.connect
def only_loopback(self, address):
    if address[0] != "127.0.0.1":
        raise OSError(f"a connection to {address} was tried")
    return connect(self, address)
socket.socket.connect = only_loopback
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    space = {}
    try:
        exec(json.loads(line), space)
        answer = {"value": space.get("value")}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error), "mro": [c.__name__ for c in type(error).__mro__]}
    print(json.dumps(answer), file=out, flush=True)
"""


class ClientError(Exception):
    def __init__(self, kind: str, message: str, mro: list[str]):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.mro = kind, message, mro


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
        command = [sys.executable, "-c", WORKER, str(ROOT)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=home,
        )

    def run(self, code: str, **variables):
        assignments = "".join(f"{name} = {value!r}\n" for name, value in variables.items())
        self.process.stdin.write(json.dumps(assignments + code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the client died: {Path(self.log.name).read_text()[-2000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["message"], answer["mro"])
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


@pytest.fixture(scope="module")
def complete_dir(tiny_model, run_facts, tmp_path_factory) -> Path:
    """The tiny model in three shards, with a card that lacks nothing."""
    folder = tmp_path_factory.mktemp("complete") / "model"
    tiny_model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    write_card(folder, run_facts, tiny_model, "tester/complete", licence="apache-2.0")
    return folder


def expected(model) -> np.ndarray:
    return model.encode_query(TEXTS)


PULL = """
from transformers import AutoModel
model = AutoModel.from_pretrained(repo_id, trust_remote_code=True, use_safetensors=True, cache_dir=cache, **options)
value = model.encode_query(texts).tolist()
"""


def pull(client, repo_id: str, cache: Path, **options):
    return np.array(client.run(PULL, repo_id=repo_id, cache=str(cache), texts=TEXTS, options=options))


def test_pushed_model_comes_back_from_an_empty_cache(client, hub, saved_dir, tiny_model, tmp_path):
    client.run(
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "model.push_to_hub('tester/pushed', commit_message='first')\n",
        folder=str(saved_dir),
    )
    assert len(hub.repos["tester/pushed"].commits) == 2  # the empty one and ours: one commit
    files = hub.files("tester/pushed")
    card = files["README.md"].decode()
    assert "More Information Needed" not in card and f"{2 * tiny_model.config.hidden_size} numbers" in card
    for name in SHIPPED_CODE:
        assert files[name] == (saved_dir / name).read_bytes()
    for name in ("instructions.json", "modules.json", "processor_config.json", "encoder_tokenizer/tokenizer.json"):
        assert name in files
    assert np.abs(pull(client, "tester/pushed", tmp_path / "cache") - expected(tiny_model)).max() < 1e-6

    vectors = client.run(
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer('tester/pushed', trust_remote_code=True, cache_folder=cache, device='cpu')\n"
        "value = model.encode_query(texts).tolist()\n"
        "model.push_to_hub('tester/again')\n",
        cache=str(tmp_path / "cache2"),
        texts=TEXTS,
    )
    assert np.abs(np.array(vectors) - expected(tiny_model)).max() < 1e-6
    assert set(hub.files("tester/again")) >= set(files)
    assert np.abs(pull(client, "tester/again", tmp_path / "cache3") - expected(tiny_model)).max() < 1e-6


def test_a_card_in_the_repository_stays(client, hub, saved_dir):
    code = (
        "from transformers import AutoModel\n"
        "from huggingface_hub import HfApi\n"
        "HfApi().create_repo('tester/card')\n"
        "HfApi().upload_file(path_or_fileobj=b'---\\nlicense: mit\\n---\\nmine', path_in_repo='README.md', repo_id='tester/card')\n"
        "AutoModel.from_pretrained(folder, trust_remote_code=True).push_to_hub('tester/card')\n"
    )
    client.run(code, folder=str(saved_dir))
    assert hub.files("tester/card")["README.md"].decode().endswith("mine")
    assert "model.safetensors" in hub.files("tester/card")


def test_no_template_of_a_card_is_published(client, hub, saved_dir):
    """Whatever transformers calls what it does between saving and uploading: nothing of that is used."""
    code = """
from transformers import AutoModel
from transformers.utils import PushToHubMixin
kept = PushToHubMixin._upload_modified_files
del PushToHubMixin._upload_modified_files
try:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.push_to_hub("tester/model", tags=["mine"])
    model.config.push_to_hub("tester/config")
    model.processor.push_to_hub("tester/processor", commit_message="hello")
finally:
    PushToHubMixin._upload_modified_files = kept
"""
    client.run(code, folder=str(saved_dir))
    card = hub.files("tester/model")["README.md"].decode()
    assert "More Information Needed" not in card and "- mine" in card and "- causal2vec" in card
    assert "config.json" in hub.files("tester/config") and "README.md" not in hub.files("tester/config")
    assert "encoder_tokenizer/tokenizer.json" in hub.files("tester/processor")
    assert "README.md" not in hub.files("tester/processor")


def test_new_weights_replace_the_old_ones(client, hub, saved_dir, complete_dir, tiny_model, tmp_path):
    """A single file pushed before the shards would win over them, and an adapter over either."""
    code = """
from transformers import AutoModel
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.projector.linear_1.weight.data.mul_(-1)
model.push_to_hub("tester/sharded")
HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="tester/sharded")
model.projector.linear_1.weight.data.mul_(-1)
model.push_to_hub("tester/sharded", max_shard_size="60KB")
"""
    client.run("from huggingface_hub import HfApi" + code, folder=str(saved_dir))
    names = [
        name for name in hub.files("tester/sharded") if name.endswith((".safetensors", "index.json", "config.json"))
    ]
    assert len([name for name in names if name.startswith("model-")]) > 1
    assert not {"model.safetensors", "adapter_config.json"} & set(names)
    assert np.abs(pull(client, "tester/sharded", tmp_path / "cache") - expected(tiny_model)).max() < 1e-6
    push_files(client, complete_dir, "tester/both")
    push_files(client, saved_dir, "tester/both")  # as `upload_folder` leaves them
    with pytest.raises(ClientError, match="does not say which are the weights"):
        pull(client, "tester/both", tmp_path / "cache2")


def test_save_with_push_to_hub_pushes_everything(client, hub, saved_dir, tiny_model, tmp_path):
    client.run(
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "model.save_pretrained(target, push_to_hub=True, repo_id='tester/saved', private=True, max_shard_size='60KB')\n",
        folder=str(saved_dir),
        target=str(tmp_path / "target"),
    )
    assert hub.repos["tester/saved"].private
    assert (tmp_path / "target" / "modules.json").is_file()
    assert {"modules.json", "processor_config.json", *SHIPPED_CODE} <= set(hub.files("tester/saved"))
    assert "model.safetensors" not in hub.files("tester/saved"), "not sharded"
    assert np.abs(pull(client, "tester/saved", tmp_path / "cache") - expected(tiny_model)).max() < 1e-6


def test_pinned_revision_is_what_is_loaded(client, hub, saved_dir, tiny_model, tmp_path):
    code = (
        "import torch\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "model.push_to_hub('tester/pinned')\n"
        "model.projector.linear_1.weight.data.mul_(-1)\n"
        "model.push_to_hub('tester/pinned')\n"
        "model.push_to_hub('tester/pinned', revision='other')\n"
    )
    client.run(code, folder=str(saved_dir))
    _, first, second = hub.repos["tester/pinned"].commits  # the branch has main's files, so it needs no commit
    assert hub.repos["tester/pinned"].refs["main"] == second
    pinned = pull(client, "tester/pinned", tmp_path / "cache", revision=first)
    assert np.abs(pinned - expected(tiny_model)).max() < 1e-6
    latest = pull(client, "tester/pinned", tmp_path / "cache")
    assert np.abs(latest - expected(tiny_model)).max() > 1e-3
    assert np.abs(pull(client, "tester/pinned", tmp_path / "cache", revision="other") - latest).max() < 1e-6
    hub.log.clear()
    pull(client, "tester/pinned", tmp_path / "cache", revision=first)
    assert not hub.requests("GET", "/lfs/")  # the weights are in the cache
    with pytest.raises(ClientError, match="[Rr]evision|not a valid git identifier"):
        pull(client, "tester/pinned", tmp_path / "cache", revision="f" * 40)


def test_adapter_alone_can_be_pushed(client, hub, saved_dir, tmp_path):
    code = """
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
base.push_to_hub("tester/base")
base = AutoModel.from_pretrained("tester/base", trust_remote_code=True, cache_dir=cache)
config = LoraConfig(r=2, target_modules=r"decoder\\..*(q_proj|v_proj)", modules_to_save=["projector"])
model = get_peft_model(base, config)
torch.manual_seed(0)
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.3)
model.push_to_hub("tester/adapter")
trained = model.encode_query(texts)
base = AutoModel.from_pretrained("tester/base", trust_remote_code=True, cache_dir=cache)
before = base.encode_query(texts)
pulled = PeftModel.from_pretrained(base, "tester/adapter", cache_dir=cache)
again = pulled.encode_query(texts)
merged = pulled.merge_and_unload()
merged.save_pretrained(target)
merged_again = AutoModel.from_pretrained(target, trust_remote_code=True).encode_query(texts)
alone = AutoModel.from_pretrained("tester/adapter", trust_remote_code=True, cache_dir=cache)
assert abs(alone.encode_query(texts) - again).max() < 1e-6
value = [float(abs(trained - other).max()) for other in (before, again, merged_again)]

# Beside weights, it is theirs only if it names them; and nobody else has the base of one that was made here.
HfApi().upload_folder(repo_id="tester/adapter", folder_path=target)
beside = AutoModel.from_pretrained("tester/adapter", trust_remote_code=True, cache_dir=cache)
assert abs(beside.encode_query(texts) - merged_again).max() < 1e-6
local = AutoModel.from_pretrained(folder, trust_remote_code=True)
local.add_adapter(LoraConfig(r=2, target_modules=r"decoder\\..*q_proj"))
try:
    local.push_to_hub("tester/local")
except ValueError as error:
    assert "adapter_config.json names the base" in str(error) and "Push the base first" in str(error)
else:
    raise AssertionError("pushed")
"""
    folders = {"folder": str(saved_dir), "cache": str(tmp_path / "cache"), "target": str(tmp_path / "merged")}
    before, again, merged = client.run(code, texts=TEXTS, **folders)
    assert before > 1e-3 and again < 1e-6 and merged < 1e-5
    files = hub.files("tester/adapter")
    assert "adapter_model.safetensors" in files and "tester/local" not in hub.repos
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    assert set(SHIPPED_CODE) <= {path.name for path in (tmp_path / "merged").iterdir()}


def test_interrupted_upload_goes_on_where_it_stopped(client, hub, complete_dir, tiny_model, tmp_path):
    shards = len(list(complete_dir.glob("model-*.safetensors")))
    last = sorted(complete_dir.glob("model-*.safetensors"))[-1]
    digest = client.run(
        "import hashlib, pathlib; value = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()", path=str(last)
    )
    hub.fail("PUT", f"/lfs/{digest}", status=403)
    push = "from scripts import push_to_hub; value = push_to_hub.push(pathlib.Path(folder), push_to_hub.files_to_push(pathlib.Path(folder)), args)"
    setup = (
        "import argparse, pathlib\n"
        "args = argparse.Namespace(repo_id='tester/broken', private=False, revision=None, message='m')\n"
    )
    with pytest.raises(ClientError, match=f"Error while uploading '{last.name}'"):
        client.run(setup + push, folder=str(complete_dir))
    assert hub.files("tester/broken") == {}  # no commit, so nothing that could pass for a model
    with pytest.raises(ClientError, match="tester/broken"):
        pull(client, "tester/broken", tmp_path / "cache")
    hub.log.clear()
    client.run(setup + push, folder=str(complete_dir))
    assert len(hub.requests("PUT", "/lfs/")) < shards  # what had arrived was not sent again
    assert len(hub.lfs) == shards
    assert np.abs(pull(client, "tester/broken", tmp_path / "cache2") - expected(tiny_model)).max() < 1e-6


def test_interrupted_download_goes_on_where_it_stopped(client, hub, saved_dir, tmp_path):
    folder = shutil.copytree(saved_dir, tmp_path / "model")
    content = bytes(range(256)) * 100_000  # more than one of huggingface_hub's pieces
    (folder / "more.safetensors").write_bytes(content)
    push_files(client, folder, "tester/slow")
    oid = hub.repos["tester/slow"].commits[hub.repos["tester/slow"].refs["main"]]["more.safetensors"].etag
    hub.fail("GET", f"/lfs/{oid}", cut_after=15_000_000)
    code = "from huggingface_hub import snapshot_download; value = snapshot_download('tester/slow', cache_dir=cache)"
    snapshot = Path(client.run(code, cache=str(tmp_path / "cache")))
    assert (snapshot / "more.safetensors").read_bytes() == content
    assert (snapshot / "model.safetensors").read_bytes() == (saved_dir / "model.safetensors").read_bytes()
    first, second = [entry[2] for entry in hub.requests("GET", f"/lfs/{oid}")]
    assert first is None and re.fullmatch(r"bytes=[1-9]\d+-", second)


def push_files(client, folder: Path, repo_id: str) -> None:
    code = "from huggingface_hub import HfApi\nHfApi().create_repo(repo_id, exist_ok=True)\nHfApi().upload_folder(repo_id=repo_id, folder_path=folder)"
    client.run(code, folder=str(folder), repo_id=repo_id)


def no_weights(cache: Path) -> bool:
    """Whether a cache holds no file that could be taken for weights, whole or not."""
    found = [path for path in cache.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".incomplete")]
    return not found


def test_download_that_never_ends_leaves_nothing(client, hub, saved_dir, tmp_path):
    push_files(client, saved_dir, "tester/endless")
    hub.fail("GET", "/lfs/", times=1000, status=404)
    with pytest.raises(ClientError) as error:
        pull(client, "tester/endless", tmp_path / "cache")
    assert "404" in error.value.message or "model.safetensors" in error.value.message
    assert no_weights(tmp_path / "cache")


def test_full_disk_leaves_nothing(client, hub, saved_dir, tmp_path):
    push_files(client, saved_dir, "tester/full")
    limit = (saved_dir / "model.safetensors").stat().st_size // 2
    code = (
        "import resource\n"
        "old = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))\n"  # writing more than this fails, as on a full disk
        "try:\n    {}\nfinally:\n    resource.setrlimit(resource.RLIMIT_FSIZE, old)\n"
    )
    download = "from transformers import AutoModel; AutoModel.from_pretrained('tester/full', trust_remote_code=True, cache_dir=cache)"
    with pytest.raises(ClientError, match="too large|space|Errno"):
        client.run(code.format(download), limit=limit, cache=str(tmp_path / "cache"))
    assert no_weights(tmp_path / "cache")

    save = "model.save_pretrained(target)"
    load = "from transformers import AutoModel; model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
    target = tmp_path / "target"
    with pytest.raises(ClientError, match="too large|space|[Ii]/?[Oo]|Errno"):
        client.run(load + code.format(save), limit=limit, folder=str(saved_dir), target=str(target))
    assert list(target.iterdir()) == []
    client.run(load + save, folder=str(saved_dir), target=str(target))
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    changed = load + "model.projector.linear_1.weight.data.mul_(2)\n" + code.format(save)
    with pytest.raises(ClientError, match="too large|space|[Ii]/?[Oo]|Errno"):
        client.run(changed, limit=limit, folder=str(saved_dir), target=str(target))
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == before  # the old one stands


def test_wrong_token_and_missing_repository_say_so(client, hub, saved_dir, tmp_path):
    load = "from transformers import AutoModel\nmodel = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
    with pytest.raises(ClientError, match="401"):
        client.run(load + "model.push_to_hub('tester/secret', token='hf_wrong')", folder=str(saved_dir))
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
    with pytest.raises(ClientError, match="weights of tester/truncated are damaged or cut off"):
        pull(client, "tester/truncated", tmp_path / "cache")


def run_script(*argv: str, capsys) -> tuple[int, str, str]:
    from scripts import push_to_hub

    code = push_to_hub.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_dry_run_lists_what_would_go(complete_dir, capsys):
    code, out, err = run_script(str(complete_dir), "tester/x", "--dry_run", capsys=capsys)
    assert code == 0, err
    listed = {line.split()[-1] for line in out.splitlines()[:-1]}
    assert listed == {path.relative_to(complete_dir).as_posix() for path in complete_dir.rglob("*") if path.is_file()}
    size = sum(path.stat().st_size for path in complete_dir.rglob("*") if path.is_file())
    assert out.splitlines()[-1] == f"Would push {len(listed)} files, {size / 1e6:,.1f} MB, to tester/x."


def test_the_repository_itself_can_be_pushed(bundled_dir, capsys):
    """Its card lacks nothing, and what training and tests leave in a clone stays there."""
    code, out, err = run_script(str(bundled_dir), "tester/x", "--dry_run", capsys=capsys)
    assert code == 0, err
    listed = {line.split()[-1]: int(line.split()[0].replace(",", "")) for line in out.splitlines()[:-1]}
    weights = {name: size for name, size in listed.items() if name.endswith(".safetensors")}
    assert weights == {path.name: path.stat().st_size for path in bundled_dir.glob("*.safetensors")} != {}
    assert {"README.md", "train.py", "instructions.json", "recipes/mistral-7b.json", *SHIPPED_CODE} <= set(listed)
    assert not [name for name in listed if name.startswith((".", "runs/", "bases/")) or "cache__" in name]


def test_what_is_made_in_a_folder_does_not_go(complete_dir, tmp_path):
    from scripts.push_to_hub import files_to_push

    folder = shutil.copytree(complete_dir, tmp_path / "model")
    before = files_to_push(folder)
    for name in (
        "runs/mine/model/model.safetensors",
        "bases/encoder/config.json",
        ".venv/x.py",
        ".venv-oldest/x.py",
        "a.egg-info/x",
        "tests/__pycache__/x.pyc",
        ".pytest_cache/x",
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    assert files_to_push(folder) == before and len(before) > 10


def test_script_pushes_in_one_commit(client, hub, complete_dir, tiny_model, tmp_path):
    code = "from scripts import push_to_hub; value = push_to_hub.main([folder, 'tester/script', '--private', '--message', 'hello'])"
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    assert client.run(code, folder=str(folder)) == 0
    repo = hub.repos["tester/script"]
    assert len(repo.commits) == 2 and repo.private
    assert np.abs(pull(client, "tester/script", tmp_path / "cache") - expected(tiny_model)).max() < 1e-6

    # The next version has one file of weights instead of shards: these go with the same commit.
    tiny_model.save_pretrained(folder)
    assert not list(folder.glob("model-*"))
    assert client.run(code.replace("hello", "again"), folder=str(folder)) == 0
    assert len(repo.commits) == 3
    weights = [name for name in hub.files("tester/script") if name.startswith("model") and "safetensors" in name]
    assert weights == ["model.safetensors"]


def broken(complete_dir: Path, target: Path, how: str) -> Path:
    folder = shutil.copytree(complete_dir, target)
    card = folder / "README.md"
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    config = json.loads((folder / "config.json").read_text())
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif how == "large":
        with open(folder / "extra.safetensors", "wb") as file:
            file.truncate(6 * 10**9)  # sparse
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "header":
        shard.write_bytes(b"\xff" * 100)
    elif how == "json":
        (folder / "training.json").write_text('{"steps": ')
    elif how == "shard":
        shard.unlink()
    elif how == "both":
        shutil.copy(shard, folder / "model.safetensors")
    elif how in ("adapter", "base"):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
        shutil.copy(shard, folder / "adapter_model.safetensors")
        for path in folder.glob("model*.safetensors*") if how == "base" else ():
            path.unlink()
    elif how == "code":
        (folder / "decoder_utils.py").unlink()
    elif how == "auto_map":
        config["auto_map"]["AutoModel"] = "someone/else--modeling_causal2vec.Causal2VecModel"
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "path":
        (folder / "training.json").write_text(json.dumps({"output_dir": "/" + "data/me/runs"}))
    elif how == "home":
        (folder / "notes.txt").write_text("made in /" + "home/me/model")
    elif how == "drive":
        (folder / "notes.txt").write_text("made in C:" + "\\Users\\me")
    elif how == "licence":
        card.write_text(card.read_text().replace("license: apache-2.0\n", ""))
    elif how == "limits":
        card.write_text(card.read_text().replace("## Limits", "## Other"))
    elif how == "hash":
        (folder / "decoder_utils.py").write_text((folder / "decoder_utils.py").read_text() + "\n# changed\n")
    elif how == "pin":
        card.write_text(card.read_text().replace("revision=", ""))
    elif how == "card":
        card.unlink()
    return folder


@pytest.mark.parametrize(
    "how, message",
    [
        ("pickle", "pytorch_model.bin: .bin files can run code"),
        ("large", "6.0 GB are more than 5 GB"),
        ("truncated", "it is cut off"),
        ("header", "no safetensors header"),
        ("json", "training.json, line 1: not JSON: Expecting value"),
        ("shard", "model.safetensors.index.json names model-00001"),
        ("both", "model.safetensors.index.json does not name model.safetensors"),
        ("adapter", "an adapter beside weights"),
        ("base", "adapter_config.json names the base '../base'"),
        ("code", "missing: decoder_utils.py"),
        ("auto_map", "auto_map gives 'someone/else--"),
        ("path", "training.json names paths of a machine: /data/me/runs"),
        ("home", "notes.txt names paths of a machine: /" + "home/me"),  # split, so that this file names none
        ("drive", "notes.txt names paths of a machine: C:" + "\\Users"),
        ("licence", "the front matter has no `license`"),
        ("limits", "its limits"),
        ("hash", "the SHA-256 of decoder_utils.py"),
        ("pin", "how to pin a commit"),
        ("card", "missing: README.md"),
    ],
)
def test_what_must_not_go_out_is_refused(complete_dir, tmp_path, capsys, monkeypatch, how, message):
    from scripts import push_to_hub

    monkeypatch.setattr(push_to_hub, "push", lambda *args: pytest.fail("pushed"))
    monkeypatch.setattr(push_to_hub, "load_problem", lambda folder: None)  # slow, and has a test of its own
    folder = broken(complete_dir, tmp_path / "model", how)
    code, _, err = run_script(str(folder), "tester/x", capsys=capsys)
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 2  # what is wrong, and nothing else


def test_a_folder_that_does_not_load_is_refused(complete_dir, tmp_path, capsys):
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["contextual_token_id"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run_script(str(folder), "tester/x", "--dry_run", capsys=capsys)
    assert code == 2 and "does not load in a fresh process" in err and "contextual_token_id" in err


def test_plain_card_lists_the_hashes_of_the_code(saved_dir):
    table = code_table(saved_dir)
    assert table in (saved_dir / "README.md").read_text()
    assert table.count(".py") == len(SHIPPED_CODE)


def test_saving_again_brings_the_hashes_up_to_date(complete_dir, tiny_model, tmp_path):
    folder = shutil.copytree(complete_dir, tmp_path / "model")
    card = (folder / "README.md").read_text()
    digest = re.search(r"`decoder_utils.py` \| `([0-9a-f]{64})`", card)[1]
    (folder / "README.md").write_text(card.replace(digest, "0" * 64))
    tiny_model.save_pretrained(folder)
    assert code_table(folder) in (folder / "README.md").read_text()
    assert "license: apache-2.0" in (folder / "README.md").read_text()  # the rest stays


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
    assert client.run(code, cache=str(tmp_path)) == [expected, expected]
    with pytest.raises(ClientError, match="tester/none"):
        client.run(code.replace("tester/pairs", "tester/none"), cache=str(tmp_path))
