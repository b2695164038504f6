"""Saves in the background of several ranks: hooks hear of them at the same step."""


def test_after_save_checkpoint_fires_at_the_same_iteration_on_every_rank(pair, tmp_path):
    """Rank 1's writers are slow; the hook communicates, so ranks that fired at different steps would wait for ever."""
    first, second = pair.run("save_jobs", "iterations_of_saves", work_dir=str(tmp_path))
    assert first == second
    assert [name for name, _ in first] == ["iter_4.pth", "iter_12.pth", "iter_20.pth", "iter_24.pth"]
    in_background = [iteration for name, iteration in first if name != "iter_24.pth"]
    assert all(iteration > int(name[5:-4]) for (name, _), iteration in zip(first, in_background, strict=False))
