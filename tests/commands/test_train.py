"""The commands as users run them: their files, their output, their errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_like.commands.main import main
from t5x_like.config import parse_config
from t5x_like.errors import UserError
from t5x_like.reporting.metrics import read_metrics
from t5x_like.training.experiment import Experiment
from tests import toy

SHIPPED_RUNS = sorted((Path(__file__).parents[2] / "gin_configs" / "runs").glob("*.gin"))

TINY = {
    "STEPS": 40,
    "BATCH_SIZE": 8,
    "SEQUENCE_LENGTH": 16,
    "WARMUP_STEPS": 2,
    "DecoderConfig.d_model": 16,
    "StackConfig.num_layers": 2,
    "MLPConfig.d_ff": 32,
    "RunConfig.evaluate_every_steps": 20,
    "CheckpointConfig.save_every_steps": 10,
}


def flags(directory: Path, **changes) -> list[str]:
    bindings = {**TINY, "TEXT_FILES": directory / "text.txt", "MODEL_DIR": directory / "run", **changes}
    return ["--gin_file=runs/nanogpt_char.gin", *(f"--gin.{name}={value}" for name, value in bindings.items())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a finished run."""
    directory = tmp_path_factory.mktemp("trained")
    toy.write_text(directory)
    assert main(["train", *flags(directory)]) == 0
    return directory


@pytest.fixture
def directory(tmp_path):
    toy.write_text(tmp_path)
    return tmp_path


def test_training_writes_the_files_of_a_run(trained):
    names = {path.name for path in (trained / "run").iterdir()}
    assert {"checkpoints", "metrics.jsonl", "loss.png", "operative_config.gin", "config.json", "tensorboard"} <= names
    config = json.loads((trained / "run" / "config.json").read_text())
    assert config["experiment"]["model"]["d_model"] == 16
    assert config["versions"]["jax"] == jax.__version__
    kept = {int(path.name) for path in (trained / "run" / "checkpoints").iterdir()}
    assert 40 in kept
    assert len(kept) <= 3  # the last two and the best


def test_again_it_says_that_it_is_complete_and_shows_a_sample(trained, capsys):
    assert main(["train", *flags(trained)]) == 0
    out = capsys.readouterr().out
    assert "nothing to do: the run ended at step 40" in out
    assert "A sample:" in out


def test_the_saved_configuration_runs_the_same_run(trained, capsys):
    assert main(["train", f"--gin_file={trained}/run/operative_config.gin"]) == 0
    assert "nothing to do: the run ended at step 40" in capsys.readouterr().out


def test_evaluate_gives_the_scores_of_the_last_validation(trained, capsys):
    assert main(["evaluate", f"--model_dir={trained}/run"]) == 0
    scores = json.loads(capsys.readouterr().out)
    last = read_metrics(trained / "run" / "metrics.jsonl")[-1]
    assert scores["step"] == last["step"] == 40
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        np.testing.assert_allclose(scores[name], last[name], rtol=1e-6)


def test_evaluate_finds_the_best_checkpoint(trained, capsys):
    assert main(["evaluate", f"--model_dir={trained}/run", "--step=best"]) == 0
    scores = json.loads(capsys.readouterr().out)
    validation = [r for r in read_metrics(trained / "run" / "metrics.jsonl") if r["split"] == "validation"]
    assert scores["step"] == min(validation, key=lambda r: r["loss"])["step"]


def test_generate_continues_prompts(trained, capsys):
    command = ["generate", f"--model_dir={trained}/run", "--prompt=the cat", "--prompt=a", "--max_new_tokens=30"]
    assert main([*command, "--seed=1"]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--seed=1"]) == 0
    assert capsys.readouterr().out == first
    texts = first.removesuffix("\n").split(f"\n{'-' * 40}\n")
    assert texts[0].startswith("the cat")
    assert [len(text) for text in texts] == [7 + 30, 1 + 30]
    for choice in ("--greedy", "--top_k=2", "--top_p=0.5", "--temperature=2"):
        assert main([*command, choice]) == 0
    assert capsys.readouterr().out != first


def with_includes(path: Path) -> str:
    text, shipped = path.read_text(), SHIPPED_RUNS[0].parent.parent
    return text + "".join(with_includes(shipped / name) for name in re.findall("include '(.*)'", text))


@pytest.mark.parametrize("run", SHIPPED_RUNS, ids=lambda path: path.name)
def test_every_shipped_run_builds_on_virtual_devices(run, directory, capsys):
    if run.name == "prepared.gin":
        pytest.skip("its vocabulary is that of a corpus; tests/commands/test_prepare.py trains it")
    config = with_includes(run)
    given = {"TEXT_FILES": f"{directory}/text.txt", "CORPUS": f"{directory}/corpus", "MODEL_DIR": f"{directory}/run"}
    given |= {"FROM": f"{directory}/from", "TRAIN": f"{directory}/train.jsonl"}
    if run.stem.endswith("base_task"):
        given |= {"SPIECE_MODEL": "spiece.model", "TOKENIZER_FILE": "tokenizer.json"}
    bindings = [
        f"--gin.{name}={value}"
        for name, value in given.items()
        if f"\n{name} = %gin.REQUIRED" in config or name == "MODEL_DIR"
    ]
    if run.name == "nanogpt_char.gin":
        bindings.append("--gin.BATCH_SIZE=16")  # 12 rows do not fit eight devices
    assert main(["train", f"--gin_file={run}", "--dry_run", *bindings]) == 0
    out = capsys.readouterr().out
    assert "tokens per step" in out
    assert "memory per device" in out
    assert not (directory / "run").exists()


def test_dry_run_counts_parameters_and_bytes(directory, capsys):
    run = [f"--gin_file={SHIPPED_RUNS[0].parent}/gpt2_124m.gin", f"--gin.TEXT_FILES={directory}/text.txt"]
    assert main(["train", "--dry_run", *run, "--gin.DecoderConfig.vocab_size=50257"]) == 0
    out = capsys.readouterr().out
    assert "124,439,808 parameters" in out
    # Sharded eight ways, all but what 8 does not divide or no rule splits (norms, biases).
    [parameters] = [float(line.split()[1]) for line in out.splitlines() if line.startswith("  parameters")]
    assert 124_439_808 * 4 / 8 / 2**20 <= parameters < 124_439_808 * 4 / 8 / 2**20 * 1.02


def refused(argv: list[str], capsys) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


BAD_FLAGS = {
    "unknown_macro": ({"STEP": 3}, "did you mean STEPS"),
    "wrong_type": ({"STEPS": "'ten'"}, "RunConfig.steps"),
    "missing_file": ({"TEXT_FILES": "no/such.txt"}, "no/such.txt"),
    "short_corpus": ({"SEQUENCE_LENGTH": 100000}, "less than one sequence"),
    "batch_on_mesh": ({"BATCH_SIZE": 12}, "use 8 or 16"),
    "heads": ({"AttentionConfig.num_heads": 3}, "num_heads"),
    "microbatches": ({"RunConfig.gradient_accumulation": 3}, "not a multiple"),
    "mesh": ({"MeshConfig.data": 3}, "does not fill 8 devices"),
    "warmup": ({"WARMUP_STEPS": 100}, "longer than the run"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_mistake_is_one_message_and_exit_code_2(changes, message, directory, capsys):
    assert message in refused(["train", *flags(directory, **changes)], capsys)


def test_a_vocabulary_larger_than_the_text_allows_is_refused(directory, capsys):
    argv = ["train", "--gin_file=runs/quickstart.gin", f"--gin.MODEL_DIR={directory}/run"]
    text = ["--gin.DataConfig.source=@TextSource()", f"--gin.TextSource.files={directory}/text.txt"]
    assert "vocab_size=2048" in refused([*argv, *text, "--gin.BATCH_SIZE=8"], capsys)


def test_a_changed_model_is_refused_and_nothing_is_lost(trained, capsys):
    before = sorted(path.name for path in (trained / "run").rglob("*"))
    message = refused(["train", *flags(trained, **{"StackConfig.num_layers": 3})], capsys)
    assert "model.stack.num_layers: 2 -> 3" in message
    assert "another MODEL_DIR" in message
    assert sorted(path.name for path in (trained / "run").rglob("*")) == before


def test_a_changed_run_is_accepted_by_name(directory, capsys):
    assert main(["train", *flags(directory, STEPS=10)]) == 0
    capsys.readouterr()
    changed = flags(directory, STEPS=12, **{"DecoderConfig.dropout_rate": 0.1, "DataConfig.seed": 7})
    message = refused(["train", *changed], capsys)
    assert "data.seed: 0 -> 7" in message
    assert "--allow_changes=PATH" in message
    assert "data.seed" not in refused(["train", *changed, "--allow_changes=data"], capsys)
    assert main(["train", *changed, "--allow_changes=data,model.dropout_rate"]) == 0
    assert "complete at step 12" in capsys.readouterr().out


def test_a_sample_that_fails_is_no_failure_of_the_run(trained, capsys, monkeypatch):
    monkeypatch.setattr("t5x_like.inference.model.LoadedModel.generate", lambda *args, **options: 1 / 0)
    assert main(["train", *flags(trained)]) == 0
    assert "A sample:" not in capsys.readouterr().out


def test_more_steps_continue_a_finished_run(directory, capsys):
    assert main(["train", *flags(directory, STEPS=10)]) == 0
    assert main(["train", *flags(directory, STEPS=20)]) == 0
    out = capsys.readouterr().out
    assert "complete at step 20" in out
    assert re.search(r"Time: \d+:\d\d in 2 starts: .*training steps \d", out)
    goodput = json.loads((directory / "run" / "goodput.json").read_text())
    assert (goodput["starts"], goodput["ended"]) == (2, True)
    assert goodput["seconds"]["compile"] > 0


def test_a_directory_with_other_files_is_refused(directory, capsys):
    assert "choose a new one" in refused(["train", *flags(directory, MODEL_DIR=directory)], capsys)


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_reading_a_run_that_is_not_there_is_refused(command, directory, capsys):
    assert "holds no run" in refused([command, f"--model_dir={directory}"], capsys)
    assert "--model_dir" in refused([command], capsys)


def test_unknown_commands_and_flags_are_named(capsys):
    assert "did you mean train" in refused(["trian"], capsys)
    assert "did you mean --model_dir" in refused(["generate", "--modeldir=x"], capsys)
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out


def start(directory: Path, model_dir: Path, *arguments: str, **changes) -> subprocess.Popen:
    """Starts `train` in a process of its own, on one device."""
    settings = flags(directory, MODEL_DIR=model_dir, **changes)
    command = [sys.executable, "-m", "t5x_like", "train", *settings, *arguments]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.Popen(
        [*command, "--num_cpu_devices=1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def trace(model_dir: Path) -> list[tuple]:
    names = ("step", "split", "loss", "grad_norm", "accuracy")
    return [tuple(record.get(name) for name in names) for record in read_metrics(model_dir / "metrics.jsonl")]


def test_a_killed_run_resumes_to_the_same_trace_bit_for_bit(directory):
    """Also: while one process trains, another is refused."""
    changes = {"STEPS": 400, "LoggingConfig.every_steps": 1, "CheckpointConfig.save_every_steps": 50}
    changes["RunConfig.logging"] = "@LoggingConfig()"
    whole, killed = directory / "whole", directory / "killed"
    process = start(directory, whole, **changes)
    assert process.wait(120) == 0, process.communicate()[0]

    process = start(directory, killed, **changes)
    wait_for(lambda: (killed / "checkpoints" / "100").exists(), process)
    second = start(directory, killed, **changes)
    output = second.communicate(timeout=120)[0]
    if process.poll() is None:
        assert second.returncode == 2
        assert f"is in use by process {process.pid}" in output
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < len(trace(killed)) <= len(trace(whole))

    process = start(directory, killed, **changes)
    assert process.wait(120) == 0, process.communicate()[0]
    assert trace(killed) == trace(whole)
    for path in (whole, killed):
        assert (path / "checkpoints" / "400" / "commit_success.txt").exists()


@pytest.mark.multiprocess
def test_a_supervised_run_survives_kills_and_stops_when_told(directory):
    changes = {"STEPS": 400, "LoggingConfig.every_steps": 1, "CheckpointConfig.save_every_steps": 50}
    changes["RunConfig.logging"] = "@LoggingConfig()"
    run = directory / "supervised"
    supervisor = start(directory, run, "--restarts=3", **changes)
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
    for step in (50, 100):
        wait_for((run / "checkpoints" / str(step)).exists, supervisor)
        os.kill(int(children.read_text()), signal.SIGKILL)
    wait_for((run / "checkpoints" / "200").exists, supervisor)
    supervisor.send_signal(signal.SIGINT)
    output = supervisor.communicate(timeout=120)[0]
    assert supervisor.returncode == 0, output
    assert output.count("was killed by SIGKILL: starting it again in 1 s") == 2
    assert "interrupted at step" in output or "complete at step 400" in output
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_deterministic_reaches_xla(directory):
    flag = "import os; print(os.environ['XLA_FLAGS'])"
    code = f"from t5x_like.commands.main import main; main(['evaluate', '--deterministic']); {flag}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.stdout.split() == ["--xla_cpu_enable_fast_math=false", "--xla_gpu_deterministic_ops=true"]


SHIPPED_PARTS = sorted(
    f"{kind}/{path.name}"
    for kind in ("meshes", "optimizers", "data")
    for path in (SHIPPED_RUNS[0].parents[1] / kind).glob("*.gin")
)


@pytest.mark.parametrize("part", SHIPPED_PARTS)
def test_every_shipped_part_fits_a_run(part):
    """It takes the place of the same choice in a run; where it needs another kind of model, the message says so."""
    text = with_includes(SHIPPED_RUNS[0].parents[1] / part)
    given = [f"{name}='x'" for name in ("TEXT_FILES", "CORPUS", "OTHER") if f"{name} = %gin.REQUIRED" in text]
    problem = None
    try:
        parse_config(["runs/quickstart.gin", part], given).build(Experiment)
    except UserError as error:
        problem = str(error)
    assert problem is None or "choose a model and an objective that fit" in problem
