import subprocess
import sys

import pytest

from mmtrain.errors import ConfigError
from mmtrain.logging import LazyVisualizer, VisualizerWriter, build_visualizer

TENSORBOARD = {"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}, {"type": "LocalVisBackend"}]}


def steps_and_values(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_curves(tmp_path):
    visualizer = build_visualizer(TENSORBOARD, save_dir=tmp_path, name="run_a")
    writer = VisualizerWriter(visualizer)
    writer.write({"epoch": 1, "iter": 10, "loss": 0.5}, 10)
    writer.write({"epoch": 1, "iter": 10, "loss": 0.25}, 10, kind="val")
    writer.flush()
    found = steps_and_values(tmp_path / "vis_data")  # flushed: a SIGKILL now would lose nothing
    writer.close()
    assert found["loss"] == [(10, 0.5)]
    assert found["val/loss"] == [(10, 0.25)]
    assert not (tmp_path / "vis_data" / "scalars.json").exists()


def test_the_default_is_made_only_when_it_is_used(tmp_path):
    import numpy as np

    visualizer = build_visualizer(None, save_dir=tmp_path, name="run_b")
    assert isinstance(visualizer, LazyVisualizer)
    writer = VisualizerWriter(visualizer)
    writer.write({"loss": 1.0}, 1)
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []
    visualizer.add_image("picture", np.zeros((4, 4, 3), dtype=np.uint8), step=3)
    assert (tmp_path / "vis_data" / "vis_image" / "picture_3.png").exists()


def test_an_object_is_returned_as_it_is(tmp_path):
    own = object()
    assert build_visualizer(own, save_dir=tmp_path) is own
    VisualizerWriter(own).write({"loss": 1.0}, 1)


@pytest.mark.parametrize(
    ("cfg", "path"),
    [
        ({"type": "Visualiser"}, "visualizer.type"),
        ({"type": "Visualizer", "vis_backends": [{"type": "TensorBoard"}]}, r"visualizer.vis_backends\[0\]"),
    ],
)
def test_a_wrong_name_is_reported_with_its_path(tmp_path, cfg, path):
    with pytest.raises(ConfigError, match=path):
        build_visualizer(cfg, save_dir=tmp_path)


def test_without_a_visualizer_in_the_config_nothing_heavy_is_imported(tmp_path):
    code = (
        "import sys\n"
        "from mmtrain.logging import VisualizerWriter, build_visualizer\n"
        f"VisualizerWriter(build_visualizer(None, save_dir={str(tmp_path)!r})).write({{'loss': 1.0}}, 1)\n"
        "print(sorted({'matplotlib', 'mmengine.visualization'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
