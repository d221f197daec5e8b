"""runtime_utils.py: devices, slow dtypes, training modes, threads, forks and other processes."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from conftest import FP32_BOUND, SAME, TEXTS, difference

import decoder_utils
import runtime_utils
from benchmarks import encode
from evaluation.identity import load_backend, locate
from modeling_causal2vec import Causal2VecModel
from runtime_utils import default_device, half_precision_cost, has_fast_bfloat16
from serving.loading import load_model


def test_scripts_use_the_accelerator_whatever_its_kind(saved_dir, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert default_device() == load_backend(locate(str(saved_dir))).model.device == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    searched = load_model(str(saved_dir))
    assert searched.device == load_backend(locate(str(saved_dir))).model.device == torch.device("meta")
    assert encode.parse_arguments([]).device == "meta"


class TestSlowDtypes:
    @pytest.mark.parametrize("how", ["dtype", "autocast"])
    def test_a_slow_dtype_is_told_once(self, bf16_dir, saved_dir, monkeypatch, caplog, how):
        cost = {"dtype": 98.7, "autocast": 87.6}[how]  # a message of its own
        monkeypatch.setattr(runtime_utils, "half_precision_cost", lambda dtype: cost)
        model = Causal2VecModel.from_pretrained(bf16_dir if how == "dtype" else saved_dir)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
                model.encode(TEXTS, truncation="silent")
        assert caplog.text.count(f"{cost} times") == 1 and "float32" in caplog.text

    def test_neither_a_fast_dtype_nor_float32_is_told(self, bf16_dir, saved_dir, monkeypatch, caplog):
        for folder, cost in ((bf16_dir, 0.5), (saved_dir, 76.5)):
            monkeypatch.setattr(runtime_utils, "half_precision_cost", lambda dtype, cost=cost: cost)
            Causal2VecModel.from_pretrained(folder).encode(TEXTS, truncation="silent")
        assert "times" not in caplog.text

    def test_the_cost_is_measured_in_the_dtype_that_is_asked_for(self, monkeypatch):
        seen = []
        multiply = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(multiply(a, b).dtype) or a)
        with torch.autocast("cpu", dtype=torch.float16):
            assert half_precision_cost.__wrapped__(torch.bfloat16) > 0
        assert set(seen) == {torch.float32, torch.bfloat16}
        assert has_fast_bfloat16() is (half_precision_cost(torch.bfloat16) <= 1)


class TestEvalMode:
    def test_modes_are_restored(self, make_model):
        model = make_model()
        assert not model.training
        expected = model.encode(TEXTS)
        assert not model.training
        model.train()
        model.encoder.eval()  # as for a frozen encoder
        modes = {name: module.training for name, module in model.named_modules()}
        assert difference(model.encode(TEXTS), expected) <= SAME, "dropout was on"
        assert {name: module.training for name, module in model.named_modules()} == modes
        with pytest.raises(ValueError):
            model.encode(TEXTS, max_length=3)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert model.training and model.decoder.training and not model.encoder.training

    def test_threads_and_training_mode(self, make_model):
        """The first to come is the first to leave, while the other has yet to read its texts."""
        model = make_model().eval()
        expected = model.encode(TEXTS[0])
        model.train()
        modes = {name: module.training for name, module in model.named_modules()}
        second_is_in, first_is_out, vectors = threading.Event(), threading.Event(), {}

        def wait(*_):
            if threading.current_thread().name == "first":
                second.start()
                assert second_is_in.wait(60)
            else:
                second_is_in.set()
                assert first_is_out.wait(60)

        def encode():
            vectors[threading.current_thread().name] = model.encode(TEXTS[0])

        hook = model.encoder.register_forward_pre_hook(wait)
        first, second = (threading.Thread(target=encode, name=name, daemon=True) for name in ("first", "second"))
        first.start()
        first.join()
        assert not model.training, "the second is not done"
        hook.remove()
        first_is_out.set()
        second.join()
        for name in ("first", "second"):
            assert difference(vectors[name], expected) <= SAME, name
        assert {name: module.training for name, module in model.named_modules()} == modes


class EncodingDataset(torch.utils.data.Dataset):
    def __init__(self, model, texts):
        self.model, self.texts = model, texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return self.model.encode(self.texts[i])


def encode_and_send(pickled: bytes, texts: list[str], connection) -> None:
    connection.send(pickle.loads(pickled).encode(texts, batch_size=4))


class TestProcesses:
    def test_copies(self, tiny_model):
        expected = tiny_model.encode(TEXTS, instruction="Find it")
        for other in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
            assert difference(other.encode(TEXTS, instruction="Find it"), expected) <= SAME
            with torch.no_grad():
                other.projector.linear_1.weight.zero_()
        assert difference(tiny_model.encode(TEXTS, instruction="Find it"), expected) <= SAME, "a copy shares weights"

    def test_a_data_loaders_worker(self, tiny_model):
        loader = torch.utils.data.DataLoader(EncodingDataset(tiny_model, TEXTS), batch_size=3, num_workers=1)
        vectors = torch.cat(list(loader))
        assert difference(vectors, tiny_model.encode(TEXTS)) <= FP32_BOUND

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_process_forked_while_a_thread_encodes(self, make_model):
        model = make_model()
        expected = model.encode(TEXTS, instruction="Find it")
        model.train()
        locked, forked = threading.Event(), threading.Event()

        def hold_all():
            with model._eval_mode(model), decoder_utils._SWITCHING, model.prefix_cache._lock, model._counting:
                locked.set()
                forked.wait(60)

        thread = threading.Thread(target=hold_all, daemon=True)
        thread.start()
        assert locked.wait(60) and not model.training
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that waits for ever
            right = model.training
            for _ in range(2):
                right &= difference(model.encode(TEXTS, instruction="Find it", packed=True), expected) <= FP32_BOUND
            os._exit(0 if right and model.training else 1)
        forked.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0 and model.training

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_no_fork_while_a_tokenizer_works(self, tiny_model):
        """A tokenizer's own locks would stay closed in the child."""
        working, order = threading.Event(), []

        def tokenize():
            with runtime_utils.TOKENIZING:
                working.set()
                time.sleep(0.2)
                order.append("tokenized")

        thread = threading.Thread(target=tokenize)
        thread.start()
        assert working.wait(60)
        child = os.fork()
        order.append("forked")
        if child == 0:
            signal.alarm(60)  # ends a child that waits for ever
            os._exit(0 if len(tiny_model.processor("hi")["input_ids"]) == 1 else 1)
        thread.join()
        assert os.waitpid(child, 0)[1] == 0 and order == ["tokenized", "forked"]
        tiny_model.processor("hi")

    def test_a_spawned_process(self, tiny_model):
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=encode_and_send, args=(pickle.dumps(tiny_model), TEXTS, sender))
        process.start()
        sender.close()
        try:
            vectors = receiver.recv()
        finally:
            process.join()
        assert process.exitcode == 0
        assert difference(vectors, tiny_model.encode(TEXTS)) <= FP32_BOUND
