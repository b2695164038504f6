"""Scalars, log lines, the progress bar, and where they are written."""

from mmtrain.logging.console import make_logger
from mmtrain.logging.cut import cut_logs
from mmtrain.logging.lines import LinePosition, format_seconds, format_train_line, format_val_line
from mmtrain.logging.progress_bar import ProgressBar, Shown
from mmtrain.logging.scalars import ScalarReader, Scalars
from mmtrain.logging.starts import LogPosition, note_start, starts_of
from mmtrain.logging.tail import cut_events, cut_json_lines
from mmtrain.logging.terminal import LiveLine, live_line
from mmtrain.logging.visualizer import LazyVisualizer, build_visualizer
from mmtrain.logging.writers import ConsoleWriter, JsonLinesWriter, ScalarWriter, VisualizerWriter

__all__ = [
    "ConsoleWriter",
    "JsonLinesWriter",
    "LazyVisualizer",
    "LinePosition",
    "LiveLine",
    "LogPosition",
    "ProgressBar",
    "ScalarReader",
    "ScalarWriter",
    "Scalars",
    "Shown",
    "VisualizerWriter",
    "build_visualizer",
    "cut_events",
    "cut_json_lines",
    "cut_logs",
    "format_seconds",
    "format_train_line",
    "format_val_line",
    "live_line",
    "make_logger",
    "note_start",
    "starts_of",
]
