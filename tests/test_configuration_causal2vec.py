"""configuration_causal2vec.py: what it holds, what it refuses and that it survives the way through JSON unchanged."""

import copy
import importlib.util
import json
import re
import sys
import tomllib

import pytest
import torch
from conftest import DECODERS, ENCODERS, ROOT, decoder_config, encoder_config
from huggingface_hub.errors import StrictDataclassFieldValidationError

from configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig


LENGTHS = dict(max_seq_length=100, icl_max_seq_length=200, encoder_max_seq_length=38)


def make_config(decoder="llama", encoder="bert", **kwargs) -> Causal2VecConfig:
    values = dict(encoder_config=encoder_config(encoder, 200), decoder_config=decoder_config(decoder, 300), **LENGTHS)
    return Causal2VecConfig(**{**values, **kwargs})


def everything_set() -> Causal2VecConfig:
    """No field at its default."""
    return Causal2VecConfig(
        encoder_config=encoder_config("bert", 200),
        decoder_config=decoder_config("mistral", 300),
        contextual_token_id=7,
        template_prefix="[INST] ",
        template_suffix=" [/INST]\n\u2603 \U0001f40d",
        text_prefix="query: ",
        query_instruction='Find "it" \\ ü',
        projector_hidden_size=48,
        projector_hidden_act="gelu_new",
        projector_bias=False,
        pooling="average",
        contextual_position="before_instruction",
        num_contextual_tokens=4,
        bidirectional=True,
        **LENGTHS,
    )


def assert_same_types(left, right, path="config"):
    assert type(left) is type(right), f"{path}: {left!r} is no {right!r}"
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same_types(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for position, values in enumerate(zip(left, right)):
            assert_same_types(*values, f"{path}[{position}]")
    else:
        assert left == right, path


class TestFields:
    def test_hidden_size_is_the_decoders(self):
        config = make_config()
        assert config.hidden_size == config.decoder_config.hidden_size == 32
        assert config.encoder_config.hidden_size == 24
        assert config.projector_hidden_size == 32

    def test_defaults_describe_a_model(self):
        config = Causal2VecConfig()
        assert (config.encoder_config.model_type, config.decoder_config.model_type) == ("bert", "llama")
        assert config.hidden_size == config.decoder_config.hidden_size

    @pytest.mark.parametrize("family", DECODERS)
    def test_any_decoder(self, family):
        assert make_config(decoder=family).hidden_size == 32

    @pytest.mark.parametrize("family", ENCODERS)
    def test_any_encoder(self, family):
        config = make_config(encoder=family)
        assert config.encoder_config.model_type == family
        assert config.get_text_config(encoder=True).hidden_size == 24

    def test_get_text_config_is_the_decoders(self):
        config = make_config()
        assert config.get_text_config() is config.decoder_config
        assert config.get_text_config(decoder=True) is config.decoder_config
        assert config.get_text_config(encoder=True) is config.encoder_config

    def test_templates_are_found_by_a_marker(self):
        assert PROMPT_TEMPLATES["inst"] == ("[INST]", "[INST] ", " [/INST]")
        assert PROMPT_TEMPLATES["chatml"] == ("<|im_start|>", "<|im_start|>user\n", "<|im_end|>")
        assert PROMPT_TEMPLATES["none"] == ("", "", "")
        for marker, template_prefix, _ in PROMPT_TEMPLATES.values():
            assert marker in template_prefix

    def test_the_longest_lengths_are_the_backbones(self):
        config = make_config(max_seq_length=512, icl_max_seq_length=512, encoder_max_seq_length=40)
        assert config.max_seq_length == config.decoder_config.max_position_embeddings
        assert make_config(max_seq_length=3, icl_max_seq_length=3, encoder_max_seq_length=3).max_seq_length == 3


class TestRoundTrip:
    def test_json_is_exact(self):
        config = everything_set()
        for text in (config.to_json_string(), config.to_json_string(use_diff=False)):
            values = json.loads(text)
            before = copy.deepcopy(values)
            again = Causal2VecConfig.from_dict(values)
            assert values == before, "an input was changed"
            assert again.to_json_string() == config.to_json_string()
            assert_same_types(again.to_dict(), config.to_dict())

    @pytest.mark.parametrize(
        "values, size", [({}, 64), ({"pooling": "eos"}, 32), ({"baseline": "embedding_concat"}, 56)]
    )
    def test_engines_read_the_size_of_an_embedding(self, tmp_path, values, size):
        make_config(**values).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["embedding_size"] == size == Causal2VecConfig.from_pretrained(tmp_path).embedding_size
        for wrong in (size + 1, str(size), 0):
            with pytest.raises(ValueError, match=f"`embedding_size` must be {size}, as the other fields say, got"):
                Causal2VecConfig.from_dict({**saved, "embedding_size": wrong})
        del saved["embedding_size"]  # of a folder that was saved without
        assert Causal2VecConfig.from_dict(saved).embedding_size == size

    def test_every_value_survives_a_folder(self, tmp_path):
        config = everything_set()
        config.save_pretrained(tmp_path / "a")
        again = Causal2VecConfig.from_pretrained(tmp_path / "a")
        again.save_pretrained(tmp_path / "b")
        assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()
        assert_same_types(again.to_dict(), config.to_dict())
        defaults = Causal2VecConfig()
        for name, value in json.loads((tmp_path / "a/config.json").read_text()).items():
            if name in Causal2VecConfig.__annotations__:
                assert type(getattr(again, name)) is type(getattr(config, name))
                told = name == "baseline"  # which excludes the others; see test_variants.py
                assert told or value != getattr(defaults, name), f"{name} is at its default and proves nothing"

    def test_the_saved_file_is_plain_json(self, tmp_path):
        everything_set().save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert saved["model_type"] == "causal2vec"
        assert saved["contextual_token_id"] == 7 and type(saved["contextual_token_id"]) is int
        assert saved["query_instruction"] == 'Find "it" \\ ü'
        assert saved["encoder_config"]["model_type"] == "bert"
        assert saved["decoder_config"]["sliding_window"] == 8
        assert saved["decoder_config"]["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}

    @pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
    def test_every_backbone(self, family, tmp_path):
        config = make_config(**({"decoder": family} if family in DECODERS else {"encoder": family}))
        config.save_pretrained(tmp_path)
        again = Causal2VecConfig.from_pretrained(tmp_path)
        assert_same_types(again.to_dict(), config.to_dict())
        assert type(again.encoder_config) is type(config.encoder_config)
        assert type(again.decoder_config) is type(config.decoder_config)

    def test_folders_of_one_machine_are_not_saved(self, tmp_path):
        encoder, decoder = encoder_config("bert", 200), decoder_config("llama", 300)
        encoder._name_or_path, decoder._name_or_path = str(tmp_path / "encoder"), "owner/decoder"
        Causal2VecConfig(encoder_config=encoder, decoder_config=decoder, **LENGTHS).save_pretrained(tmp_path / "a")
        Causal2VecConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        for name in ("a", "b"):
            saved = (tmp_path / name / "config.json").read_text()
            assert str(tmp_path) not in saved
            assert json.loads(saved)["decoder_config"]["_name_or_path"] == "owner/decoder"

    def test_dtype(self, tmp_path):
        make_config(dtype=torch.bfloat16).save_pretrained(tmp_path)
        assert Causal2VecConfig.from_pretrained(tmp_path).dtype is torch.bfloat16

    def test_a_deep_copy_is_equal_and_apart(self):
        config = everything_set()
        again = copy.deepcopy(config)
        assert again.to_dict() == config.to_dict()
        again.decoder_config.hidden_act = "relu"
        assert config.decoder_config.hidden_act == "silu"


WRONG_TYPES = [
    ("contextual_token_id", True),
    ("contextual_token_id", "3"),
    ("hidden_size", 32.0),
    ("template_prefix", None),
    ("template_suffix", 3),
    ("text_prefix", ["query: "]),
    ("query_instruction", b"Find"),
    ("max_seq_length", True),
    ("max_seq_length", None),
    ("icl_max_seq_length", "100"),
    ("encoder_max_seq_length", 5.0),
    ("projector_hidden_size", True),
    ("projector_hidden_act", 3),
    ("projector_bias", 1),
    ("num_contextual_tokens", 2.0),
    ("bidirectional", "yes"),
    ("encoder_config", "bert"),
    ("decoder_config", ["llama"]),
    ("pooling", "mean"),
    ("contextual_position", "last"),
    ("baseline", "echo"),
]

# field, value, what the message must hold besides the field's name: what came, and what would work
IMPOSSIBLE_VALUES = [
    ("hidden_size", 33, ["33", "32"]),
    ("contextual_token_id", -1, ["-1", "0 to 299"]),
    ("contextual_token_id", 300, ["300", "0 to 299", "resize_token_embeddings"]),
    ("max_seq_length", -1, ["at least 3", "-1"]),
    ("max_seq_length", 513, ["at most 512", "llama", "513"]),
    ("icl_max_seq_length", 0, ["at least 3"]),
    ("icl_max_seq_length", 513, ["at most 512", "llama", "513"]),
    ("encoder_max_seq_length", 0, ["at least 3"]),
    ("encoder_max_seq_length", 41, ["at most 40", "bert", "41"]),
    ("projector_hidden_size", 0, ["at least 1"]),
    ("projector_hidden_act", "gelo", ["gelo", "'gelu'"]),
    ("encoder_config", {"hidden_size": 24}, ["model_type", "hidden_size"]),
    ("encoder_config", {"model_type": "nope"}, ["nope", "bert"]),
    ("decoder_config", {"model_type": "nope"}, ["nope", "llama"]),
    ("decoder_config", {"model_type": "causal2vec"}, ["causal2vec", "llama"]),
    ("decoder_config", {"model_type": "t5"}, ["t5", "encoder-decoder"]),
    ("encoder_config", {"model_type": "bart"}, ["bart", "encoder-decoder"]),
    ("decoder_config", {"model_type": "llama", "vocab_size": 0}, ["`vocab_size`", "positive integer", "0"]),
    ("encoder_config", {"model_type": "bert", "hidden_size": -4}, ["`hidden_size`", "positive integer", "-4"]),
    ("decoder_config", {"model_type": "llama", "num_hidden_layers": -1}, ["`num_hidden_layers`", "-1"]),
    ("num_contextual_tokens", 0, ["at least 1"]),
]


class TestRefusedValues:
    @pytest.mark.parametrize("name, value", WRONG_TYPES, ids=lambda value: repr(value))
    def test_wrong_types(self, name, value):
        with pytest.raises(StrictDataclassFieldValidationError) as error:
            make_config(**{name: value})
        assert f"'{name}'" in str(error.value)
        assert type(value).__name__ in str(error.value) or repr(value).strip("'") in str(error.value)

    @pytest.mark.parametrize("name, value, parts", IMPOSSIBLE_VALUES, ids=lambda value: repr(value)[:40])
    def test_impossible_values(self, name, value, parts):
        with pytest.raises(ValueError) as error:
            make_config(**{name: value})
        for part in (f"`{name}`", *parts):
            assert part in str(error.value)

    def test_a_wrong_value_in_a_file_is_refused_too(self, tmp_path):
        config = make_config()
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        for name, value, error in (
            ("contextual_token_id", 300, ValueError),
            ("contextual_token_id", "3", StrictDataclassFieldValidationError),
            ("hidden_size", 33, ValueError),
            ("projector_bias", 1, StrictDataclassFieldValidationError),
        ):
            (tmp_path / "config.json").write_text(json.dumps({**saved, name: value}))
            with pytest.raises(error, match=name):
                Causal2VecConfig.from_pretrained(tmp_path)

    def test_attention_may_not_come_through_the_back_door(self, tmp_path):
        config = make_config()
        with pytest.raises(ValueError, match="_attn_implementation_internal"):
            make_config(_attn_implementation_internal="someone/kernel")
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**saved, "_attn_implementation_internal": "someone/kernel"}))
        with pytest.raises(ValueError, match="_attn_implementation_internal"):
            Causal2VecConfig.from_pretrained(tmp_path)
        for part in ("encoder_config", "decoder_config"):
            nested = {**saved, part: {**saved[part], "_attn_implementation_internal": "someone/kernel"}}
            (tmp_path / "config.json").write_text(json.dumps(nested))
            with pytest.raises(ValueError, match=f"_attn_implementation_internal.*{part}"):
                Causal2VecConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["text_prefx", "poolings", "max_length"])
    def test_a_field_that_does_not_exist(self, name, caplog):
        config = make_config(**{name: "query: "})
        assert f"has no ['{name}']" in caplog.text and "'text_prefix'" in caplog.text
        assert not hasattr(config, name)

    def test_what_transformers_passes_is_no_stranger(self, tmp_path, caplog):
        make_config(attn_implementation="eager", name_or_path="a/b", output_attentions=False).save_pretrained(tmp_path)
        Causal2VecConfig.from_pretrained(tmp_path, attn_implementation="eager", dtype="bfloat16")
        assert "has no" not in caplog.text


class TestInputsAreNotMutated:
    def test_sub_configurations(self):
        encoder, decoder = encoder_config("bert", 200), decoder_config("llama", 300)
        encoder._attn_implementation, decoder._attn_implementation = "eager", "sdpa"
        encoder.dtype = torch.bfloat16
        before = copy.deepcopy((encoder.__dict__, decoder.__dict__))
        config = Causal2VecConfig(encoder_config=encoder, decoder_config=decoder, **LENGTHS)
        config.decoder_config.hidden_act = "relu"
        assert (encoder.__dict__, decoder.__dict__) == before

    @pytest.mark.parametrize("as_file", [False, True])
    def test_dicts(self, as_file):
        values = dict(
            encoder_config={"model_type": "bert", "max_position_embeddings": 512},
            decoder_config={
                "model_type": "llama",
                "vocab_size": 100,
                "rope_parameters": {"rope_theta": 5.0},  # a nested dict that Llama's configuration completes
            },
        )
        before = copy.deepcopy(values)
        config = Causal2VecConfig.from_dict(values) if as_file else Causal2VecConfig(**values)
        assert config.decoder_config.rope_parameters["rope_type"] == "default"
        assert values == before

    def test_two_configurations_share_nothing(self):
        encoder, decoder = encoder_config("bert", 200), decoder_config("llama", 300)
        one, two = (Causal2VecConfig(encoder_config=encoder, decoder_config=decoder, **LENGTHS) for _ in range(2))
        one._attn_implementation = "eager"
        assert two.decoder_config._attn_implementation is None


@pytest.mark.parametrize(
    "package, version, oldest",
    [
        ("transformers", "5.16.2", "5.17"),
        ("transformers", "6.0.0.dev0", None),
        ("torch", "2.10.0+cpu", "2.11"),
        ("torch", "1.13.1", "2.11"),
        ("torch", "3.0.0a0+git1234", None),
    ],
)
def test_only_older_packages_are_refused(monkeypatch, package, version, oldest):
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    spec = importlib.util.spec_from_file_location("again", ROOT / "configuration_causal2vec.py")
    module = importlib.util.module_from_spec(spec)
    if oldest is None:
        spec.loader.exec_module(module)
        assert module.Causal2VecConfig.model_type == Causal2VecConfig.model_type
        return
    with pytest.raises(ImportError, match=rf"{package} {oldest}.*{re.escape(version)}"):
        spec.loader.exec_module(module)


def test_the_oldest_packages_are_the_same_everywhere(saved_dir):
    """In the error, the requirements, the cards and what CI installs."""
    code = (ROOT / "configuration_causal2vec.py").read_text()
    told = {
        "requirements": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"],
        "CI": (ROOT / "Makefile").read_text(),
        "README": (ROOT / "README.md").read_text(),
        "card": (saved_dir / "README.md").read_text(),
    }
    for package, oldest in (("torch", "2.11"), ("transformers", "5.17")):
        assert f"needs {package} {oldest} or newer" in code
        assert any(line.startswith(f"{package}>={oldest}") for line in told["requirements"])
        assert f"{package}=={oldest}.0" in told["CI"]
        assert f'"{package}>={oldest}"' in told["README"] and f"`{package}` {oldest}" in told["card"]
