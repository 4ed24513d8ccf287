"""The parameters as they are typed: taken for what they mean, or refused by name before anything begins."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import run_notebook
from checkpoint import load_checkpoint, save_checkpoint
from parameters import DRAWING, TRAINING, check_parameters, value_of

ROOT = Path(__file__).parents[1]


def taken(name, value, rules=TRAINING):
    names = {name: value, "other": "left alone"}
    check_parameters(names, rules)
    assert names["other"] == "left alone"
    return names[name]


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("[28, 32]", [28, 32]), ("[[1], 2.5]", [[1], 2.5]),
    ("true", True), ("False", False), ("None", None), ("null", None),
    ('{"widths": [8], "normalise": true}', {"widths": [8], "normalise": True}),  # JSON
    ("{widths: [8], dropout: 1e-1}", {"widths": [8], "dropout": 0.1}),  # without the quotes a shell removed
    ("[big cat, dog]", ["big cat", "dog"]), ("{'a': 'b c'}", {"a": "b c"}),
    ("2024_11_02", "2024_11_02"), ("007", "007"), ("a b", "a b"), ("[open", "[open"), ("{[]: 1}", "{[]: 1}"),
    ("(" * 500, "(" * 500), ("9" * 5000, "9" * 5000), ("", "")])
def test_text_that_says_a_number_a_list_or_a_dictionary_is_one(text, value):
    found = value_of(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, given, value", [
    ("image_size", "[28, 32]", [28, 32]), ("image_size", (28, 32), [28, 32]), ("image_size", "28", 28),
    ("image_size", 28.0, 28), ("image_size", np.array([28, 32]), [28, 32]), ("in_channels", "3", 3),
    ("network", {"widths": np.array([8, 16])}, {"widths": [8, 16]}), ("network", "{widths: [8]}", {"widths": [8]}),
    ("learning_rate", "1e-4", 1e-4), ("learning_rate", 1, 1.0),
    ("learning_rate", np.float64(0.5), 0.5), ("num_epochs", 2.0, 2), ("num_epochs", "2", 2),
    ("batch_size", np.int64(8), 8), ("batch_size", torch.tensor(8), 8), ("max_images", "none", None),
    ("seed", "0", 0), ("seed", 2**32 - 1, 2**32 - 1), ("resume", "false", False), ("resume", "True", True),
    ("resume", "auto", "auto"), ("labels", "False", False), ("micro_batch_size", None, None),
    ("initial_weights", "none", None), ("initial_weights", None, None), ("data_path", Path("a/b"), "a/b"),
    ("data_path", 2024, "2024")])
def test_values_of_other_types_are_taken_as_what_they_mean(name, given, value):
    found = taken(name, given)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, given, expected", [
    ("image_size", [28], "at least 8, or a pair"), ("image_size", 4, "at least 8"),
    ("image_size", None, "at least 8"), ("image_size", [28, 28, 3], "a pair"),
    ("in_channels", 2, "1 or 3"), ("t_dim", 7, "an even whole number"), ("t_dim", 0, "at least 2"),
    ("num_timesteps", 1, "a whole number of at least 21"), ("num_timesteps", 20, "at least 21"),
    ("network", "text", "a dictionary"), ("network", None, "a dictionary"), ("network", [], "a dictionary"),
    ("network", {"width": [64]}, "names out of attention.*, widths"),
    ("network", {"num_classes": 3}, "names out of"), ("network", {"widths": 64}, "not iterable"),
    ("network", {"widths": [12], "normalise": True}, "must be multiples of 8"),
    ("network", {"dropout": 2}, "dropout"), ("network", {"dropout": 1}, r"must be in \[0, 1\)"),
    ("network", {"bottleneck": 0}, "bottleneck 0: must be at least 1"),
    ("num_epochs", 1.5, "a whole number"), ("num_epochs", "two", "a whole number"),
    ("num_epochs", True, "whole"),
    ("batch_size", 0, "at least 1"), ("batch_size", math.inf, "whole"), ("micro_batch_size", 0, "at least 1"),
    ("max_images", -3, "at least 1, or None for all"), ("seed", None, "a whole number in 0 ... 4294967295"),
    ("seed", -1, "in 0 ..."), ("seed", 2**64, "in 0 ..."), ("learning_rate", 0, "above 0"),
    ("learning_rate", math.nan, "above 0"), ("learning_rate", "fast", "a number above 0"),
    ("learning_rate", [1e-3], "a number"), ("precision", "fp16", "'auto' or 'fp32' or 'bf16'"),
    ("resume", "yes", "True or False or 'auto'"), ("labels", "cat", "True or False"),
    ("save_dir", None, "a folder"), ("save_dir", "", "a folder"), ("data_path", True, "a path")])
def test_a_bad_value_of_training_is_named_with_what_is_expected(name, given, expected):
    with pytest.raises(ValueError) as error:
        taken(name, given)
    assert str(error.value).startswith(f"{name} {given!r}: must be ")
    assert re.search(expected, str(error.value))


@pytest.mark.parametrize("name, given, expected", [
    ("num_images", 0, "at least 1"), ("num_images", 2.5, "whole"), ("first_image", -1, "at least 0"),
    ("seed", None, "whole"), ("num_steps", 0, "at least 1, or None for all"), ("sampler", "euler", "'ddim'"),
    ("guidance", math.nan, "of at least 1"), ("guidance", 0.5, "of at least 1"), ("label", [], "a class"),
    ("label", [["cat"]], "a class"), ("label", [True], "a class"), ("label", {}, "a class"),
    ("label", 1.5, "a class"), ("model_path", "nowhere.pth", "the file of a checkpoint"),
    ("model_path", None, "the file"), ("output_dir", None, "a folder"), ("precision", None, "'fp32'")])
def test_a_bad_value_of_drawing_is_named_with_what_is_expected(name, given, expected):
    with pytest.raises(ValueError, match=f"{name} .*: must be .*{expected}"):
        taken(name, given, DRAWING)


def test_labels_and_guidance_as_typed():
    for given, value in (("[3, 1, 4]", ["3", "1", "4"]), ("[cat, 'a-b, c', 1st]", ["cat", "a-b, c", "1st"]), ("cat", "cat"), ("7", "7"),
                         (np.array([3, 1]), [3, 1]), ([np.int64(3), 1], [3, 1]), (None, None), ("none", "none"), ("true", "true")):
        assert taken("label", given, DRAWING) == value  # text is the name of a class
    assert taken("guidance", "1.75", DRAWING) == 1.75 and taken("guidance", None, DRAWING) is None


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_checkpoint({"a": 1}, "~/model.pth")
    assert load_checkpoint("~/model.pth") == {"a": 1}
    for name, rules in (("data_path", TRAINING), ("initial_weights", TRAINING), ("save_dir", TRAINING),
                        ("output_dir", DRAWING)):
        assert taken(name, "~/below/", rules) == str(tmp_path / "below")
    assert taken("model_path", "~/model.pth", DRAWING) == str(tmp_path / "model.pth")
    assert (tmp_path / "below").is_dir() and not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name, rules", [("save_dir", TRAINING), ("output_dir", DRAWING)])
def test_a_folder_that_cannot_be_written_is_named_at_once(name, rules, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"{name} .*file.*: must be a folder that can be written: "):
            taken(name, str(path), rules)

    def refused(**_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("tempfile.TemporaryFile", refused)  # a superuser may write everywhere
    with pytest.raises(OSError, match=f"{name} .*: must be a folder that can be written: Permission denied"):
        taken(name, str(tmp_path / "read_only"), rules)


@pytest.mark.parametrize("notebook, bad", [
    ("train.ipynb", {"num_epochs": 1.5}), ("train.ipynb", {"network": {"width": [64]}}),
    ("generate_image.ipynb", {"guidance": math.nan}), ("generate_image.ipynb", {"num_steps": 2000})])
def test_notebooks_refuse_a_value_before_they_read_or_draw_anything(notebook, bad, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    shown = []
    folder = {"train.ipynb": {"data_path": "nowhere", "save_dir": str(tmp_path / "run")},
              "generate_image.ipynb": {"output_dir": str(tmp_path / "images")}}[notebook]
    with pytest.raises(ValueError, match=f"{next(iter(bad))} .*: must be"):
        run_notebook.run_notebook(notebook, folder | bad, lambda names, number, picture: shown.append(number))
    assert shown in ([], [3])  # cell 3 of train.ipynb shows a digit of MNIST


def test_every_parameter_of_both_notebooks_has_a_rule():
    for notebook, rules in (("train.ipynb", TRAINING), ("generate_image.ipynb", DRAWING)):
        cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
        (cell,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
        names = {}
        exec("".join(cell["source"]), names)
        del names["__builtins__"]
        assert set(names) <= set(rules)
        defaults = {name: value for name, value in names.items() if not name.endswith(("_dir", "_path"))}
        kept = dict(defaults)
        check_parameters(kept, rules)
        assert kept == defaults
