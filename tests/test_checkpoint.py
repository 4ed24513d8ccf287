import itertools
import multiprocessing
import os
import pickle
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint import atomic_file, load_checkpoint, save_checkpoint
from model import U_net
from noise import SAMPLERS, NoiseScheduler, gaussian_noise, image_generators

SHIPPED = Path(__file__).parents[1] / "Save_model" / "model_DDPM.pth"


def small_network(**arguments):
    return U_net(**{"t_dim": 8, "widths": (8, 16)} | arguments)


def test_round_trip(tmp_path):
    state = {"weight": torch.arange(6.0).view(2, 3), "nested": {"epoch": 3, "losses": [0.5, 0.25], "name": "ü"}}
    path = tmp_path / "a folder" / "not there yet" / "state.pth"
    save_checkpoint(state, path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("weight"), state.pop("weight")) and loaded == state
    assert os.listdir(path.parent) == ["state.pth"]


def test_network_and_metadata_come_back_from_the_file_alone(tmp_path):
    model = small_network(in_channels=3)
    model.metadata = {"image_size": 32, "noise_schedule": {"num_timesteps": 50}}
    save_checkpoint(model.state_dict(), tmp_path / "model.pth")
    loaded = U_net.from_checkpoint(tmp_path / "model.pth")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 40])
    assert torch.equal(loaded(x, t), model(x, t))
    assert loaded.network == model.network and loaded.metadata == model.metadata


def test_what_a_checkpoint_does_not_say_is_named(tmp_path):
    model = small_network(num_classes=2)
    save_checkpoint(model.state_dict(), tmp_path / "own_loop.pth")
    loaded = U_net.from_checkpoint(tmp_path / "own_loop.pth")
    with pytest.raises(ValueError, match="noise_schedule: the checkpoint does not say it; set model.metadata"):
        loaded.metadata["noise_schedule"]
    assert loaded.metadata.get("classes", []) == []


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save, load_unsafely", [
    (torch.save, lambda path: torch.load(path, weights_only=False)),
    (lambda state, path: path.write_bytes(pickle.dumps(state)), lambda path: pickle.loads(path.read_bytes()))])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, save, load_unsafely):
    Evil.target, path = tmp_path / "ran", tmp_path / "evil.pth"
    save({"weight": Evil()}, path)
    for load in (load_checkpoint, U_net.from_checkpoint):
        with pytest.raises(ValueError, match="evil.pth: refused"):
            load(path)
    assert not Evil.target.exists()
    load_unsafely(path)
    assert Evil.target.exists()  # so it was there to be run


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match="model.pth: no such checkpoint"):
        load_checkpoint(path)
    small = small_network()
    save_checkpoint(small.state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.pth: refused"):
            load_checkpoint(path)
    at = whole.index(small.state_dict()["out.weight"].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])  # one bit of one weight
    torch.load(path, weights_only=True)  # which does not see it
    with pytest.raises(ValueError, match="model.pth: refused, it is damaged"):
        load_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_checkpoint(path)
    weights = small_network().state_dict()
    for foreign in ({"epoch": 1}, {"_extra_state": None}, weights | {"_extra_state": {"network": {"depth": 9}}},
                    {name: value for name, value in weights.items() if name != "out.bias"}):
        save_checkpoint(foreign, path)
        with pytest.raises(ValueError, match="model.pth: not a checkpoint of this U_net"):
            U_net.from_checkpoint(path)


@pytest.mark.parametrize("load", [load_checkpoint, U_net.from_checkpoint])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")])
def test_a_file_that_does_not_fit_in_memory_is_not_called_damaged(monkeypatch, load, error):
    def full(*_, **__):
        raise error
    monkeypatch.setattr("torch.load" if load is load_checkpoint else "model.U_net.load_state_dict", full)
    with pytest.raises(type(error), match="memory") as raised:
        load(SHIPPED)
    assert raised.value is error


def test_a_value_that_could_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "model.pth"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(ValueError, match="model.pth: not written"):
        save_checkpoint({"data_path": Path("images")}, path)
    assert load_checkpoint(path) == {"epoch": 1}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left on device: '.*pth'"):
        save_checkpoint({"epoch": 2}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pth"]


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    """As on Windows, where a folder cannot be opened, and on some mounted disks."""
    flush, flushed = os.fsync, []

    def of_files_alone(number):
        if os.path.stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        flushed.append(number)
        flush(number)
    monkeypatch.setattr(os, "fsync", of_files_alone)
    save_checkpoint({"epoch": 1}, tmp_path / "model.pth")

    def refused(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "open", refused)
    save_checkpoint({"epoch": 2}, tmp_path / "model.pth")
    assert load_checkpoint(tmp_path / "model.pth") == {"epoch": 2} and len(flushed) == 2


def test_a_save_waits_for_a_reader_where_the_system_refuses_to_replace_its_file(tmp_path, monkeypatch):
    """As Windows does: two tries fail, or all."""
    path, replace, tries = tmp_path / "model.pth", os.replace, []
    save_checkpoint({"epoch": 1}, path)

    def busy(old, new):
        tries.append(new)
        if len(tries) < 3:
            raise PermissionError(13, "Access is denied")
        replace(old, new)
    monkeypatch.setattr(os, "replace", busy)
    save_checkpoint({"epoch": 2}, path)
    assert load_checkpoint(path) == {"epoch": 2} and len(tries) == 3

    def always_busy(*_):
        raise PermissionError(13, "Access is denied")
    monkeypatch.setattr(os, "replace", always_busy)
    clock = itertools.count(step=0.1)
    monkeypatch.setattr("checkpoint.time", SimpleNamespace(
        time=time.time, monotonic=lambda: next(clock), sleep=lambda seconds: None))
    with pytest.raises(PermissionError):
        save_checkpoint({"epoch": 3}, path)
    assert load_checkpoint(path) == {"epoch": 2} and os.listdir(tmp_path) == ["model.pth"]


def save_forever(path, started):
    torch.set_num_threads(1)  # the threads of the parent are not in its fork
    for number in itertools.count():
        save_checkpoint({"number": number, "weight": torch.full((100_000,), float(number))}, path)
        started.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its fifty children by fork, for speed")
def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path):
    path, fork, moments = tmp_path / "state.pth", multiprocessing.get_context("fork"), random.Random(0)
    for _ in range(50):
        started = fork.Event()
        child = fork.Process(target=save_forever, args=(path, started), daemon=True)
        child.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.02))
        child.kill()
        child.join()
        state = load_checkpoint(path)
        assert (state["weight"] == state["number"]).all()
    for left in set(tmp_path.iterdir()) - {path} | {tmp_path / ".state.pth.0.tmp"}:  # one at least
        assert left.match(".state.pth.*.tmp")
        left.touch()
        os.utime(left, (0, 0))
    save_checkpoint({"epoch": 1}, path)
    assert os.listdir(tmp_path) == ["state.pth"]


def test_of_two_that_write_one_file_each_is_whole(tmp_path):
    path = tmp_path / "state.pth"
    with atomic_file(path) as slow:
        slow.write(b"one ")
        with atomic_file(path) as quick:
            quick.write(b"two")
        assert path.read_bytes() == b"two"
        slow.write(b"and all the rest")
    assert path.read_bytes() == b"one and all the rest" and os.listdir(tmp_path) == ["state.pth"]


@pytest.mark.parametrize("arguments, message", [
    ({"in_channels": 3}, "in_channels: the checkpoint has 1, this network has 3"),
    ({"t_dim": 16}, "t_dim: the checkpoint has 8, this network has 16"),
    ({"widths": (8, 8)}, r"widths: the checkpoint has \(8, 16\), this network has \(8, 8\)")])
def test_a_mismatch_names_the_field_and_both_values_and_changes_nothing(tmp_path, arguments, message):
    save_checkpoint(small_network().state_dict(), tmp_path / "model.pth")
    model = small_network(**arguments)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(torch.load(tmp_path / "model.pth"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_shipped_checkpoint_loads_by_the_documented_snippet():
    device = "cpu"
    model = U_net(device, in_channels=1)
    model.load_state_dict(torch.load(os.path.join(SHIPPED.parent, "model_DDPM.pth"), map_location=device))
    rebuilt = U_net.from_checkpoint(SHIPPED)
    assert rebuilt.metadata["image_size"] == 28
    assert rebuilt.metadata["noise_schedule"] == {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    x, t = torch.randn(1, 1, 28, 28), torch.tensor([500])
    assert torch.equal(model(x, t), rebuilt(x, t))


@pytest.mark.parametrize("name, channels, size, weights", [
    ("model_DDPM", 1, 28, 1_592_641), ("model_DDPM_large", 1, 28, 2_298_500), ("model_faces", 3, 32, 2_304_908)])
def test_the_shipped_checkpoints_describe_themselves_and_have_their_guides(name, channels, size, weights):
    model, guide = (U_net.from_checkpoint(SHIPPED.with_stem(stem)) for stem in (name, f"{name}_guide"))
    assert guide.network == model.network and guide.metadata.get("classes") == model.metadata.get("classes")
    assert guide.metadata["training"]["steps"] < model.metadata["training"]["steps"] / 8
    assert (model.network["in_channels"], model.metadata["image_size"]) == (channels, size)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert NoiseScheduler(**model.metadata["noise_schedule"]).num_timesteps == 1000


@pytest.mark.parametrize("name, sampler", [*(("model_DDPM", sampler) for sampler in SAMPLERS), ("model_DDPM_large", "ddpm")])
def test_a_shipped_checkpoint_draws_the_same_pictures_in_bf16(name, sampler):
    model = U_net.from_checkpoint(SHIPPED.with_stem(name)).to(memory_format=torch.channels_last).eval()

    def draw(bf16):
        generators = image_generators(0, range(4))
        noise = gaussian_noise(torch.empty(4, 1, 28, 28), generators)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            *_, (_, x0) = NoiseScheduler().denoise(model, noise, 10, sampler, generators)
        return x0.clamp(-1, 1)
    fp32, bf16 = draw(False), draw(True)
    assert not torch.equal(fp32, bf16)
    assert (fp32 - bf16).abs().mean() < 2 / 255  # one grey level: the range is 2


def test_safetensors_and_back_by_the_lines_of_the_page(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "other_tools.md").read_text(encoding="utf-8")
    there, back = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    model = U_net(t_dim=8, widths=(8, 16), normalise=True, num_classes=2)
    model.metadata = {"image_size": [28, 32], "classes": ["a", "b"], "noise_schedule": {"num_timesteps": 9}}
    save_checkpoint(model.state_dict(), "model.pth")
    exec(there, {})
    Path("model.pth").unlink()
    with pytest.raises(ValueError, match="model.safetensors: no checkpoint yet; docs/other_tools.md"):
        U_net.from_checkpoint("model.safetensors")
    exec(back, {})
    again = U_net.from_checkpoint("model.pth")
    assert again.network == model.network and again.metadata == model.metadata
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_bare_tensors_load_into_a_network_built_by_hand(tmp_path):
    model = U_net(t_dim=8, widths=(8,))
    bare = {name: tensor for name, tensor in model.state_dict().items() if name != "_extra_state"}
    other = U_net(t_dim=8, widths=(8,))
    other.load_state_dict(bare, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
