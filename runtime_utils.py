"""Where and how a model runs: devices, half precision on CPUs, training modes, threads and forks."""

import math
import os
import threading
import time
import weakref
from contextlib import contextmanager
from functools import cache
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

SLOW = 2  # times as long as in float32; less may be chance

_LOCKS: weakref.WeakSet["ForkSafeLock"] = weakref.WeakSet()


class ForkSafeLock:
    """
    A lock that a forked child finds released, since the thread that held it does not exist there. With `delays_forks`,
    forks wait until the lock is released. Copying or unpickling gives a new lock.
    """

    def __init__(self, delays_forks: bool = False):
        self.delays_forks = delays_forks
        self.renew()
        _LOCKS.add(self)

    def renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error) -> None:
        self._lock.release()

    def __reduce__(self):
        return type(self), ()


def _before_fork() -> None:
    for lock in list(_LOCKS):
        if lock.delays_forks:
            lock.__enter__()


def _after_fork() -> None:
    for lock in list(_LOCKS):
        if lock.delays_forks:
            lock.__exit__()


def _renew_locks() -> None:
    for lock in list(_LOCKS):
        lock.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_renew_locks)

# Held while tokenizers run: a child forked meanwhile would find their internal locks closed forever.
TOKENIZING = ForkSafeLock(delays_forks=True)


class EvalMode(ForkSafeLock):
    """
    `with eval_mode(model):` keeps a model in eval mode while any thread is inside. The last thread to leave restores
    the modules that were in training mode.
    """

    def __init__(self):
        self._threads, self._training = 0, []
        super().__init__()

    @contextmanager
    def __call__(self, model: PreTrainedModel):
        with self:
            training = [module for module in model.prefix_cache.scan(model).modules if module.training]
            if training:
                self._training += training
                model.eval()
            self._threads += 1
        try:
            yield
        finally:
            with self:
                self._threads -= 1
                if self._threads == 0:
                    self._restore()

    def renew(self) -> None:
        super().renew()
        self._threads = 0
        self._restore()

    def _restore(self) -> None:
        while self._training:
            self._training.pop().training = True


def device_of(module: nn.Module) -> torch.device:
    """
    The device that a module computes on: the execution device of accelerate's hooks, else that of its first tensor,
    else the CPU. The weights' own device is not enough: they may be offloaded or quantised.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):  # several are kept in one
            if getattr(single, "execution_device", None) is not None:
                return torch.device(single.execution_device)
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def default_device() -> torch.device:
    """The accelerator of this machine, of any kind, or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@cache
def half_precision_cost(dtype: torch.dtype) -> float:
    """The time of a matrix product on this CPU relative to float32, measured once in a few milliseconds."""
    seconds = dict.fromkeys((torch.float32, dtype), math.inf)
    with torch.autocast("cpu", enabled=False):
        for _ in range(4):
            for kind in seconds:
                matrix = torch.ones(256, 256, dtype=kind, device="cpu")
                start = time.perf_counter()
                matrix @ matrix
                seconds[kind] = min(seconds[kind], time.perf_counter() - start)
    return seconds[dtype] / seconds[torch.float32]


def has_fast_bfloat16() -> bool:
    """
    Whether this CPU multiplies in bfloat16 about as fast as in float32; without hardware support it is far slower.
    """
    return half_precision_cost(torch.bfloat16) <= SLOW


def warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Warns once if a model on the CPU computes in a half precision that is slower than float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.dtype
    if dtype in (torch.bfloat16, torch.float16) and half_precision_cost(dtype) > SLOW:
        logger.warning_once(
            f"{dtype} is slow on this processor: a matrix product took {half_precision_cost(dtype):.1f} times as long as "
            'in float32. Load the model with dtype="float32", and without autocast.'
        )
