"""GPUs that are none: tensors that say they are on `cuda` and are computed on the CPU, by torch's own dispatcher.

It refuses what CUDA refuses (operands on two devices, pinning or reading from Python what lies on a GPU), and writes
down what waits for a GPU, with who asked for it: for tests of what runs where. It says nothing about kernels, memory or
speed.
"""

import atexit
import collections
import contextlib
import ctypes
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

ENGINE = "LLMTRAIN_PRETENDED_ENGINE"
"""Variable: engine.cpp, compiled."""
WAITS = "LLMTRAIN_PRETENDED_WAITS"
"""Variable: the folder for what waited, a file for each process."""
_waits = collections.Counter()


@contextlib.contextmanager
def importing(name):
    """Around the import of torch: then it has GPUs. Of bitsandbytes: it would look for its library for CUDA."""
    if name == "torch":
        engine = ctypes.CDLL(os.environ[ENGINE], mode=ctypes.RTLD_GLOBAL)
        yield
        _give_gpus(engine)
        return
    import torch

    there, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = there


def num_gpus():
    return len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))


def waits(what):
    """Write down that the host waits for a GPU here."""
    frame = sys._getframe(1)
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    caller = "" if frame is None else f"{Path(frame.f_code.co_filename).name} {_function(frame)}"
    heartbeat = sys.modules.get("llmtrain.heartbeat")
    phase = "" if heartbeat is None else heartbeat._heart.phase
    thread = threading.current_thread().name
    _waits[thread, phase, what, caller] += 1


def _function(frame):
    """Its name; of a comprehension the one around it."""
    while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name


def _is_ours(path):
    return f"{os.sep}llmtrain{os.sep}" in path and "site-packages" not in path and "pretended" not in path


def _report():
    if folder := os.environ.get(WAITS):
        named = [
            {"thread": thread, "phase": phase, "what": what, "caller": caller, "times": times}
            for (thread, phase, what, caller), times in _waits.items()
        ]
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(named))
        _waits.clear()


def _give_gpus(engine):
    import torch
    import torch._dynamo  # it compares signatures with what it expects to find: before they change
    from pretended_tensors import Everywhere, accept_anywhere

    _pretend_cuda(torch, engine)
    accept_anywhere()
    _pretend_nccl()
    Everywhere().__enter__()  # for as long as the process lives
    run = threading.Thread.run

    def run_with_gpus(thread):
        with Everywhere():  # torch's modes belong to a thread
            run(thread)

    threading.Thread.run = run_with_gpus
    atexit.register(_report)
    execv = os.execv

    def report_and_execv(*arguments):
        _report()
        execv(*arguments)

    os.execv = report_and_execv


def _pretend_nccl():
    """Several GPUs: gloo moves what NCCL would."""
    import torch.distributed as dist

    start = dist.init_process_group

    def init_process_group(backend=None, *arguments, device_id=None, **named):
        return start("gloo" if backend == "nccl" else backend, *arguments, **named)

    dist.init_process_group = init_process_group


def _pretend_cuda(torch, engine):
    """torch.cuda, as far as it is asked."""
    cuda, size = torch.cuda, 80 * 10**9
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", uuid="0", total_memory=size, major=9, minor=0, multi_processor_count=132,
        warp_size=32,
    )  # fmt: skip

    def current_device():
        return engine.current_gpu()

    def set_device(device):
        index = device if isinstance(device, int) else torch.device(device).index
        if index is not None:
            if not 0 <= index < num_gpus():
                raise RuntimeError("CUDA error: invalid device ordinal")
            engine.set_current_gpu(index)

    answers = {
        "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "is_current_stream_capturing": False,
        "device_count": num_gpus(), "get_device_capability": (9, 0), "get_device_name": properties.name,
        "get_device_properties": properties, "get_arch_list": ["sm_80", "sm_90"], "is_bf16_supported": True,
        "max_memory_allocated": 10**9, "memory_allocated": 10**9, "memory_reserved": 10**9, "memory_stats": {},
        "max_memory_reserved": 10**9, "mem_get_info": (size, size),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)  # one for each: torch's compiler knows them by it
    for name in ("init", "_lazy_init", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.current_device, cuda.set_device = current_device, set_device
    cuda.synchronize = lambda *_: waits("torch.cuda.synchronize")
    cuda.Stream, cuda.Event = _Stream, _Event

    class Generator(torch.Generator):
        """Of a GPU: one for CPUs."""

        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    torch.Generator = Generator
    cuda.current_stream, cuda.default_stream = lambda *_: _Stream(), lambda *_: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.get_rng_state = lambda *_: torch.default_generator.get_state()
    cuda.set_rng_state = lambda state, *_: torch.default_generator.set_state(state)
    cuda.nvtx._nvtx = SimpleNamespace(rangePushA=lambda _: 0, rangePop=lambda: 0, markA=lambda _: 0)
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda _: 0


class _Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _):
        pass

    def wait_event(self, _):
        pass

    def synchronize(self):
        waits("stream.synchronize")


class _Event:
    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        pass

    def wait(self, *_):
        pass

    def query(self):
        return True

    def synchronize(self):
        waits("event.synchronize")

    def elapsed_time(self, _):
        return 1.0
