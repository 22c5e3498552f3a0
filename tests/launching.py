"""
Runs training scripts as `accelerate launch` does, in processes forked from one that has imported everything.

A launch spends 5 to 7 seconds of CPU in every process on imports, and one to five on training a tiny model. Here a
server, `python -m tests.launching`, imports once for all tests of a pytest process. Each rank is still a new process: it
reads the launch configuration with Accelerate's own code, and starts from the environment that Accelerate and torchrun
make. `tests/distributed/test_launching.py` compares this with real launches.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
PRELOADED = [
    "accelerate.commands.launch",
    "deepspeed.runtime.zero.stage3",
    "matplotlib.backends.backend_agg",
    "networkx",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "hy_prfl.trainers.dry_run",
    "hy_prfl.trainers.prfl_trainer",
    "hy_prfl.trainers.reward_trainer",
]
# When a rank has failed, the others get this long to print why they failed too. Then they are killed.
GRACE_SECONDS = 2.0

# Only the tests' process has it, once it has launched for the first time. It ends with that process.
server: "subprocess.Popen[str] | None" = None


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_launch(
    launch: Sequence[str],
    module: str,
    options: Sequence[str],
    *,
    num_processes: int,
    environment: Mapping[str, str],
    timeout: float = 900,
) -> "subprocess.CompletedProcess[str]":
    """
    Run `accelerate launch <launch> -m <module> <options>`, and return its exit status and what it printed.

    Args:
        launch (`Sequence[str]`):
            Options of `accelerate launch`.
        num_processes (`int`):
            Ranks to start: the number that `launch` leads to.
        environment (`Mapping[str, str]`):
            The whole environment of the launch.
        timeout (`float`, defaults to 900):
            Seconds after which all ranks are killed. On a busy machine DeepSpeed compiles its kernels for minutes.

    Raises:
        TimeoutError: If a rank has not ended by then.
    """
    global server
    if server is None or server.poll() is not None:
        # What libraries read when they are imported.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        imported = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "tests.launching"]
        server = subprocess.Popen(
            command, cwd=ROOT, env=imported, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        output.touch()
        errors.touch()
        request = {
            "num_processes": num_processes, "timeout": timeout, "launch": list(launch), "module": module,
            "options": list(options), "environment": dict(environment), "folder": os.getcwd(),
            "output": str(output), "errors": str(errors),
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        printed = output.read_text(), errors.read_text()
    command = [*launch, "-m", module, *options]
    if not answer:
        raise RuntimeError(f"The server of launches has died of {' '.join(command)}\n{printed[0]}\n{printed[1]}")
    code = json.loads(answer)
    if code is None:
        raise TimeoutError(f"{' '.join(command)}: not ended after {timeout} s\n{printed[0]}\n{printed[1]}")
    return subprocess.CompletedProcess(command, code, *printed)


def launch_environment(launch: Sequence[str], module: str) -> dict[str, str]:
    """Environment that `accelerate launch <launch> -m <module>` gives to all ranks of one machine."""
    # As `launch_command` of that file does.
    from accelerate.commands import launch as accelerate_launch

    parser = accelerate_launch.launch_command_parser()
    args, defaults, has_precision = accelerate_launch._validate_launch_command(
        parser.parse_args([*launch, "-m", module])
    )
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        environment = accelerate_launch.prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu:
        environment = accelerate_launch.prepare_multi_gpu_env(args)
    else:
        return accelerate_launch.prepare_simple_launcher_cmd_env(args)[1]
    return {**environment, "WORLD_SIZE": str(args.num_processes), "LOCAL_WORLD_SIZE": str(args.num_processes)}


def run_rank(rank: int, port: int, request: Mapping[str, Any]) -> None:
    """Run the module of a request as one rank, in the process that was forked for it."""
    for stream, file in ((0, os.devnull), (1, request["output"]), (2, request["errors"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.update(launch_environment(request["launch"], request["module"]))
    if "WORLD_SIZE" in os.environ:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [request["module"], *request["options"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def supervise(request: Mapping[str, Any]) -> int | None:
    """Run all ranks of a request. Returns the exit status of the first that failed, 0, or nothing if it took too long."""
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=run_rank, args=(rank, port, request)) for rank in range(request["num_processes"])]
    for rank in ranks:
        rank.start()
    running: dict[Any, Any] = {rank.sentinel: rank for rank in ranks}
    deadline, failed = time.monotonic() + request["timeout"], 0
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        for rank in [running.pop(sentinel) for sentinel in ended]:
            rank.join()
            if rank.exitcode and not failed:
                failed, deadline = rank.exitcode, min(deadline, time.monotonic() + GRACE_SECONDS)
        if not ended:
            break
    for rank in running.values():
        rank.kill()
        rank.join()
    return None if running and not failed else failed


def main() -> None:
    """Serve launches: a request is a line of JSON in standard input, and so is its exit status in standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(supervise(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
