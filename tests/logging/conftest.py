def pytest_configure(config):
    # MMEngine 0.10.7 imports torch.distributed.optim, which torch 2.13 warns about.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")
