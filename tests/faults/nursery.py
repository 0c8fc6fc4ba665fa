"""A process that has imported everything and forks ranks: a run starts in a second, so hundreds can be broken.

python tests/faults/nursery.py, then a JSON line on stdin for each run: {"ranks", "arguments", "port", "log", "break"}.
It answers with a line each: {"pids"} when the ranks are there, {"codes", "seconds"} when all have ended (negative:
by a signal; seconds since the first did).
The ranks of a run are a process group of their own. `break` is what breaking.py does in them.
"""

import gc
import json
import os
import signal
import sys
import threading
import time

import breaking

# Imported before the ranks are forked, and what a first use would import.
import transformers.models.llama.modeling_llama  # noqa: F401

from distill.cli import main
from distill.console import leave

_MOST_SECONDS, _GRACE_SECONDS, _UNSEEN_SECONDS = 180, 30, 0.5


def rank(number: int, job: dict) -> None:
    os.setpgid(0, job["group"] or os.getpid())
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((0, nothing), (1, log), (2, log)):
        os.dup2(new, old)
    ranks, port = job["ranks"], job["port"]
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.get("break"):
        breaking.prepare(job["break"], number)
    leave(main(["train", *job["arguments"]]))


def run(job: dict) -> None:
    pids: list[int] = []
    for number in range(job["ranks"]):
        job["group"] = pids[0] if pids else 0
        pid = os.fork()
        if pid == 0:
            rank(number, job)
        if not pids:
            os.setpgid(pid, pid)
        pids.append(pid)
    print(json.dumps({"pids": pids}), flush=True)
    codes: dict[int, int] = {}
    first, told = 0.0, False
    # A run that hangs is a finding too.
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(pids[0], signal.SIGKILL))
    signal.alarm(_MOST_SECONDS)
    while len(codes) < len(pids):
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        first = first or time.monotonic()
        if not codes and ended.si_code != os.CLD_EXITED:
            # DeepSpeed's launcher looks once a second: until then the other ranks can see what killed this one.
            time.sleep(_UNSEEN_SECONDS)
        pid, status = os.waitpid(ended.si_pid, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0 and not told:
            # As DeepSpeed's launcher does.
            told = True
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGTERM)
            signal.alarm(_GRACE_SECONDS)
    signal.alarm(0)
    seconds = time.monotonic() - first
    print(json.dumps({"codes": [codes[pid] for pid in pids], "seconds": seconds}), flush=True)


if __name__ == "__main__":
    # A thread would be missing in the ranks, with whatever it holds.
    assert len(os.listdir("/proc/self/task")) == threading.active_count() == 1, os.listdir("/proc/self/task")
    gc.freeze()  # the ranks need not look through all of that
    for line in sys.stdin:
        run(json.loads(line))
