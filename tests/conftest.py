"""The tests run on the CPU, also where there is a GPU, but for those that ask for one by the fixture `cuda`."""

import os
import signal

import matplotlib
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    torch.cuda.init()  # what the tests start sees no GPU, this process does
    torch.cuda.device_count()  # which torch keeps from here on
os.environ["CUDA_VISIBLE_DEVICES"] = ""
matplotlib.use("agg")  # no windows
os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())  # with the list of fonts, which takes seconds to make
torch.accelerator.current_accelerator = lambda check_available=False: None
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name):  # the tests send them; what started the tests may ignore them, as nohup does
        signal.signal(getattr(signal, name), handler)


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, which no test may write into, is one of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "simple-ddpm"


@pytest.fixture
def cuda():
    if not HAS_GPU:
        pytest.skip("needs a GPU")
    return "cuda"
