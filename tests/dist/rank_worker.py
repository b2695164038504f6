"""One rank of a persistent group of processes: runs the jobs that come as JSON lines, answers with JSON lines.

A job is ``{"module": ..., "function": ..., "kwargs": {...}}``; an answer has ``result`` or ``error``. A persistent
group saves each test the seconds in which a process imports torch.
"""

import faulthandler
import importlib
import json
import os
import sys
import traceback

import torch

from mmtrain import launch


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    launch.join()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            function = getattr(importlib.import_module(job["module"]), job["function"])
            answer = {"result": function(**job["kwargs"])}
        except BaseException as error:  # the group continues
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
