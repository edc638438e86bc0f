"""Tensors on a pretended GPU: each operation is looked at, and then done on the CPU."""

import torch
from pretended import waits
from pretended_kernels import KERNELS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_WAITING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPYING = {"aten::_to_copy", "aten::copy_"}


class OnGPU(torch.Tensor):
    """Has no memory of its own: `_inner`, on the CPU, has."""

    @staticmethod
    def __new__(cls, inner, device, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=requires_grad,
        )  # fmt: skip
        made._inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *_, **__):
        return f"OnGPU({self._inner})"

    def data_ptr(self):
        return self._inner.data_ptr()

    def untyped_storage(self):
        return self._inner.untyped_storage()

    def storage(self):
        return self._inner.storage()

    def pin_memory(self, *_):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")

    __array__ = numpy

    def record_stream(self, _):
        pass  # nothing is freed while a stream uses it

    def tolist(self):
        waits("tolist")
        return self._inner.tolist()


class Everywhere(TorchDispatchMode):
    """So that tensors are made on a GPU, and brought there. Sees those too that are no `OnGPU`: a parameter whose
    `data` was set to one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def is_on_gpu(x):
    return isinstance(x, torch.Tensor) and "_inner" in getattr(x, "__dict__", {})


def dispatch(func, args, kwargs):
    """An operation of torch's, and what a GPU would have to say about it."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if is_on_gpu(x)]
    asked = kwargs.get("device")
    where = _indexed(torch.device(asked)) if asked is not None else (ours[0].device if ours else torch.device("cpu"))
    if name in _COPYING:
        where = _look_at_copy(name, args, kwargs, where)
    elif ours:
        _look_at_operands(func, name, args, tensors)
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    result = KERNELS.get(name, func)(*inner_args, **inner_kwargs)
    if name == "aten::_to_copy" and result is inner_args[0]:
        result = result.clone()
    wrapped = {id(x._inner): x for x in ours}  # what was changed in place comes back as it was given

    def wrap(x):
        if not isinstance(x, torch.Tensor) or is_on_gpu(x):
            return x
        return wrapped[id(x)] if id(x) in wrapped else OnGPU(x, where) if where.type == "cuda" else x

    return tree_map(wrap, result)


def _inner(x):
    return x._inner if is_on_gpu(x) else x


def _indexed(device):
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _look_at_copy(name, args, kwargs, where):
    """Between devices the host waits, unless told not to; to a GPU also from memory that is not pinned. Returns where
    the copy will be."""
    source, goes_on = args[0], kwargs.get("non_blocking")
    if name == "aten::copy_":
        where, source, goes_on = args[0].device, args[1], goes_on or any(args[2:])
    may_go_on = is_on_gpu(source) or getattr(source, "_is_pinned_here", False)
    if source.device.type != where.type and not (goes_on and may_go_on):
        waits("copy to the host" if is_on_gpu(source) else "copy to the GPU")
    return where


def _look_at_operands(func, name, args, tensors):
    if name in _INDEXING:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            waits("indexing by a mask")
        if not all(map(is_on_gpu, indices)):
            waits("indexing from the host")
        tensors = [x for x in tensors if not any(x is index for index in indices)]
    devices = {x.device for x in tensors if x.ndim or is_on_gpu(x)}  # a number may come from the host
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {named} ({func})")
    if name in _WAITING:
        waits(name)


def accept_anywhere():
    """What Python does with tensors without torch's dispatcher: `data`, parameters, copies, pinned memory."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made here, and brought there
    torch._has_compatible_shallow_copy_type = lambda *_: True
    Tensor, plain = torch.Tensor, torch._C.TensorBase.data
    make_subclass, deepcopy, empty = Tensor._make_subclass, Tensor.__deepcopy__, torch.empty

    def get_data(self):
        return OnGPU(self._inner.detach(), self.device) if is_on_gpu(self) else plain.__get__(self)

    def set_data(self, value):
        plain.__set__(self, value)
        if is_on_gpu(value):
            self._inner = value._inner
        elif is_on_gpu(self):
            del self._inner

    def make(cls, data, *arguments, **named):
        if not is_on_gpu(data):
            return make_subclass(cls, data, *arguments, **named)
        made = make_subclass(cls, data._inner.detach(), *arguments, **named)
        set_data(made, data)
        return made

    def copied(self, memo):
        if not is_on_gpu(self):
            return deepcopy(self, memo)
        made = OnGPU(self._inner.detach().clone(), self.device, self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made._is_param = True
        memo[id(self)] = made
        return made

    def pinned(self, *_):
        copy = self.clone()
        copy._is_pinned_here = True
        return copy

    def made_empty(*arguments, pin_memory=False, **named):
        made = empty(*arguments, **named)
        if pin_memory:
            made._is_pinned_here = True
        return made

    Tensor.data, Tensor._make_subclass, Tensor.__deepcopy__ = property(get_data, set_data), staticmethod(make), copied
    Tensor.pin_memory, Tensor.is_pinned = pinned, lambda self, *_: getattr(self, "_is_pinned_here", False)
    torch.empty = made_empty
