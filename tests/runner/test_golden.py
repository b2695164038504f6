"""The first losses of a tiny run, bit for bit: a refactoring must not change them."""

import struct

import pytest
from parts import logged, make_runner

# float32 losses of iterations 1 to 20 on a CPU, as hexadecimal bytes (little endian), by the size of the data set:
# batches of 8, and windows of two that are all equal or of which some are 8 + 4.
GOLDEN = {
    48: """
97cb523f 6321083f 18a2303f c9ae4c3f 8943293f ded8223f 8a6c1b3f dc99223f 436f293f df351b3f 0cd4dd3e
e353443f 757a3e3f b2d2273f 7e4d3f3f 94e5183f 2c98073f e4403e3f 94f9433f bdfd313f
""".split(),
    44: """
d1fd023f 7ecb413f d667213f 48194c3f ae8c2c3f 1e46123f ac011e3f b2eb2f3f f69cfa3e 3e7d083f 0984363f
f2125c3f dd93033f c20a273f 2df3fb3e 8c0c1c3f bedb303f 68ce7a3f 6e42293f d6f8143f
""".split(),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_the_first_twenty_losses(size, tmp_path):
    optim = {"accumulative_counts": 2, "clip_grad": {"max_norm": 1.0}}
    data = {"dataset": {"type": "NoisyPoints", "size": size}}
    make_runner(tmp_path, optim_wrapper=optim, train_dataloader=data).train()
    losses = logged(tmp_path, "loss")
    assert [struct.pack("<f", losses[step][0]).hex() for step in range(1, 21)] == GOLDEN[size]
