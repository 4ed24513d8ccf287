"""The tests run on the CPU, also where there is a GPU, but for those that ask for one by the fixture `cuda`."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    torch.cuda.init()  # what the tests start sees no GPU, this process does
    torch.cuda.device_count()  # which torch keeps from here on
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.accelerator.current_accelerator = lambda check_available=False: None


@pytest.fixture
def cuda():
    if not HAS_GPU:
        pytest.skip("needs a GPU")
    return "cuda"
