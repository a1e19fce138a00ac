"""Threads that stay in compiled code: claims of work, barriers between phases, and a place to park.

A decode step of a small model is some hundred phases of a few microseconds. A thread pool that
wakes its threads for each of them spends its time waking; so here the threads enter a step
together, share out each phase by a counter and wait for each other at its end, spinning. A thread
that waits long sleeps, so a machine with other busy programs is slowed, not stopped; and two
threads that the system put on one core part again, for a thread that wakes is placed on an idle
core, while one that yields stays (steps took 20 ms instead of 6 then). Between steps the threads
sleep as well, outside of Python: waking needs no interpreter lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numpy.typing import NDArray

from segue_cloud.engine.compiled import intrinsic

# Numbers of `control`. Each counter has a cache line of its own, or they would slow each other.
GENERATION, STOP, FIRST, LAST, PARITY, SLEEPERS = range(6)
CONTROL_SIZE = 8
_LINE = 8  # int64 in a cache line
_SPINS = 2000  # pauses before a waiting thread goes to sleep: some 50 microseconds
_PARK_SPINS = 500  # before a thread that has nothing to do goes to sleep
# int64 offsets of the mutex and the conditions in `place`: a new step, the end of a phase
_LOCK, _WAKE, _MEET = 0, 16, 32
PLACE_SIZE = 48

_I64 = ir.IntType(64)


def _external(name: str, arguments: int) -> Any:
    return types.ExternalFunction(name, types.int32(*[types.uintp] * arguments))


_mutex_init = _external("pthread_mutex_init", 2)
_mutex_lock = _external("pthread_mutex_lock", 1)
_mutex_unlock = _external("pthread_mutex_unlock", 1)
_cond_init = _external("pthread_cond_init", 2)
_cond_wait = _external("pthread_cond_wait", 2)
_cond_broadcast = _external("pthread_cond_broadcast", 1)


@intrinsic
def add(typingctx: Any, numbers: Any, index: Any, amount: Any) -> Any:
    """numbers[index] += amount as one indivisible act; what it was before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _at(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", at, args[2], "seq_cst")

    return types.int64(numbers, types.int64, types.int64), build


@intrinsic
def look(typingctx: Any, numbers: Any, index: Any) -> Any:
    """numbers[index], and after it all that its writer wrote before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _at(context, builder, signature.args[0], args[0], args[1])
        return builder.load_atomic(at, "acquire", 8)

    return types.int64(numbers, types.int64), build


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this thread spins."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        hint = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, kind, "llvm.x86.sse2.pause"
        )
        builder.call(hint, [])
        return context.get_dummy_value()

    return types.none(), build


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Zeros whose first byte begins a cache line."""
    raw = np.zeros(size + 8 * _LINE, np.uint8)
    start = -raw.ctypes.data % (8 * _LINE)
    return raw[start : start + size]


def counters(phases: int) -> NDArray[np.int64]:
    """Room for two steps' phases: while a slow thread leaves one step, the next is prepared."""
    size = phases * 2 * _LINE
    return aligned_bytes(2 * size * 8).view(np.int64).reshape(2, size)


@njit(inline="always")
def claim(counter: Any, phase: Any, amount: Any) -> Any:
    """The first of the next `amount` tasks of a phase that nobody has."""
    return add(counter, phase * 2 * _LINE, amount)


@njit(nogil=True)
def meet(place: Any, control: Any, counter: Any, phase: Any, threads: Any) -> None:
    """Wait until all threads have come to the end of the phase.

    Whoever comes last looks for sleepers after it has counted itself, and a sleeper counts itself
    before it looks once more: one of them sees the other.
    """
    at = (phase * 2 + 1) * _LINE
    if add(counter, at, 1) + 1 == threads:
        if add(control, SLEEPERS, 0) > 0:
            _mutex_lock(place.ctypes.data + 8 * _LOCK)
            _cond_broadcast(place.ctypes.data + 8 * _MEET)
            _mutex_unlock(place.ctypes.data + 8 * _LOCK)
        return
    for _ in range(_SPINS):
        if look(counter, at) == threads:
            return
        pause()
    _mutex_lock(place.ctypes.data + 8 * _LOCK)
    add(control, SLEEPERS, 1)
    while add(counter, at, 0) < threads:
        _cond_wait(place.ctypes.data + 8 * _MEET, place.ctypes.data + 8 * _LOCK)
    add(control, SLEEPERS, -1)
    _mutex_unlock(place.ctypes.data + 8 * _LOCK)


@njit(nogil=True, cache=True)
def open_place(place: Any) -> None:
    """Make the mutex and the condition in `place`, int64 `[PLACE_SIZE]`."""
    _mutex_init(place.ctypes.data + 8 * _LOCK, 0)
    _cond_init(place.ctypes.data + 8 * _WAKE, 0)
    _cond_init(place.ctypes.data + 8 * _MEET, 0)


@njit(nogil=True, cache=True)
def announce(place: Any, control: Any) -> None:
    """Begin the next step: wake whoever parks."""
    _mutex_lock(place.ctypes.data + 8 * _LOCK)
    add(control, GENERATION, 1)
    _cond_broadcast(place.ctypes.data + 8 * _WAKE)
    _mutex_unlock(place.ctypes.data + 8 * _LOCK)


@njit(nogil=True)
def park(place: Any, control: Any, seen: Any) -> Any:
    """Wait for a step later than `seen`; its number."""
    for _ in range(_PARK_SPINS):
        if look(control, GENERATION) != seen:
            return look(control, GENERATION)
        pause()
    _mutex_lock(place.ctypes.data + 8 * _LOCK)
    while look(control, GENERATION) == seen:
        _cond_wait(place.ctypes.data + 8 * _WAKE, place.ctypes.data + 8 * _LOCK)
    _mutex_unlock(place.ctypes.data + 8 * _LOCK)
    return look(control, GENERATION)
