"""What can be known of the launchers without their clusters: shellcheck, schemas, dry runs."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("local.sh", "tpu_vm.sh", "slurm.sbatch", "gke/submit.sh")]
COMMAND = ["python", "-m", "experiments.train", "--config=a b.py", "--workdir=gs://bucket/x"]
POD = dict(NAME="llama", ZONE="us-west4-a", TYPE="v5litepod-256", RUNTIME="v2-alpha-tpuv5-lite", DRY_RUN="1")
GKE = dict(NAME="llama", IMAGE="an/image:1", ACCELERATOR="tpu-v5p-slice", TOPOLOGY="8x8x8", HOSTS="128", DRY_RUN="1")


def run(script, *args, **environment):
    plain = {k: v for k, v in os.environ.items() if k not in {*POD, *GKE}}
    return subprocess.run(
        [LAUNCH / script, *args], env={**plain, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install '.[test]'")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(script.read_text().splitlines()) <= 60  # at most a screen


def test_a_pod_is_asked_for_and_every_worker_starts_the_command():
    assert run("tpu_vm.sh", "create", **POD).stdout.split() == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "llama", "--zone=us-west4-a"),
        *("--node-id=llama", "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"),
    ]
    several = run("tpu_vm.sh", "create", **POD, SLICES="2", SPOT="1").stdout
    assert "--node-prefix=llama --node-count=2" in several and "--spot" in several
    said = run("tpu_vm.sh", "run", *COMMAND, **POD, SLICES="2").stdout
    assert all(f"tpu-vm ssh llama-{i} --zone=us-west4-a --worker=all" in said for i in (0, 1)) and "llama-2" not in said
    assert "JAX_COORDINATOR_ADDRESS=auto" in said
    assert "ssh llama-0 --zone=us-west4-a --worker=0" in run("tpu_vm.sh", "logs", **POD, SLICES="2").stdout


def test_what_a_worker_runs_is_the_command(tmp_path):
    """The quoting survives ssh: the remote line, run by a shell here, starts the command with its arguments."""
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    remote = 'for a in "$@"; do [[ $a != --command=* ]] || (cd "$HOME" && bash -c "${a#*=}"); done'
    fake.write_text(f"#!/bin/bash\n{remote}\n")
    train = tmp_path / "llm" / ".venv" / "bin" / "python"
    train.parent.mkdir(parents=True)
    train.write_text('#!/bin/bash\nprintf "%s\\n" "$JAX_COORDINATOR_ADDRESS" "$@" > "$HOME/got"\n')
    for file in (fake, train):
        file.chmod(0o755)
    environment = {**POD, "DRY_RUN": "", "HOME": str(tmp_path), "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    done = run("tpu_vm.sh", "run", *COMMAND, **environment)
    assert done.returncode == 0, done.stderr
    for _ in range(100):  # it is detached
        if (tmp_path / "got").exists() and (tmp_path / "got").read_text().endswith("x\n"):
            break
        subprocess.run(["sleep", "0.05"])
    assert (tmp_path / "got").read_text().splitlines() == ["auto", *COMMAND[1:]]


@pytest.mark.parametrize(
    "codes, runs, said",
    [
        ([1, 1, 0], 3, ""),  # again until it succeeds
        ([1, 130, 0], 2, "ended with exit code 130"),
        ([2, 0], 1, "ended with exit code 2"),
        ([1] * 9, 5, "ended with exit code 1"),  # five quick failures
    ],
)
def test_a_worker_repeats_what_may_succeed(codes, runs, said, tmp_path):
    """The remote line, run here with a command that takes its exit codes from a file and without the waiting."""
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    step = 'code=$(head -n 1 codes); sed -i 1d codes; echo ran; exit "$code"'
    (tmp_path / "python").write_text(f"#!/bin/bash\n{step}\n")
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("python", "sleep"):
        (tmp_path / name).chmod(0o755)
    (asked,) = shlex.split(run("tpu_vm.sh", "run", *COMMAND, **POD).stdout)[-1:]
    loop = shlex.split(asked.removeprefix("--command="))
    line = loop[loop.index("-c") + 1]
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=path, capture_output=True, text=True, timeout=20)
    assert done.stdout.count("ran\n") == runs and said in done.stdout
    assert done.returncode == codes[runs - 1]


def test_the_manifest_is_valid():
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate: pip install '.[test]'")
    done = run("gke/submit.sh", *COMMAND, **GKE, SLICES="2")
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **slices["template"]}
    validate.validate(job, "1.30", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == 128
    assert pod["containers"][0]["command"] == COMMAND
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    (ends,) = jobset["spec"]["failurePolicy"]["rules"]
    assert ends == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8x8"
    assert {e["name"]: e["value"] for e in pod["containers"][0]["env"]}["JAX_COORDINATOR_ADDRESS"] == "auto"


SRUN = """#!/bin/bash
# srun of one node: the tasks of this job as processes of this machine
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = '#!/bin/bash\n[[ $1 == show ]] && echo localhost || echo "$@" >> "$CALLS"\n'


@pytest.fixture
def slurm(tmp_path):
    """Runs `slurm.sbatch` under imitations of `srun` and `scontrol`; what was asked of the latter is in `calls`."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def start(*command, **environment):
        calls.write_text("")
        job = dict(SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="localhost", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2")
        path = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", CALLS=str(calls))
        done = run("slurm.sbatch", *command, **job, **path, **environment)
        return done, calls.read_text().split()

    return start


def test_slurm_tells_every_task_who_it_is(slurm, tmp_path):
    keep = "import json, os; json.dump(dict(os.environ), open(f'{os.environ[\"TO\"]}/{os.getpid()}.json', 'w'))"
    done, calls = slurm("python3", "-c", keep, TO=str(tmp_path))
    assert done.returncode == 0 and calls == [], done.stderr
    tasks = sorted((json.loads(f.read_text()) for f in tmp_path.glob("*.json")), key=lambda t: t["JAX_PROCESS_ID"])
    assert [t["JAX_PROCESS_ID"] for t in tasks] == [t["CUDA_VISIBLE_DEVICES"] for t in tasks] == ["0", "1"]
    assert {t["JAX_COORDINATOR_ADDRESS"] for t in tasks} == {"localhost:24711"}
    assert {t["JAX_NUM_PROCESSES"] for t in tasks} == {"2"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A job's files lie where it was submitted."""
    (tmp_path / "submitted").mkdir()
    monkeypatch.chdir(tmp_path / "submitted")


def test_slurm_queues_again_what_was_stopped_and_what_failed_five_times_at_most(slurm, here):
    for _ in range(7):  # stopped, and saved: however often
        done, calls = slurm("bash", "-c", "exit 130")
        assert done.returncode == 0 and calls == ["requeue", "4711"]
    for _ in range(5):
        done, calls = slurm("bash", "-c", "exit 3")
        assert done.returncode == 0 and calls == ["requeue", "4711"], done.stderr
    done, calls = slurm("bash", "-c", "exit 3")
    assert done.returncode == 3 and calls == [] and not list(pathlib.Path().glob(".slurm-*"))
    done, calls = slurm("bash", "-c", "exit 2")  # it would fail again
    assert done.returncode == 2 and calls == [] and not list(pathlib.Path().glob(".slurm-*"))
    done, calls = slurm("true")
    assert done.returncode == 0 and calls == []


def test_slurms_own_variables_do_not_choose_a_processes_gpu(slurm, here, tmp_path):
    """jax would take its local number for the one device that it may use, whatever it sees."""
    code = """
import json, os, jax
from llm_jax.parallel import processes
keep = lambda *a, **k: json.dump([a, k], open(f"{os.environ['TO']}/{a[2]}.json", "w"))
jax.distributed.initialize, processes._wait_for = keep, lambda *a: None
processes.join()
"""
    own = dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1", TO=str(tmp_path), PYTHONPATH=str(ROOT))
    done, _ = slurm(sys.executable, "-c", code, **own)
    assert done.returncode == 0, done.stderr
    for i in (0, 1):
        (address, count, index), options = json.loads((tmp_path / f"{i}.json").read_text())
        assert (address, count, index) == ("localhost:24711", 2, i)
        assert options["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("tpu_vm.sh", ["fly"], "fly is not one of create, state"),
        ("tpu_vm.sh", [], "create, state, setup, run"),
        ("tpu_vm.sh", ["run"], "a command"),
        ("local.sh", ["2", "--"], "a command"),
        ("local.sh", [], "how many processes"),
        ("gke/submit.sh", [], "a command"),
    ],
)
def test_errors(script, args, words):
    done = run(script, *args, **POD)
    assert done.returncode and words in done.stderr
