"""What `processes.join` says when variables make no sense or nobody comes."""

import os
import socket

import pytest

from llm_jax.parallel import processes


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES='x' must be a whole number"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID='' must be a whole number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must lie below JAX_NUM_PROCESSES=2"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "no coordinator at localhost:[0-9]+ after 1 s"),
    ],
)
def test_errors(environment, words):
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_COORDINATOR_TIMEOUT": "1"}
    with pytest.raises(processes.ProcessError, match=words):
        processes.join({**job, **environment})


def test_auto_asks_jax_alone(monkeypatch):
    """jax reads the variable too, and would take `auto` for an address."""
    seen = []
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "auto")
    monkeypatch.setattr(processes.signal, "signal", lambda *a: None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **kw: seen.append((kw, dict(os.environ))))
    processes.join()
    ((options, environment),) = seen
    assert "JAX_COORDINATOR_ADDRESS" not in environment
    assert options == {"initialization_timeout": 300, "heartbeat_timeout_seconds": 100}


def test_auto_without_a_cluster(monkeypatch):
    def nothing(**options):
        raise ValueError("coordinator_address should be defined.\nMore.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", nothing)
    with pytest.raises(processes.ProcessError, match="=auto: no cluster that jax knows.*should be defined.$"):
        processes.join({"JAX_COORDINATOR_ADDRESS": "auto"})


def test_an_address_without_a_port_and_no_job():
    with pytest.raises(processes.ProcessError, match="'nowhere' is not of the form host:port"):
        processes.join({"JAX_COORDINATOR_ADDRESS": "nowhere", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    processes.join({})  # no job, nothing happens


def test_lost_processes_are_explained_in_a_job_only(monkeypatch):
    text = "UNKNOWN: Gloo all-reduce failed: Connection reset by peer"
    assert processes.explain(text) == text
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    assert processes.explain(text).startswith(f"another process of this job ended or cannot be reached ({text})")
    assert processes.explain("no such file") == "no such file"
