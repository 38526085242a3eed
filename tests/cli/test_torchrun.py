"""`torchrun ... -m gka train --context-parallel 2`: several nodes, a process that dies, and errors.

The processes are forks (`elastic_run`); the agents that start, watch and end them are those of torchrun.
"""

from __future__ import annotations

import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forked import Done, run_forked
from tiny_run import SETTINGS, command, logged, train, write_texts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
RUN = {**SETTINGS, "max_steps": 4, "save_every": 2, "eval_every": 4, "sample_tokens": 0}
KILLED = ("gka.distributed.op:states_before", "6")  # the last of two layers in step 3, after checkpoint 2


def torchrun(*options: str, kill: tuple[str, str] | None = None, arguments: list[str]) -> Done:
    killed = () if kill is None else ("--kill", *kill)
    return run_forked("-m", "elastic_run", *killed, *options, "-m", "gka", *arguments, check=False, timeout=60)


def two_nodes(*arguments: list[str]) -> list[Done]:
    """An agent for each of two command lines."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])

    def agent(node: int) -> Done:
        place = ("--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1")
        return torchrun(*place, "--master_addr", "localhost", "--master_port", port, arguments=arguments[node])

    with ThreadPoolExecutor(2) as agents:
        return list(agents.map(agent, range(2)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("torchrun") / "texts")


@pytest.fixture(scope="module")
def whole(texts: Path) -> Path:
    """A run of two nodes that nothing disturbs."""
    output = texts.with_name("whole")
    arguments = command("train", output=output, data=[texts], context_parallel=2, **RUN)
    for done in two_nodes(arguments, arguments):
        assert done.returncode == 0, done.stderr
    return output


def test_two_nodes_are_one_process(whole: Path, texts: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "one", texts, **{**RUN, "save_every": 4}) == 0
    for key in ("loss", "grad_norm", "eval_loss"):
        shared, one = logged(whole, key), logged(tmp_path / "one", key)
        assert shared == pytest.approx(one, rel=1e-4) and one, key


def test_a_killed_process_ends_the_run_which_resumes(whole: Path, texts: Path, tmp_path: Path) -> None:
    """The other one would wait for it. torchrun says which one was killed. The resumed run is the whole one."""
    output = tmp_path / "run"
    arguments = command("train", output=output, data=[texts], context_parallel=2, **RUN)
    processes = ("--standalone", "--nproc_per_node", "2")
    done = torchrun(*processes, kill=KILLED, arguments=arguments)
    assert done.returncode == 1 and not (output / "model").exists()
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 .*SIGKILL", done.stderr), done.stderr
    resumed = torchrun(*processes, arguments=[*arguments, "--resume"])
    assert resumed.returncode == 0 and "resumed at step 2" in resumed.stderr, resumed.stderr
    for key in ("loss", "grad_norm", "eval_loss"):
        assert logged(output, key) == logged(whole, key), key


def test_an_error_of_all_processes_is_told(texts: Path, tmp_path: Path) -> None:
    """Whichever ends first: torchrun ends the others, also the one that prints the error."""
    arguments = command("train", output=tmp_path / "run", data=[texts], context_parallel=2, **RUN)
    done = torchrun("--standalone", "--nproc_per_node", "3", arguments=arguments)
    cause = done.stderr.partition("Root Cause")[2]
    assert "gka train: error: --context-parallel 2 needs a multiple of 2 processes, there are 3" in cause
    assert "exitcode  : 2" in cause and not (tmp_path / "run").exists()


def prepared_wrongly(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What only the first process finds when it prepares a run: options, and a part of the error."""
    (folder / "other").mkdir()
    (folder / "other" / "mine.txt").touch()
    return {
        "text": ({"batch_size": 400}, "too little text: "),
        "used": ({"output": folder / "other"}, f"--output {folder / 'other'}: is not empty"),
        "resume": ({"resume": True}, "--resume: there is no run in "),
    }


@pytest.mark.parametrize("name", ("text", "used", "resume"))
def test_an_error_of_the_first_process_is_told_by_all(texts: Path, tmp_path: Path, name: str) -> None:
    """Whichever ends first, its line is the cause, not an error that follows from it."""
    options, reason = prepared_wrongly(tmp_path)[name]
    arguments = command("train", **{**RUN, "output": tmp_path / "run", "data": [texts], **options})
    done = torchrun("--standalone", "--nproc_per_node", "2", arguments=arguments)
    assert f"gka train: error: {reason}" in done.stderr.partition("Root Cause")[2]
    told = {line.partition("gka train: ")[2] for line in done.stderr.splitlines() if "gka train: error" in line}
    assert len(told) == 1 and not (tmp_path / "run").exists(), told


def test_nodes_with_other_options_are_refused(texts: Path, tmp_path: Path) -> None:
    first, second = (
        command("train", output=tmp_path / "run", data=[texts], context_parallel=2, **{**RUN, "seq_len": seq_len})
        for seq_len in (32, 16)
    )
    for done in two_nodes(first, second):
        assert done.returncode == 1
        assert "--seq-len is 32 in process 0 and 16 in process 1; give all" in done.stderr
    assert not (tmp_path / "run").exists()
