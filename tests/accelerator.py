"""An accelerator that this machine does not have: tensors that say they are on another device, with their numbers here.

with Accelerator() as accelerator:
    model.to(DEVICE)
    ...  # accelerator.waits: where the CPU waited for numbers of the device
"""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


DEVICE, CPU = torch.device("xla", 0), torch.device("cpu")  # of a kind that torch knows and takes no library
# What has to know numbers, or how many there are, before the CPU goes on; and what brings tensors here.
READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "repeat_interleave"}
FETCHES = {"cpu", "numpy", "tolist"}
PROPERTIES = {"__get__", "__set__", "_has_compatible_shallow_copy_type", "is_inference", "size"}


class OnDevice(torch.Tensor):
    """What functions make of such tensors is one too. With tensors of the CPU, but for single numbers, it does not mix."""

    @staticmethod
    def __new__(cls, here):
        kind = dict(strides=here.stride(), dtype=here.dtype, device=DEVICE)
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, **kind)

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in PROPERTIES:
            return super().__torch_function__(function, types, args, kwargs)
        return Accelerator.current.run(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} is not emulated")


class Accelerator(TorchFunctionMode):
    current = None

    def __enter__(self):
        Accelerator.current, self.waits, self.busy = self, [], False
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if device_asked_for(function, args, kwargs) == DEVICE and not on_device((args, kwargs)):
            return self.run(function, args, kwargs)
        return function(*args, **kwargs)

    def run(self, function, args, kwargs):
        """Calls a function on what the tensors hold here, and notes whether the CPU would have to wait for it."""
        name, away = function.__name__, on_device((args, kwargs))
        others = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not isinstance(t, OnDevice)]
        asked = device_asked_for(function, args, kwargs)
        fetched = name in FETCHES or asked == CPU
        copied = others and (not away or name in ("copy_", "__setitem__"))
        if fetched or (copied and self.busy):  # copies to a device that has nothing to do are waited for by nobody
            self.wait(name)
        elif not copied and name != "to":
            assert not [t for t in others if t.dim()], f"{name} of tensors on two devices"
        args, kwargs = tree_map(hold_here, (args, kwargs))
        with torch._C.DisableTorchFunction(), Reads(self):
            result = function(*args, **kwargs)
        if fetched:
            return result
        made = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        self.busy |= bool(away and on_device(made))
        return made

    def wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        places = (f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames[:-4:-1])
        self.waits.append(f"{what} in {' < '.join(places)}")
        self.busy = False


class Reads(TorchDispatchMode):
    """Sees what functions do inside, such as that `bool(mask.all())` reads a number."""

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            t.dtype == torch.bool for t in args[1] if isinstance(t, torch.Tensor)
        )
        if name in READS or by_mask:
            self.accelerator.wait(name)
        return function(*args, **(kwargs or {}))


def on_device(values) -> bool:
    return any(isinstance(leaf, OnDevice) for leaf in tree_leaves(values))


def hold_here(leaf):
    if isinstance(leaf, torch.device):
        return CPU
    return leaf.here if isinstance(leaf, OnDevice) else leaf


def device_asked_for(function, args, kwargs) -> torch.device | None:
    """The device that a copy goes to, or that a new tensor is made on."""
    device = kwargs.get("device")
    if device is None and function.__name__ == "to":
        places = (getattr(arg, "device", arg) for arg in args[1:])  # a device, or a tensor on one
        device = next((place for place in places if isinstance(place, torch.device)), None)
    return None if device is None else torch.device(device)
