"""Processes of their own without the seconds that each spends on imports: they are forked from one that has imported
everything and done nothing."""

import os
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate import PartialState

from tests import conftest


_context = get_context("forkserver")
_context.set_forkserver_preload(["torch", "peft", "modeling_dms.training.cli", "tests.tiny", "tests.processes"])


def run(function, *arguments, count=1):
    """Calls a function of a module in `count` processes at once, in each behind its rank where there are several.

    Returns:
        Their exit codes: 0, minus the signal that ended one, as that of one that hung, or 1 after an exception, whose
        traceback is printed.
    """
    ranks = [()] if count == 1 else [(rank,) for rank in range(count)]
    processes = [_context.Process(target=_called, args=(function, *rank, *arguments)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # one that hangs
    return [process.exitcode for process in processes]


def _called(function, *arguments):
    conftest.pytest_configure()
    torch.set_num_threads(1)
    function(*arguments)


def joined(rank, count, store: Path):
    """Makes this process one of several, as the launcher of accelerate would: its environment, and gloo."""
    os.environ.update(ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # asked for, though all have met by the file
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    assert PartialState(cpu=True).num_processes == count
