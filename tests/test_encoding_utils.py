"""encoding_utils.py: `encode`, its batches, and how often it waits for an accelerator."""

import numpy as np
import pytest
import torch
from accelerator import DEVICE, Accelerator, OnDevice
from conftest import TEXTS

import prefix_cache


INSTRUCTION = "Given a question, retrieve passages that answer it"


class TestWaits:
    """For an accelerator, to which a CPU hands work ahead: see accelerator.py."""

    @pytest.fixture
    def accelerator(self, monkeypatch):
        monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # it has no tensors of other kinds
        monkeypatch.setattr(prefix_cache, "PLAIN", (*prefix_cache.PLAIN, OnDevice))
        with torch.no_grad(), Accelerator() as accelerator:
            yield accelerator

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("decoder, dtype", [("llama", None), ("mistral", None), ("gemma3", "bfloat16")])
    def test_two_a_batch(self, make_model, accelerator, decoder, dtype, shared):
        """For the vectors, and for whether the encoder's mask hides anything, which transformers asks."""
        model = make_model(decoder, dtype=dtype)
        model.prefix_cache.max_bytes *= shared
        expected = model.encode(TEXTS * 3, instruction=INSTRUCTION, batch_size=2, packed=False)
        model.to(DEVICE)
        for _ in ("cold", "warm"):
            accelerator.waits.clear()
            vectors = model.encode(TEXTS * 3, instruction=INSTRUCTION, batch_size=2)
            assert np.abs(vectors - expected).max() <= (1e-5 if dtype is None else 0.02)
        assert (model.prefix_cache.hits > 0) == shared
        once = int(shared)  # for some numbers of the weights
        assert 9 < len(accelerator.waits) <= 9 * 2 + once, accelerator.waits

    @pytest.mark.parametrize(
        "wait",
        [
            lambda states: states.sum().item(),
            lambda states: bool((states > 9).any()),
            lambda states: states[states > 9],
            lambda states: states.nonzero(),
            lambda states: states.cpu(),
            lambda states: states.tolist(),
            lambda states: states + torch.ones(1).to(DEVICE),
        ],
        ids=["item", "bool", "mask", "nonzero", "cpu", "tolist", "copy"],
    )
    def test_one_more_is_seen(self, make_model, accelerator, wait):
        model = make_model().to(DEVICE)
        for expected in (2, 3):
            accelerator.waits.clear()
            model.encode(TEXTS)
            assert len(accelerator.waits) == expected
            model.projector.register_forward_hook(lambda module, inputs, output: [wait(output), None][1])

    @pytest.mark.parametrize("packed", [False, True])
    def test_towers_on_two_devices(self, make_model, accelerator, packed):
        """Each tower's inputs are brought to it, as with a `device_map`."""
        hooks = pytest.importorskip("accelerate.hooks")
        expected = make_model().encode(TEXTS, instruction=INSTRUCTION)
        for parts in (["decoder"], ["decoder", "projector"], ["encoder"], ["encoder", "projector"]):
            model = make_model()
            for part in ("encoder", "projector", "decoder"):
                device = DEVICE if part in parts else torch.device("cpu")
                hooks.add_hook_to_module(getattr(model, part).to(device), hooks.AlignDevicesHook(device))
            for _ in ("cold", "warm"):
                vectors = model.encode(TEXTS, instruction=INSTRUCTION, packed=packed)
                assert np.abs(vectors - expected).max() <= 1e-5
            assert accelerator.waits
