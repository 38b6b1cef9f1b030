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
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxprune.errors import InputError

AXES = ("sequences", "heads")


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run; to be called before JAX is used.

    Args:
      coordinator: ``host:port`` of process 0, ``auto`` where the cluster says, or ``None`` for a
        run of one process.
      processes: how many there are.
      process: which this one is.

    Raises:
      InputError: some of the three, but not what is needed.
    """
    _give_virtual_devices_threads()
    if coordinator is None:
        if processes is not None or process is not None:
            raise InputError("--processes and --process need --coordinator HOST:PORT")
        return
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    if processes is None or process is None or not 0 <= process < processes:
        raise InputError("--coordinator HOST:PORT needs --processes N and --process 0 ... N-1")
    jax.distributed.initialize(coordinator, processes, process)


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
        match = re.fullmatch(r"(\d+)x(\d+)", shape)
        along = (int(match[1]), int(match[2])) if match else (0, 0)
        if math.prod(along) != devices:
            raise InputError(
                f"--mesh {shape}: expected SxH whose product is the number of devices, {devices}"
            )
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


def whole(array: Array) -> np.ndarray:
    """An array, split or not, in the memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    mesh = array.sharding.mesh  # type: ignore[attr-defined]
    everywhere = NamedSharding(mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda a: a, out_shardings=everywhere)(array))


def is_writer() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def agreed(flag: bool) -> bool:
    """What process 0 says, in all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def by_writer(work: Callable[[], Any]) -> None:
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
    if agreed(failed is not None):
        raise failed or InputError("process 0 stopped; its message says why")
