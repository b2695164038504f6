"""Cuts logs at a position, so that the curves of a resumed run have no point twice."""

import math
from collections.abc import Sequence
from pathlib import Path

from mmtrain.logging.starts import LogPosition, read_start
from mmtrain.logging.tail import cut_events, cut_json_lines


def cut_logs(log_dirs: Sequence[str | Path], position: LogPosition) -> dict[Path, int]:
    """Cut the scalar and TensorBoard files in ``<log_dir>/vis_data`` of each directory after ``position``.

    The directories are in the order of their starts. Files change only when something is dropped.
    Returns the files changed and the records dropped from each.
    """
    dropped: dict[Path, int] = {}
    counts_alike = True  # from that start to the position no other batch size came between
    for log_dir in reversed(log_dirs):
        noted = read_start(Path(log_dir))
        start = None if noted is None else noted.position
        if start is not None and 0 < start.samples <= position.samples:
            counts_alike = counts_alike and start.counts_like(position)
        step = _last_step(start, position, counts_alike=counts_alike)
        for path in sorted((Path(log_dir) / "vis_data").glob("*")):
            if path.name == "scalars.json":
                dropped[path] = cut_json_lines(path, step)
            elif path.name.startswith("events.out.tfevents"):
                dropped[path] = cut_events(path, step)
    return {path: count for path, count in dropped.items() if count}


def _last_step(start: LogPosition | None, position: LogPosition, *, counts_alike: bool) -> float:
    """The last step to keep of a start's logs.

    Where another batch size came between, the start was cut to the step when that one began. So the estimate from
    samples only decides over logs that do not lead to the position, and must never be too small for those that do.
    """
    if start is None:
        return position.iteration
    if position.samples < start.samples:
        return 0  # everything is dropped, except the header of an event file
    if counts_alike and start.counts_like(position):
        return position.iteration
    ahead = position.samples - start.samples
    if ahead and not start.mean_batch:
        return math.inf
    return start.iteration + math.ceil(ahead / (start.mean_batch or 1))
