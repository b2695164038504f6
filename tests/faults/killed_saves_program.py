"""Reads ``scene k root`` lines; for each, a child process does the scene's save and is killed in call k."""

import os
import sys

from disturbed_saves import play
from faulty_files import FaultyFiles


def main() -> None:
    for line in sys.stdin.read().splitlines():
        scene, k, root = line.split(maxsplit=2)
        child = os.fork()
        if child == 0:
            from pathlib import Path

            play(scene, Path(root), FaultyFiles("kill", int(k)), blocking=int(k) % 2 == 0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
