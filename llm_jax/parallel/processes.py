"""Several processes as one job: who coordinates, how long anybody waits, what is said when somebody is missing."""

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PATIENCE, HEARTBEAT = "JAX_COORDINATOR_TIMEOUT", "JAX_HEARTBEAT_TIMEOUT"  # seconds


class ProcessError(RuntimeError):
    """Processes that do not find each other; one line that says what to do."""


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdigit():
        raise ProcessError(f"{name}={value!r} must be a whole number; launch/README.md says who sets it")
    return int(value)


def _wait_for(address: str, seconds: int) -> None:
    """Waits until somebody listens at `address`.

    Raises:
      ProcessError: if nobody did in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ProcessError(f"{ADDRESS}={address!r} is not of the form host:port")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=min(5, seconds)).close()
            return
        except OSError as e:
            if time.monotonic() > end:
                raise ProcessError(
                    f"no coordinator at {address} after {seconds} s ({e}): is process 0 running, and the port open?"
                ) from e
        time.sleep(0.2)


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job that the environment describes, if it describes one; call before anything touches a device.

    `JAX_COORDINATOR_ADDRESS=host:port` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` says who is who;
    `JAX_COORDINATOR_ADDRESS=auto` asks the cluster (TPU VMs, GKE, Slurm, MPI). All wait `JAX_COORDINATOR_TIMEOUT`
    seconds (300) for each other, and end `JAX_HEARTBEAT_TIMEOUT` seconds (100) after one of them has died.

    Raises:
      ProcessError: if the variables make no sense or the others do not come.
    """
    address = environment.get(ADDRESS)
    if not address:
        return
    patience = _number(environment, PATIENCE, 300)
    heartbeat = _number(environment, HEARTBEAT, 100)
    if address == "auto":
        os.environ.pop(ADDRESS, None)  # jax would take `auto` for an address
        try:
            jax.distributed.initialize(initialization_timeout=patience, heartbeat_timeout_seconds=heartbeat)
        except (ValueError, RuntimeError) as e:
            said = str(e).splitlines()[0]
            raise ProcessError(f"{ADDRESS}=auto: no cluster that jax knows, or not all of it, is here: {said}") from e
        return _listen()
    count, index = _number(environment, COUNT), _number(environment, INDEX)
    if index >= count:
        raise ProcessError(f"{INDEX}={index} must lie below {COUNT}={count}")
    if index:
        _wait_for(address, patience)
    try:
        # Slurm's variables would give a process the one GPU of its number, whatever it sees
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method="deactivate",
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
        )
    except RuntimeError as e:
        raise ProcessError(
            f"process {index} of {count} did not find the others at {address} within {patience} s: "
            f"{str(e).splitlines()[0]}"
        ) from e
    _listen()


def _listen() -> None:
    """SIGTERM ends this process as ever until the training loop listens: jax's own service would swallow it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


LOST = ("Gloo", "NCCL", "heartbeat", "coordination", "Connection reset", "Connection closed", "UNAVAILABLE")


def lost(text: str) -> bool:
    """Whether an error's text says that another process of the job is gone: nothing done together ends any more."""
    return jax.distributed.is_initialized() and any(word in text for word in LOST)


def explain(text: str) -> str:
    """An error's text, with what to do where another process of the job is gone."""
    if not lost(text):
        return text
    return (
        f"another process of this job ended or cannot be reached ({text}): its log says why; run the same command "
        "again to resume from the last checkpoint"
    )


def whole(tree: Any) -> Any:
    """A tree whose arrays are all within reach of this process; every process calls it.

    Args:
      tree: arrays that span processes are copied to the host of each, one at a time; others stay what they are.
    """
    is_part = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if is_part(x) else x, tree)


def wait_for_all(what: str) -> None:
    """Returns when every process of the job has come here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
