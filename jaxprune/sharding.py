"""One program on any number of devices and processes, by JAX's own engine.

A mesh has two axes: ``sequences``, which data is split along, and ``heads``, which projections,
their masks and the optimiser's state are split along, a group of heads with its columns on each
device. Under ``jax.set_mesh`` all arrays live on the whole mesh, and ``jit`` inserts what
communication a program needs; sums over a matrix, and with them exact counts, stay global. Only
what loops over heads or sequences, where splitting cannot be inferred, says so: ``over_mesh``.
Without a mesh nothing here does anything.

With several processes all run the same program on the same inputs, and process 0 alone writes;
the others read what it wrote, so folders must be on a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxprune.errors import InputError, shown

AXES = ("sequences", "heads")


def check_processes(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int = 300
) -> None:
    """Raise ``InputError`` for a description of processes that cannot be; see ``connect``."""
    if coordinator is None:
        if processes is not None or process is not None:
            raise InputError("`processes` and `process` need coordinator=HOST:PORT")
        return
    if timeout < 1:
        raise InputError(f"coordinator_timeout {timeout}: expected 1 or more seconds")
    if coordinator == "auto":
        if processes is not None or process is not None:
            raise InputError("`processes` and `process` are the cluster's with coordinator=auto")
        return
    _address(coordinator)
    if processes is None or process is None or not 0 <= process < processes:
        raise InputError("coordinator HOST:PORT: needs processes=N, and a `process` from 0 to N-1")


def connect(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int = 300
) -> None:
    """Join the other processes of a run; to be called before JAX is used.

    Args:
      coordinator: ``host:port`` of process 0, ``auto`` where the cluster says, or ``None`` for a
        run of one process.
      processes: how many there are.
      process: which this one is.
      timeout: seconds to wait for the others.

    Raises:
      InputError: some of the three, but not what is needed; no cluster; or not all of them came.
    """
    check_processes(coordinator, processes, process, timeout)
    _give_virtual_devices_threads()
    if coordinator is None:
        return
    if coordinator == "auto":
        try:
            jax.distributed.initialize(initialization_timeout=timeout)
        except (ValueError, RuntimeError):
            raise InputError(
                "coordinator auto: JAX finds no cluster here; give HOST:PORT, `processes` and "
                "`process`"
            ) from None
        return
    assert processes is not None
    assert process is not None
    # JAX's client ends the process from C++ where a peer does not come: they meet here first.
    meet(coordinator, processes, process, timeout)
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)


def _address(coordinator: str) -> tuple[str, int]:
    match = re.fullmatch(r"([^\s:\[\]]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", coordinator)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise InputError(
            f"coordinator {coordinator!r:.80}: expected HOST:PORT with a port from 1 to 65535, "
            "or auto"
        )
    return match[1].strip("[]"), int(match[2])


def meet(coordinator: str, processes: int, process: int, timeout: int) -> None:
    """Wait until all processes of a run are there, and agree on how many they are.

    Process 0 listens at the coordinator's address until the others have said who they are. Says
    on standard error who is waited for.

    Raises:
      InputError: not all came in time, two say to be the same one, or the address cannot be used.
    """
    host, port = _address(coordinator)
    deadline = time.monotonic() + timeout
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(
            f"coordinator {coordinator}: no such host ({error.strerror or error})"
        ) from None
    if process == 0:
        _await_peers(coordinator, port, processes, timeout, deadline)
        return
    _say(f"waiting up to {timeout} s for process 0 at {coordinator}")
    answer = ""
    while answer == "":
        if time.monotonic() > deadline:
            raise InputError(
                f"coordinator {coordinator}: process 0 did not come within {timeout} s; start it, "
                "check the address, or raise `coordinator_timeout`"
            )
        answer = _present(addresses, f"{_GREETING} {process} {processes}\n", deadline)
    if answer != _WELCOME:
        raise InputError(f"coordinator {coordinator}: {answer}")


_GREETING, _WELCOME = "jaxprune", "welcome"


def _present(addresses: list[Any], greeting: str, deadline: float) -> str:
    """What process 0 answers; empty where it is not there, or went away again."""
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as peer:
            peer.settimeout(max(0.1, min(5.0, deadline - time.monotonic())))
            peer.connect(address)
            peer.sendall(greeting.encode())
            peer.settimeout(max(0.1, deadline - time.monotonic()))
            with peer.makefile(encoding="utf-8", errors="replace") as answers:
                answer = answers.readline(1000).strip()
            if answer:
                return answer
    time.sleep(0.2)
    return ""


def _await_peers(
    coordinator: str, port: int, processes: int, timeout: int, deadline: float
) -> None:
    """Take the greetings of all others, then let them go on; the part of process 0."""
    peers: dict[int, socket.socket] = {}

    def missing() -> str:
        return ", ".join(str(i) for i in range(1, processes) if i not in peers)

    def answer(text: str) -> None:
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{text}\n".encode())

    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=max(8, processes),
        )
    except OSError as error:
        raise InputError(
            f"coordinator {coordinator}: cannot listen there ({os.strerror(error.errno or 0)}); "
            "choose another port"
        ) from None
    with contextlib.ExitStack() as open_sockets:
        open_sockets.enter_context(server)
        if missing():
            _say(f"waiting up to {timeout} s for process {missing()} at {coordinator}")
        while missing():
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                peer = open_sockets.enter_context(server.accept()[0])
                peer.settimeout(5)
                with peer.makefile(encoding="utf-8", errors="replace") as greetings:
                    name, *said = greetings.readline(100).split()
                index, count = map(int, said)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                answer("not all processes came in time; see process 0")
                raise InputError(
                    f"coordinator {coordinator}: process {missing()} of {processes} did not come "
                    f"within {timeout} s; start it, or raise `coordinator_timeout`"
                ) from None
            except (OSError, ValueError):  # something else that knocks at ports
                continue
            if name != _GREETING:
                continue
            wrong = ""
            if count != processes:
                wrong = f"process {index} has processes={count}, process 0 has {processes}"
            elif index in peers or not 0 < index < processes:
                wrong = f"two processes have process={index}"
            if wrong:
                peers[len(peers) + processes] = peer
                answer(wrong)
                raise InputError(f"coordinator {coordinator}: {wrong}")
            peers[index] = peer
        answer(_WELCOME)
        for peer in peers.values():  # they close first, so that the port is free at once
            with contextlib.suppress(OSError):
                peer.recv(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _give_virtual_devices_threads() -> None:
    """Enough threads for the devices that a CPU is made to look like.

    XLA runs the programs of all of them on one pool of a thread for each core or device. Where
    all its threads wait for the other device in a collective, nothing goes on; the size of the
    pool is read from ``NPROC``.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    devices = int(asked[1]) if asked else 1
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 4 * devices)))


def check_mesh(shape: str | None) -> None:
    """Raise ``InputError`` unless a mesh is one of the devices there are; see ``use_mesh``."""
    if shape is not None:
        _mesh_axes(shape)


def _mesh_axes(shape: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", shape)
    along = (int(match[1]), int(match[2])) if match else (0, 0)
    if math.prod(along) == 0:
        raise InputError(f"mesh {shown(shape)}: expected SxH, such as 1x8")
    if math.prod(along) != jax.device_count():
        raise InputError(
            f"mesh {shape}: expected SxH whose product is the number of devices, "
            f"{jax.device_count()}"
        )
    return along


def use_mesh(shape: str | None, heads: int) -> contextlib.AbstractContextManager[Any]:
    """The mesh of a run as a context; nothing where there is one device and no shape is asked for.

    Args:
      shape: ``SxH``, devices along sequences and heads; if ``None``, as many along heads as divide
        ``heads``, the others along sequences.
      heads: key heads of the model.

    Raises:
      InputError: not a shape, or not that of the devices there are.
    """
    devices = jax.device_count()
    if shape is None:
        if devices == 1:
            return contextlib.nullcontext()
        along = (devices // math.gcd(devices, heads), math.gcd(devices, heads))
    else:
        along = _mesh_axes(shape)
    return jax.set_mesh(jax.make_mesh(along, AXES, axis_types=(AxisType.Auto,) * 2))


def _automatic_axes() -> dict[str, int]:
    """Axes of the mesh in use that are not mapped over already, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    }


def over_mesh(
    function: Callable[..., Any], *axes: str | tuple[str, ...] | None
) -> Callable[..., Any]:
    """``function``, each device computing its part of the leading axes of arguments and results.

    Args:
      function: of arrays (or ``None``) with the same leading axes, independent along them, to
        arrays with these leading axes.
      axes: mesh axes that the leading axes are split along. One whose size the devices do not
        divide is computed whole on each of them.
    """

    def mapped(*arrays: Any) -> Any:
        there = _automatic_axes()
        leaves = jax.tree.leaves(arrays)
        spec: list[tuple[str, ...] | None] = []
        for i, wanted in enumerate(axes):
            names = (wanted,) if isinstance(wanted, str) else wanted or ()
            names = tuple(name for name in names if name in there)
            parts = math.prod(there[name] for name in names)
            spec.append(
                names if parts > 1 and all(a.shape[i] % parts == 0 for a in leaves) else None
            )
        if not any(spec):
            return function(*arrays)
        split = PartitionSpec(*spec)
        # What is split nowhere is the same on all devices: nothing to check.
        return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(*arrays)

    return mapped


def _columns(leaf: Any, heads: int) -> PartitionSpec:
    """Matrices ``[d_in, d_out]`` are split along their outputs, the rest is everywhere."""
    if np.ndim(leaf) == 2 and leaf.shape[1] % heads == 0:
        return PartitionSpec(None, "heads")
    return PartitionSpec()


def split_columns(tree: PyTree) -> PyTree:
    """Weights, masks or a descent's state, matrices split along their columns over ``heads``."""
    heads = _automatic_axes().get("heads")
    if heads is None:
        return tree
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, _columns(leaf, heads)), tree
    )


def split_windows(tree: PyTree) -> PyTree:
    """Arrays with a leading sequence axis, split along it over the whole mesh where it divides."""
    there = _automatic_axes()
    names = tuple(there)

    def one(leaf: Array) -> Array:
        if not names or leaf.shape[0] % math.prod(there.values()):
            return leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(names))

    return jax.tree.map(one, tree)


def gather(array: Array) -> np.ndarray:
    """An array, split or not, in the memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    mesh = array.sharding.mesh  # type: ignore[attr-defined]
    everywhere = NamedSharding(mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda a: a, out_shardings=everywhere)(array))


def is_writer() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def broadcast_flag(flag: bool) -> bool:
    """What process 0 says, in all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def on_process_zero(work: Callable[[], Any]) -> None:
    """Do ``work`` in process 0; the others wait for it, and fail where it failed.

    Raises:
      InputError: from ``work``, or in the other processes because of it.
    """
    failed: InputError | None = None
    if is_writer():
        try:
            work()
        except InputError as error:
            failed = error
    if failed is not None and jax.process_count() == 1:
        raise failed
    if broadcast_flag(failed is not None):
        raise failed or InputError("the first process, 0, stopped; its message says why")
