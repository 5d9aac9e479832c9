"""Runs a command in several processes on this machine: a pod in small, on CPU devices.

python scripts/launch_local.py --num_processes=2 -- train --gin_file=runs/quickstart.gin
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_SECONDS = 20
"""How long processes may take to leave after one has failed; then they are killed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or the exit code of the process that failed first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, required=True, help="how many processes")
    parser.add_argument("--devices_per_process", type=int, default=1, help="virtual CPU devices of each (default: 1)")
    parser.add_argument("--heartbeat_seconds", type=int, default=10, help="silence after which one is taken for dead")
    parser.add_argument("command", nargs="+", help="what follows `t5x_like`, after --")
    options = parser.parse_args(argv)
    if options.num_processes < 1 or options.devices_per_process < 1:
        parser.error("--num_processes and --devices_per_process are at least 1")
    port = free_port()
    processes = [start(options, port, index) for index in range(options.num_processes)]
    printers = [threading.Thread(target=show, args=pair) for pair in enumerate(processes)]
    for printer in printers:
        printer.start()
    asked = []

    def stop(number, frame):
        """The first signal asks to save and stop, the second one does not ask."""
        send(processes, signal.SIGKILL if asked else signal.SIGINT)
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = wait(processes)
    for printer in printers:
        printer.join()
    return code


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(options: argparse.Namespace, port: int, index: int) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "t5x_like", *options.command),
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={options.num_processes}",
        f"--process_id={index}",
        f"--num_cpu_devices={options.devices_per_process}",
        f"--heartbeat_seconds={options.heartbeat_seconds}",
    ]
    # Ctrl-C in a terminal reaches this process alone, which passes it on.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def show(index: int, process: subprocess.Popen[str]) -> None:
    """Prints a process's lines with its number before them."""
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def wait(processes: list[subprocess.Popen[str]]) -> int:
    """Returns when all have ended, after the first failure by force."""
    failed_at, code = None, 0
    while any(process.poll() is None for process in processes):
        failed = next((process for process in processes if process.poll()), None)
        if failed is not None and failed_at is None:
            failed_at, code = time.monotonic(), failed.returncode
        if failed_at is not None and time.monotonic() > failed_at + GRACE_SECONDS:
            send(processes, signal.SIGKILL)
        time.sleep(0.05)
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    if code:
        culprit = next(index for index, process in enumerate(processes) if process.returncode == code)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"launch_local: process {culprit} {how}; all have ended.", file=sys.stderr)
    return code if code >= 0 else 128 - code


def send(processes: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
