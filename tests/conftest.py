"""What tests share: tiny random backbones of every promised family, models made of them, and runs that train them."""

import copy
import functools
import json
import os
import socket
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_modules_cache = tempfile.TemporaryDirectory()  # remote code is copied here, and nothing older is found
os.environ["HF_MODULES_CACHE"] = _modules_cache.name

ROOT = Path(__file__).resolve().parent.parent

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordPiece
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast


torch.set_num_threads(1)  # the models are so small that threads cost more than they give

TEXTS = [
    "How much protein should a female eat?",
    "As a general guideline, the average requirement of protein for women aged 19 to 70 is 46 grams per day.",
    "hi",
    "",
    "The quick brown fox jumps over the lazy dog, then it runs away from the village and is never seen again.",
    "Definition of summit for English language learners: the highest point of a mountain.",
]


def pytest_configure(config) -> None:
    """What other packages warn each other of is theirs; a deprecated call in a file of this repository is an error."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    modules = "|".join([path.stem for path in ROOT.glob("*.py")] + [rf"{name}\..+" for name in folders])
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:({modules})$")


FP32_BOUND = 1e-5  # of any number of an unnormalised embedding, whose numbers are about 1
SAME = 1e-6  # the same computation; where weights lie in memory may still change a last bit


def embed(model, batch, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).embeddings


def plain(model, texts, instructions=None, examples=None) -> np.ndarray:
    """The vectors of texts, every text by itself and in one piece."""
    model.eval()
    rows = []
    for i, text in enumerate(texts):
        instruction = instructions[i] if isinstance(instructions, list) else instructions
        rows.append(embed(model, model.processor(text, instruction, examples))[0].float())
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def gradients(model, batch, **kwargs) -> dict[str, torch.Tensor]:
    """Of a weighted sum of a batch's embeddings."""
    model.zero_grad()
    embeddings = model(**batch, **kwargs).embeddings
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(left, right) -> float:
    return (torch.as_tensor(left) - torch.as_tensor(right)).abs().max().item()


DECODERS = {
    "llama": dict(model_type="llama"),
    "mistral": dict(model_type="mistral", sliding_window=8),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3"),
    "gemma2": dict(model_type="gemma2", sliding_window=8),
    "gemma3": dict(model_type="gemma3_text", sliding_window=8),
    "phi3": dict(model_type="phi3"),
    "gpt_neox": dict(model_type="gpt_neox"),
    "olmo2": dict(model_type="olmo2"),
}
ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "modernbert", "xlm-roberta")
PAIRS = [(decoder, "bert") for decoder in DECODERS] + [("llama", encoder) for encoder in ENCODERS if encoder != "bert"]


def decoder_config(family: str, vocab_size: int):
    values = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # large enough for texts to differ
    )
    values.update(DECODERS[family])
    return AutoConfig.for_model(vocab_size=vocab_size, **values)


def encoder_config(family: str, vocab_size: int):
    # 40 positions are fewer than the longest text has tokens; RoBERTa and its kin use 38 of them.
    values = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, pad_token_id=1)
    if family == "distilbert":
        values = dict(dim=24, hidden_dim=40, n_layers=2, n_heads=2, pad_token_id=1)
    if family == "modernbert":
        values.update(cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    return AutoConfig.for_model(
        family, vocab_size=vocab_size, max_position_embeddings=40, initializer_range=0.2, **values
    )


def decoder_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE; adds BOS like Llama's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece like BERT's. Its vocabulary is written down, not trained: WordPiece training breaks ties at random."""
    characters = sorted(set("".join(TEXTS).lower() + "[]<>/|_0123456789") - {" "})
    words = ["how", "much", "protein", "should", "a", "female", "eat", "the", "quick", "brown", "fox", "##ing", "##s"]
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{c}" for c in characters), *characters]
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory):
    """Returns a function from a family's name to a saved folder of a tiny random backbone with its tokenizer."""
    root = tmp_path_factory.mktemp("backbones")

    def get(family: str) -> str:
        folder = root / family
        if not folder.exists():
            torch.manual_seed(0)
            if family in DECODERS:
                tokenizer = decoder_tokenizer()
                config = decoder_config(family, len(tokenizer))
            else:
                tokenizer = wordpiece_tokenizer()
                config = encoder_config(family, len(tokenizer))
            AutoModel.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return get


@pytest.fixture(scope="session")
def gguf_dir(tmp_path_factory) -> Path:
    """A folder with a tiny Llama as llama.cpp stores it, `tiny.gguf` (Q8_0), and as transformers does, in `plain/`."""
    import gguf

    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = decoder_tokenizer(bos=False)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    config = decoder_config("llama", len(tokenizer))
    config.intermediate_size, config.eos_token_id, config.tie_word_embeddings = 64, tokenizer.eos_token_id, True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)

    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(vocabulary))]
    )
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.model.named_parameters():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(weight.detach().numpy(), kind)
        weight.data = torch.from_numpy(gguf.dequantize(data, kind))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp interleaves the two halves that a rotation turns into each other
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(f"model.{name}", (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    return folder


@pytest.fixture(scope="session")
def make_model(backbone_dir):
    """Returns a function that joins two tiny backbones into a Causal2VecModel, or into the model of a baseline."""
    from configuration_causal2vec import WITHOUT_ENCODER
    from modeling_causal2vec import Causal2VecModel

    def make(decoder: str = "llama", encoder: str = "bert", baseline: str | None = None, **kwargs):
        encoder_dir = None if baseline in WITHOUT_ENCODER else backbone_dir(encoder)
        decoder_dir = backbone_dir(decoder)
        torch.manual_seed(1)
        model = Causal2VecModel.from_encoder_decoder_pretrained(encoder_dir, decoder_dir, baseline=baseline, **kwargs)
        if model.projector is not None:
            for parameter in model.projector.parameters():  # large enough for the Contextual token to matter
                torch.nn.init.normal_(parameter, std=0.5)
        return model

    return make


@pytest.fixture(scope="session")
def models(make_model):
    """Returns a function from a pair of families to their model, which no test changes."""
    return functools.cache(make_model)


@pytest.fixture(scope="session")
def tiny_model(make_model):
    return make_model(query_instruction="Given a question, retrieve passages that answer it")


@pytest.fixture
def other_model(tiny_model):
    """The tiny model with other weights, and so other vectors."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.projector.linear_1.weight.mul_(-1)
    return model


@pytest.fixture(scope="session")
def saved_dir(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as a folder: weights, both tokenizers, code."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bf16_dir(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "model"
    make_model(dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_facts() -> dict:
    """What a card needs of a run's training.json."""
    return {
        "arguments": {
            "encoder": "intfloat/e5-base-v2",
            "decoder": "Qwen/Qwen3-0.6B",
            "model": None,
            "temperature": 0.05,
            "learning_rate": 1e-4,
            "seed": 1,
            "train_decoder": "lora",
            "train_encoder": "frozen",
            "matryoshka_dims": [16],
        },
        "plan": {
            "global_batch_size": 8,
            "datasets": [
                {
                    "name": "nli",
                    "path": "sentence-transformers/all-nli",
                    "rows": 1000,
                    "rows_per_epoch": 800,
                    "instructions": ["find similar"],
                    "license": "CC BY-SA 4.0",
                },
                {"name": "own", "path": "sub/own.jsonl", "rows": 10, "rows_per_epoch": 8, "instructions": ["a", "b"]},
            ],
        },
        "steps": 3,
        "final_loss": 1.5,
    }


@pytest.fixture(scope="session")
def complete_dir(tiny_model, run_facts, tmp_path_factory) -> Path:
    """The tiny model in three shards, with a card that lacks nothing."""
    folder = tmp_path_factory.mktemp("complete") / "model"
    tiny_model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    from training.card import write_card

    write_card(folder, run_facts, tiny_model, "tester/complete", licence="apache-2.0")
    return folder


SHARD = "60KB"  # of the tiny model, several
REFUSED = (ValueError, OSError)


def same(model, other) -> bool:
    return difference(model.encode(TEXTS), other.encode(TEXTS)) <= SAME


def weights_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*model*.s*")} | {path.name for path in folder.glob("adapter*")}


def change_weights(folder: Path, change) -> None:
    """Lets a function change the dict of a folder's tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, part: str | None = None, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model, in one file or in the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {name: tensor for file in sorted(names) for name, tensor in load_file(folder / file).items()}


def incomplete(folder: Path) -> list[str]:
    """What a folder that has a config.json lacks of a checkpoint."""
    from scripts.push_to_hub import weights_problems

    files = [path.relative_to(folder) for path in folder.iterdir()]
    needed = ("tokenizer.json", "tokenizer_config.json", "encoder_tokenizer/tokenizer.json", "processor_config.json")
    missing = [f"missing: {name}" for name in needed if not (folder / name).is_file()]
    return [*missing, *weights_problems(folder, files)]


@pytest.fixture(scope="session")
def bundled_dir() -> Path:
    """The repository's root. A checkpoint that is there in part fails; only one that is not there at all skips."""
    if not (ROOT / "config.json").exists():
        pytest.skip("the repository holds no checkpoint: config.json is missing")
    if found := incomplete(ROOT):
        pytest.fail(f"the repository's checkpoint is incomplete: {'; '.join(found)}")
    return ROOT


@pytest.fixture(scope="session")
def bundled_model(bundled_dir):
    """The one copy that all tests share: nothing may change it."""
    from modeling_causal2vec import Causal2VecModel

    return Causal2VecModel.from_pretrained(bundled_dir)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No connection leaves this process, and datasets are not cached in the home folder."""
    import datasets

    def refuse(self, address):
        raise AssertionError(f"tried to connect to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def data_dir(tmp_path):
    """What eval_mteb.py reads: two MTEB tasks and one of one's own."""
    from eval_packs import retrieval_configs, write_pack, write_sts

    folder = tmp_path / "data"
    write_sts(folder / "STS16", seed=1)
    write_pack(folder / "SciFact", retrieval_configs(2))
    write_sts(folder / "X-Mine", 3, {"name": "X-Mine", "type": "STS", "main_score": "spearman", "instruction": "Mine"})
    return folder


@pytest.fixture(scope="session")
def training_rows(tmp_path_factory):
    """A folder of two small datasets, and the data file that lists them."""
    folder = tmp_path_factory.mktemp("training_rows")
    for name, negatives in (("one", 2), ("two", 0)):
        rows = [
            {
                "query": f"{name} question {i}",
                "positive": f"the answer to {name} {i} is {i * 7}",
                "negatives": [f"a wrong answer {name} {i} {j}" for j in range(negatives)],
            }
            for i in range(40)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    entries = [
        {"name": "one", "path": "one.jsonl", "instructions": ["answer the question"]},
        {"name": "two", "path": "two.jsonl", "instructions": ["find similar", "find"], "symmetric": ["find similar"]},
    ]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def run(training_rows, backbone_dir, tmp_path):
    """Returns a function that runs train.py with small defaults and the given flags."""

    import train

    def run(*flags, output_dir=None):
        defaults = {
            "encoder": backbone_dir("bert"),
            "decoder": backbone_dir("llama"),
            "output_dir": str(output_dir or tmp_path / "run"),
            "data_file": str(training_rows / "data.json"),
            "data_dir": str(training_rows),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "warmup_steps": 1,
            "learning_rate": 1e-2,
            "lora_r": 4,
            "lora_alpha": 8,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps(defaults))
        return train.main([str(recipe), *map(str, flags)])

    return run


def facts(folder: Path) -> dict:
    """What a run leaves in training.json, beside its model or in it."""
    return json.loads((folder / "training.json").read_text())


def logged(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in facts(folder)["log"] if name in entry]


def losses(folder: Path) -> list[float]:
    return logged(folder, "loss")


@pytest.fixture
def two_runs(tmp_path):
    """`a` has three tasks of MTEB and two others; `b` shares two of the former and one of the latter."""
    from eval_packs import write_result

    a, b = tmp_path / "a", tmp_path / "b"
    write_result(a, "STS12", "STS", 0.5)
    write_result(a, "STS13", "STS", 0.7)
    write_result(a, "SciFact", "Retrieval", 0.3)
    write_result(a, "X-One", "Clustering", 0.1, in_benchmark=False)
    write_result(a, "X-Two", "STS", 0.2, in_benchmark=False)
    write_result(b, "STS12", "STS", 0.6)
    write_result(b, "SciFact", "Retrieval", 0.2)
    write_result(b, "BIOSSES", "STS", 0.9)
    write_result(b, "X-One", "Clustering", 0.15, in_benchmark=False)
    return a, b
