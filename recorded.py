"""A function of tensors made fast on a GPU: compiled, or recorded once as a CUDA graph and replayed, so that
a thousand launches become one."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from machine import memory_is_full

Function = Callable[..., Tensor]  # of tensors, or None, of always the same shapes


def compiled(loss_of: Function, *batch: Tensor | None) -> Function:
    """The loss by torch.compile, or the loss as it is, with a line that says why, where that fails.

    It is tried on a batch, forwards and backwards, since both are compiled when they are first needed. The
    parameters keep the gradients of this. Raises the error of a full memory.
    """
    quick = torch.compile(loss_of, dynamic=False)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):  # the trial draws none of a step's numbers
            quick(*batch).backward()
        return quick
    except Exception as error:  # no compiler for this GPU or system, for instance
        if memory_is_full(error):
            raise
        print(f"not compiled, which is slower: {' '.join(str(error).splitlines()[:2])}")
    gc.collect()  # the error is in a cycle, and holds what the trial held
    return loss_of


def recorded(function: Function, plain_calls: int = 3) -> Function:
    """The function, which from its call number plain_calls + 1 on is a CUDA graph.

    The first calls are plain, after which all that is made once is made (an optimizer's state, the choice of
    an algorithm). What cannot be recorded stays plain, with a line that says why.
    """
    side, calls, replay = torch.cuda.Stream(), 0, None

    def run(*given: Tensor | None) -> Tensor:
        nonlocal calls, replay
        calls += 1
        if calls <= plain_calls:  # on a stream of their own, as torch.cuda.graph asks
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = function(*given)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if replay is None:
            try:
                replay = record(function, *given)
            except RuntimeError as error:
                print(f"not recorded as a CUDA graph, which is slower: {str(error).splitlines()[0]}")
                replay = function
        return replay(*given)
    return run


def record(function: Function, *given: Tensor | None) -> Function:
    """Records one call; returns the function that copies other tensors into its place and replays it."""
    inputs = [x if x is None else x.clone() for x in given]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph), uncached_autocast():
            result = function(*inputs)
    finally:
        torch.cuda.set_stream(stream)  # where recording fails, torch.cuda.graph leaves its own

    def replay(*given: Tensor | None) -> Tensor:
        for mine, one in zip(inputs, given):
            if one is not None:
                mine.copy_(one)
        graph.replay()
        return result.clone()
    return replay


def uncached_autocast() -> torch.autocast:
    """Today's autocast without its cache of cast weights, which a graph would outlive."""
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"),
                          cache_enabled=False)
