"""The first losses of a tiny run, bit for bit: a refactoring must not change them."""

import struct

from parts import logged, make_runner

# float32 losses of iterations 1 to 20 on a CPU, as hexadecimal bytes (little endian).
GOLDEN = """
d1fd023f 7ecb413f d667213f 48194c3f ae8c2c3f 1e46123f 841a1e3f 90f32f3f 910afa3e 0402083f a685363f
fa015c3f bb57033f 4cef263f aaf6fb3e 5a4c1c3f 2ea7303f b4db7a3f eea9283f efb1153f
""".split()


def test_the_first_twenty_losses(tmp_path):
    make_runner(tmp_path, optim_wrapper={"accumulative_counts": 2, "clip_grad": {"max_norm": 1.0}}).train()
    losses = logged(tmp_path, "loss")
    assert [struct.pack("<f", losses[step][0]).hex() for step in range(1, 21)] == GOLDEN
