"""Run checks on two ranks, each a process on this machine, and report how every check ended on each rank."""

import gc
import json
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

RANKS = 2
PASSED = "passed"
SOON = timedelta(seconds=120)  # a rank that waits longer for the others has hung


def launch(module, folder, timeout=900, count=RANKS):
    """Run the checks of a module on all ranks.

    Returns the outcome of each check, by name and rank. A check is missing if it hung, or if an earlier one failed or
    hung.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch and transformers once for all ranks
    context.set_forkserver_preload(["tests.training.runs"])
    ranks = [context.Process(target=_run_rank, args=(rank, count, module, str(folder))) for rank in range(count)]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + timeout
    try:
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < until:
            if any(rank.exitcode for rank in ranks):  # the others may be waiting for the one that failed
                until = min(until, time.monotonic() + 30)
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    ended = {}
    for number in range(count):
        path = Path(folder) / f"{number}.json"
        for name, outcome in (json.loads(path.read_text()) if path.exists() else {}).items():
            ended.setdefault(name, {})[number] = outcome
    for number in range(count):
        ended[f"log of rank {number}"] = (Path(folder) / f"{number}.log").read_text(errors="replace")[-3000:]
    return ended


def _run_rank(rank, count, module, folder):
    """Run a module in this process as one of several ranks."""
    log = os.open(Path(folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    # As torchrun sets them; nothing connects to this address, since the ranks meet through a file.
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TQDM_DISABLE": "1"}
    sys.argv = [module, folder]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def require_passed(ended, check, count=RANKS):
    """Fail unless a check has passed on every rank."""
    outcome = ended.get(check, {})
    if outcome != dict.fromkeys(range(count), PASSED):
        known = "\n".join(f"rank {rank}: {text}" for rank, text in outcome.items()) or "it did not run"
        logs = "\n".join(f"{name}: {text}" for name, text in ended.items() if name.startswith("log of"))
        raise AssertionError(f"{check}: {known}\n{logs}")


def run(checks, prepare):
    """Run the checks on this rank, up to the first failure; each is given what `prepare` returns."""
    torch.set_num_threads(1)
    gc.freeze()  # what is imported need not be scanned in the full collection of every Trainer.train()
    folder, rank, count = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=SOON)
    given = prepare(folder)
    ended = {}
    for name, check in checks.items():
        try:
            check(given)
            distributed.barrier()  # no rank continues before all have passed
            ended[name] = PASSED
        except BaseException:
            ended[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(ended))
        if ended[name] != PASSED:
            os._exit(1)
    distributed.destroy_process_group()


def gathered(value):
    """Return the values of all ranks."""
    every = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, value)
    return every


def require_alike(value):
    """Fail unless the tensor is bit-identical on all ranks."""
    first, *others = gathered(value)
    assert all(torch.equal(first, other) for other in others), "the ranks differ"
