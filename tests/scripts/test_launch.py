"""Launch scripts: dry runs read as a shell would, a preempted run with a stand-in for gcloud, YAML against schemas."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[2] / "scripts"
TRAIN = ["--gin_file=runs/a.gin", "--gin.MODEL_DIR=gs://bucket/two words", "--gin.NOTE='it''s $HOME; \"x\"'"]


def launch(*arguments, train=(), path=None):
    command = ["bash", str(SCRIPTS / "tpu/launch.sh"), *arguments, *(["--", *train] if train else [])]
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def dry_run(command, *options, train=()):
    """The commands that would run, split as a shell would."""
    place = ("--name=run", "--zone=us-east5-a", "--accelerator=v5p-128", "--dry_run")
    done = launch(command, *place, *options, train=train)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_one_slice_is_created_by_one_request():
    (command,) = dry_run("create", "--project=p", "--capacity=spot")
    assert command[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--zone=us-east5-a", "--project=p", "--accelerator-type=v5p-128", "--spot", "--node-id=run"} < set(command)
    assert "--runtime-version=v2-alpha-tpuv5" in command


def test_several_slices_are_one_request_and_one_command_each():
    (create,) = dry_run("create", "--num_slices=3")
    assert {"--node-count=3", "--node-prefix=run"} < set(create)
    started = dry_run("start", "--num_slices=3", train=TRAIN)
    assert [command[5] for command in started] == ["run-0", "run-1", "run-2"]
    assert all("--worker=all" in command for command in started)


def test_arguments_reach_the_worker_as_they_were_written(tmp_path):
    """The command for the worker is run here, with a trainer that writes down what it is given."""
    (ssh,) = dry_run("start", train=TRAIN)
    remote = next(part for part in ssh if part.startswith("--command=")).removeprefix("--command=")
    trainer = tmp_path / "t5x_like/.venv/bin/t5x_like"
    trainer.parent.mkdir(parents=True)
    trainer.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > ~/given\n')
    trainer.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", f"{remote}\nwait"], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "given").read_text().splitlines() == ["train", *TRAIN]
    assert (tmp_path / "train.exit").read_text() == "0\n"


def test_babysitting_is_all_steps_in_order():
    words = [" ".join(command[3:6]) for command in dry_run("babysit", "--num_slices=2", train=TRAIN)]
    assert words[0] == "queued-resources create run"
    assert [w for w in words if "ssh" in w] == ["tpu-vm ssh run-0", "tpu-vm ssh run-1"] * 2 + ["tpu-vm ssh run-0"]


FAKE_GCLOUD = """#!/usr/bin/env bash
# Stands in for Google Cloud: states come from a file, one per question; commands are written down.
cd "$(dirname "$0")"
echo "$3 $4 ${*: -1}" >> log
if [ "$3 $4" = "queued-resources describe" ]; then
    if [ "$(sed -n 1p states)" = MISSING ]; then
        [ "$(wc -l < states)" -gt 1 ] && sed -i 1d states
        echo "ERROR: (gcloud) NOT_FOUND: Resource not found" >&2; exit 1
    fi
    sed -n 1p states; [ "$(wc -l < states)" -gt 1 ] && sed -i 1d states; exit 0
fi
case "$*" in *"cat ~/train.exit"*) sed -n 1p exits; [ "$(wc -l < exits)" -gt 1 ] && sed -i 1d exits ;; esac
exit 0
"""


@pytest.fixture
def cloud(tmp_path):
    def make(states, exits):
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        (tmp_path / "exits").write_text("\n".join(exits) + "\n")
        (tmp_path / "gcloud").write_text(FAKE_GCLOUD)
        (tmp_path / "gcloud").chmod(0o755)
        return tmp_path

    return make


BABYSIT = ("babysit", "--name=run", "--zone=z", "--accelerator=v5p-8", "--poll_seconds=0")


def test_a_preempted_run_is_started_again_with_the_same_arguments(cloud):
    states = ["MISSING", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "MISSING", "ACTIVE"]
    path = cloud(states, ["running", "0"])
    done = launch(*BABYSIT, train=TRAIN, path=path)
    assert done.returncode == 0, done.stderr
    log = (path / "log").read_text().splitlines()
    starts = [line for line in log if "nohup" in line]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    assert sum(line.startswith("queued-resources create") for line in log) == 2
    assert sum(line.startswith("queued-resources delete") for line in log) == 1
    assert "the run is complete" in done.stdout


def test_retries_are_bounded(cloud):
    path = cloud(["ACTIVE"], ["1"])
    done = launch(*BABYSIT, "--max_retries=2", train=TRAIN, path=path)
    assert done.returncode == 2
    assert "gave up after 2 retries" in done.stderr
    assert sum("nohup" in line for line in (path / "log").read_text().splitlines()) == 3


def test_a_refused_configuration_is_not_tried_again(cloud):
    path = cloud(["ACTIVE"], ["2"])
    done = launch(*BABYSIT, train=TRAIN, path=path)
    assert done.returncode == 2
    assert "refused its configuration" in done.stderr


FLAKY_GCLOUD = """#!/usr/bin/env bash
# A cloud that works, but for the call whose number stands in `fails`: what a preemption or a lost network looks like.
cd "$(dirname "$0")"
number=$(($(cat calls) + 1)); echo $number > calls
if [ $number = "$(cat fails)" ]; then echo "ERROR: (gcloud) UNAVAILABLE: try again later" >&2; exit 1; fi
case "$3 $4" in
    "queued-resources create") touch exists ;;
    "queued-resources delete") rm -f exists ;;
    "queued-resources describe")
        if [ -e exists ]; then echo ACTIVE; else echo "ERROR: (gcloud) NOT_FOUND: no $5" >&2; exit 1; fi ;;
esac
case "$*" in *"cat ~/train.exit"*) sed -n 1p exits; [ "$(wc -l < exits)" -gt 1 ] && sed -i 1d exits ;; esac
exit 0
"""


def test_a_failure_of_any_one_call_ends_no_run(tmp_path):
    def babysit(fails):
        for name, text in {"calls": 0, "fails": fails, "exits": "running\nrunning\n0", "gcloud": FLAKY_GCLOUD}.items():
            (tmp_path / name).write_text(f"{text}\n")
        (tmp_path / "gcloud").chmod(0o755)
        (tmp_path / "exists").unlink(missing_ok=True)
        return launch(*BABYSIT, "--max_retries=3", train=TRAIN, path=tmp_path)

    assert babysit(0).returncode == 0
    calls = int((tmp_path / "calls").read_text())
    assert calls > 8
    for number in range(1, calls + 1):
        done = babysit(number)
        assert done.returncode == 0, (number, done.stderr)
        assert "the run is complete" in done.stdout
        assert done.stderr, f"call {number} failed without a word"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--zone=z"), "--name is needed"),
        (("create", "--name=n"), "--zone is needed"),
        (("create", "--name=n", "--zone=z", "--accelerator=v9-8"), "--runtime is needed for v9-8"),
        (("create", "--name=n", "--zone=z", "--accelerator=v5p-8", "--capacity=free"), "on-demand, spot or reserved"),
        (("start", "--name=n", "--zone=z"), "needs the arguments of t5x_like train"),
        (("dance", "--name=n", "--zone=z"), "there is no command dance"),
        (("create", "--nmae=n"), "there is no option --nmae=n"),
        (("create", "--name=n", "--zone=z", "--num_slices=two"), "a number from 1"),
    ],
)
def test_mistakes_have_one_message(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def check(value, schema, path="$"):
    """A small part of JSON Schema: types, required and only known keys, constants."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{path} is no mapping"
        required = {key for key in schema if not key.endswith("?")}
        known = {key.removesuffix("?"): part for key, part in schema.items()}
        assert required <= value.keys(), f"{path} lacks {required - value.keys()}"
        if "*" not in known:
            assert value.keys() <= known.keys(), f"{path} has unknown {value.keys() - known.keys()}"
        for key, part in value.items():
            check(part, known.get(key, known.get("*")), f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{path} is no list"
        assert value, f"{path} is empty"
        for index, part in enumerate(value):
            check(part, schema[0], f"{path}[{index}]")
    elif isinstance(schema, type):
        assert type(value) is schema, f"{path} is {value!r}"
    else:
        assert value == schema, f"{path} is {value!r}"


CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"google.com/tpu": int}},
}
POD = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {"*?": str},
    "containers": [CONTAINER],
}
JOB = {"parallelism": int, "completions": int, "backoffLimit": int, "template": {"spec": POD}}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "annotations": {"*?": str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}
"""After the JobSet API reference (v1alpha2) and that of batch/v1 Job: the fields used, with their types."""


def test_the_jobset_keeps_to_its_schema():
    document = yaml.safe_load((SCRIPTS / "gke/jobset.yaml").read_text())
    check(document, JOBSET)
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] * chips == job["completions"] * chips == x * y * z
    assert pod["containers"][0]["args"][0] == "train"


SKY = {
    "name": str,
    "resources": {
        "accelerators": str,
        "use_spot": bool,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int},
        "accelerator_args": {"runtime_version": str},
    },
    "num_nodes": int,
    "workdir": str,
    "file_mounts": {"*?": {"source": str, "mode": str}},
    "setup": str,
    "run": str,
}


def test_the_skypilot_task_keeps_to_its_schema():
    document = yaml.safe_load((SCRIPTS / "skypilot/train.yaml").read_text())
    check(document, SKY)
    assert shlex.split(document["run"])[1] == "train"


def test_the_schema_check_can_fail():
    document = yaml.safe_load((SCRIPTS / "gke/jobset.yaml").read_text())
    document["spec"]["replicatedJobs"][0]["replicas"] = "two"
    with pytest.raises(AssertionError, match="replicas is 'two'"):
        check(document, JOBSET)
    del document["spec"]["replicatedJobs"]
    with pytest.raises(AssertionError, match="lacks"):
        check(document, JOBSET)


def test_slurm_starts_one_process_per_node_with_the_arguments():
    environment = os.environ | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": "/home/me/t5x like"}
    script = str(SCRIPTS / "slurm/train.sbatch")
    shown = subprocess.run(["bash", script, *TRAIN], env=environment, capture_output=True, text=True, check=True).stdout
    words = shlex.split(shown)
    assert words == ["srun", "--kill-on-bad-exit=1", "/home/me/t5x like/.venv/bin/t5x_like", "train", *TRAIN]
    assert subprocess.run(["bash", script], capture_output=True).returncode == 2


def test_the_gpu_smoke_test_says_that_there_is_no_gpu(tmp_path):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    listing.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPTS / "gpu_smoke.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
