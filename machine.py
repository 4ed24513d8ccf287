"""This machine: its device and processes, its precision, its memory, its signals."""

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

PRECISIONS = ("auto", "fp32", "bf16")


def choose_device() -> str:
    """The device of this process: an accelerator ("cuda", "mps", "xpu") where there is one, else "cpu".

    Started by torchrun, this process becomes one of many that train together: it takes the accelerator of
    its number, and all but the first print nothing.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if "LOCAL_RANK" in os.environ and accelerator is not None and accelerator.type == "mps":
        accelerator = None  # nothing connects Apple's GPUs
    device = "cpu" if accelerator is None else accelerator.type
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if accelerator is not None:
            rank, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
            if rank >= count:
                raise ValueError(f"process {rank + 1} on this machine has no GPU; set --nproc-per-node {count}")
            torch.accelerator.set_device_index(rank)
        dist.init_process_group(timeout=timedelta(hours=6))  # others wait while one decodes a folder
        atexit.register(dist.destroy_process_group)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
    return device


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are: (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def bf16_is_native(device: str) -> bool:
    """Whether the device has instructions for bf16 (of processors, only x86 ones are asked): without them,
    bf16 can be ten times slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return device == "xpu"


def autocast(device: str, precision: str = "auto") -> torch.autocast:
    """The context in which networks run: "fp32", "bf16", or "auto", bf16 where the device has it.

    bf16 is a number of 16 bits with the range of a float32 and 8 bits of precision: half the bytes.
    Raises ValueError for another name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    bf16 = bf16_is_native(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device, torch.bfloat16, enabled=bf16)


@contextmanager
def hold_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C (or Jupyter's Stop), SIGTERM or SIGHUP only raises a flag.

    Yields a function that says whether one has come, so that a loop can finish its step, save, and stop.
    A second one acts as always. One that is ignored, as nohup does with SIGHUP, stays so. Outside the main
    thread, where Python cannot hold them, all act as always.
    """
    came, before = [], {}

    def release():
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: a handler that C code has set

    def note(*_):
        came.append(True)
        release()

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        release()


def memory_is_full(error: Exception) -> bool:
    """Whether an error says that a memory is full, the processor's or a GPU's."""
    said = ("out of memory", "out of device memory", "allocate memory", "not enough memory", "alloc failed",
            "allocation failed", "invalid buffer size")
    text = str(error).lower().replace("_", " ")
    return isinstance(error, MemoryError) or any(words in text for words in said)


@contextmanager
def enough_memory(name: str, at_once: int) -> Iterator[None]:
    """Within the block each error of a full memory, of the processor or a GPU, becomes one MemoryError
    that says which parameter to set below `at_once`, the images that the block takes at once; one image
    raises the error as it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        if not memory_is_full(error):
            raise
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the error, and that the block's tensors
        if at_once == 1:
            raise
        raise MemoryError(f"{at_once} images at once do not fit in the memory; set {name} below "
                          f"{at_once}") from error
