"""Asks the compiler, in a process of its own, and remembers its answers."""

import functools
import importlib.metadata
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import t5x_like
from t5x_like.errors import UserError
from t5x_like.files import fingerprint, new_file
from t5x_like.planning.plan import Plan, Request

# libtpu must not look for the machine it would run on, nor keep others from loading it.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
PATIENCE = 3600
"""Seconds after which a compiler has got stuck."""
INSTALL = "pip install 't5x_like[plan]'"


class CompilerCrash(UserError):
    """The compiler failed on a step that may be fine: not a mistake in the configuration."""


def has_compiler(platform: str) -> bool:
    """Whether this machine can compile for a `tpu` or `cpu`."""
    return platform == "cpu" or (platform == "tpu" and importlib.util.find_spec("libtpu") is not None)


def compile_plan(request: Request, cache: Path | None = None) -> Plan:
    """The plan of a run by the compiler.

    Args:
      request: what to plan.
      cache: directory of former answers; None: neither looked up nor kept.

    Raises:
      UserError: if the run does not fit together.
      CompilerCrash: if the compiler fails.
    """
    kept = None if cache is None else cache / f"{_key(request)}.pickle"
    if kept is not None and kept.exists():
        return pickle.loads(kept.read_bytes())
    with tempfile.TemporaryDirectory(prefix="t5x_like-plan-") as directory:
        answer = _ask(request, Path(directory))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_file(kept) as aside:
            aside.write_bytes(pickle.dumps(answer))
    return answer


def _ask(request: Request, directory: Path) -> Plan:
    question, answer, dump, log = (directory / name for name in ("request", "answer", "dump", "log"))
    question.write_bytes(pickle.dumps(request))
    dump.mkdir()
    command = [sys.executable, "-m", "t5x_like.planning.worker", str(question), str(answer), str(dump)]
    environment = _environment(request, dump)
    try:
        with open(log, "wb") as output:
            code = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=PATIENCE).returncode
    except subprocess.TimeoutExpired as error:
        raise CompilerCrash(f"The compiler was stopped after {PATIENCE / 60:.0f} minutes without an answer.") from error
    if not answer.exists():
        raise CompilerCrash(_explain(log.read_text(errors="replace"), code))
    result = pickle.loads(answer.read_bytes())
    if isinstance(result, UserError):
        raise result
    return result


def _environment(request: Request, dump: Path) -> dict[str, str]:
    topology = request.topology
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
    package = str(Path(t5x_like.__file__).parent.parent)
    paths = [package, os.getcwd(), os.environ.get("PYTHONPATH", "")]  # where plugins may be
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache writes no account of itself
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if topology.chip.platform == "tpu":
        return environment | LIBTPU_ENVIRONMENT
    return environment | {"JAX_NUM_CPU_DEVICES": str(topology.num_devices)}


def _explain(log: str, code: int) -> str:
    """One message for what a dead compiler left in its log."""
    if re.search(r"libtpu_lockfile|libtpu.*already in use|Unable to acquire.*lock", log):
        return "libtpu is locked by another process, or by one that was killed: remove /tmp/libtpu_lockfile, try again."
    if re.search(r"(PJRT|libtpu).*(version|incompatible|mismatch)", log, re.IGNORECASE):
        jax_version = importlib.metadata.version("jax")
        return f"libtpu does not fit jax {jax_version}: {INSTALL} 'jax[tpu]=={jax_version}' installs the one that does."
    lines = [line for line in log.splitlines() if line.strip()]
    error = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), "")
    tail = error or (lines[-1] if lines else "it wrote nothing")
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"The compiler failed ({ended}): {tail[:500]}"


def _key(request: Request) -> str:
    """Of everything that the answer depends on."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    if request.topology.chip.platform == "tpu":
        versions.append(importlib.metadata.version("libtpu"))
    facts = (repr(request), versions, _source_digest(), os.environ.get("XLA_FLAGS", ""))
    return fingerprint(repr(facts))


@functools.cache
def _source_digest() -> str:
    return fingerprint(b"".join(path.read_bytes() for path in sorted(Path(t5x_like.__file__).parent.rglob("*.py"))))
