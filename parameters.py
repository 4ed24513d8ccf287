"""The parameters of the notebooks: each checked, by name, before anything long begins.

A parameter may come as it was typed on a command line: text that says a number, a list or
a dictionary is taken as such. Numbers of numpy count as numbers.
"""

import ast
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from machine import PRECISIONS
from model import U_net, default_arguments
from noise import SAMPLERS

WORDS = {"true": True, "false": False, "none": None, "null": None}  # as typed elsewhere
WORD = re.compile(r"""'[^']*'|"[^"]*"|\b[A-Za-z_]\w*(?: +\w+)*""")  # quoted, or bare


def value_of(text: str) -> object:
    """A parameter as typed: a number, list or dictionary of Python, JSON or YAML, or text.

    Within brackets the quotes may lack, which some shells remove: {widths: [8]}.
    A number with underscores stays text, since 2024_11_02 may be a folder.
    """
    if text.lower() in WORDS:
        return WORDS[text.lower()]

    def quoted(match):
        word = match[0]
        return word if word[0] in "'\"" else repr(WORDS.get(word.lower(), word))

    literal = WORD.sub(quoted, text) if text.lstrip()[:1] in ("[", "{") else text
    try:
        value = ast.literal_eval(literal)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text
    return text if isinstance(value, (int, float)) and "_" in text else value


class Rule(NamedTuple):
    """take(value): the value as it is used; raises TypeError or ValueError for a bad one.
    expected: what a good one is, in words."""
    take: Callable
    expected: str


def whole(least: int, most: float = math.inf) -> Rule:
    def take(value):
        if isinstance(value, bool) or int(value) != value or not least <= value <= most:
            raise ValueError
        return int(value)
    return Rule(take, f"a whole number of at least {least}" if most == math.inf else
                f"a whole number in {least} ... {most}")


def number(fits: Callable[[float], bool], expected: str) -> Rule:
    def take(value):
        if isinstance(value, (bool, str)) or not math.isfinite(value) or not fits(value):
            raise ValueError
        return float(value)
    return Rule(take, f"a number {expected}")


def one_of(*values: object) -> Rule:
    def take(value):
        return values[values.index(value)]
    return Rule(take, " or ".join(map(repr, values)))


def optional(rule: Rule, meaning: str) -> Rule:
    def take(value):
        return None if str(value).lower() == "none" else rule.take(value)
    return Rule(take, f"{rule.expected}, or None {meaning}")


def take_path(value: str | int | os.PathLike) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, os.PathLike)):
        raise TypeError
    if not str(value).strip():
        raise ValueError
    return os.path.expanduser(Path(str(value)))


def take_file(value: str | os.PathLike) -> str:
    path = take_path(value)
    if not os.path.isfile(path):
        raise ValueError
    return path


def take_folder(value: str | os.PathLike) -> str:
    """The folder, made where it is not there. Raises OSError where it cannot be written."""
    path = take_path(value)
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def take_image_size(value: int | list) -> int | list[int]:
    side = whole(8).take
    if not isinstance(value, (list, tuple)):
        return side(value)
    height, width = value
    return [side(height), side(width)]


def take_even(value: int) -> int:
    if value % 2:
        raise ValueError
    return whole(2).take(value)


def plain(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else list(value)  # of numpy; range, set


def take_network(value: dict) -> dict:
    if set(value) - set(NETWORK):
        raise ValueError
    value = json.loads(json.dumps(value, default=plain))
    with torch.device("meta"):  # which allocates nothing
        U_net("meta", **value)  # which names what is wrong with a value
    return value


def take_label(value: str | int | list | None) -> str | int | list | None:
    if isinstance(value, str) and value.strip()[:1] + value.strip()[-1:] == "[]":
        names = re.findall(r"""\s*('[^']*'|"[^"]*"|[^,]+)""", value.strip()[1:-1])
        value = [name.strip(" '\"") for name in names if name.strip()]
    if isinstance(value, (list, tuple)):
        value = [name.item() if isinstance(name, np.generic) else name for name in value]
    names = value if isinstance(value, (list, tuple)) and len(value) else [value]
    if value is not None and any(isinstance(name, bool) or not isinstance(name, (str, int))
                                 for name in names):
        raise ValueError
    return value


NETWORK = sorted(set(default_arguments()) - {"num_classes"})  # that the data says
PATH = Rule(take_path, "a path")
FOLDER = Rule(take_folder, "a folder that can be written")
SEED = whole(0, 2**32 - 1)
TRAINING = {
    "data_path": PATH,
    "image_size": Rule(take_image_size, "a whole number of at least 8, or a pair "
                       "[height, width] of them"),
    "in_channels": one_of(1, 3),
    "labels": one_of(True, False),
    "num_timesteps": whole(21),  # with fewer, the last beta is 1 or more
    "t_dim": Rule(take_even, "an even whole number of at least 2"),
    "network": Rule(take_network, 'a dictionary such as {"widths": [64, 128]}, with names '
                    f"out of {', '.join(NETWORK)}"),
    "batch_size": whole(1),
    "micro_batch_size": optional(whole(1), "for a whole batch at once"),
    "learning_rate": number(lambda value: value > 0, "above 0"),
    "num_epochs": whole(1),
    "max_images": optional(whole(1), "for all"),
    "precision": one_of(*PRECISIONS),
    "seed": SEED,
    "resume": one_of(True, False, "auto"),
    "initial_weights": optional(PATH, "for random ones"),
    "save_dir": FOLDER}
DRAWING = {
    "model_path": Rule(take_file, "the file of a checkpoint, such as "
                       "Save_model/run/model.pth"),
    "image_path": PATH,
    "num_images": whole(1),
    "first_image": whole(0),
    "label": Rule(take_label, "a class, a list of classes, or None for all"),
    "seed": SEED,
    "sampler": one_of(*SAMPLERS),
    "num_steps": optional(whole(1), "for all"),
    "guidance": optional(number(lambda value: value >= 1, "of at least 1"),
                         "for what the checkpoint proposes"),
    "precision": one_of(*PRECISIONS),
    "output_dir": FOLDER}
PATHS = {"data_path", "image_path", "initial_weights", "model_path", "output_dir", "save_dir"}
TEXT = PATHS | {"label"}  # stay text: 2024 may be a folder, and "none" a class


def check_parameters(names: dict, rules: dict[str, Rule]) -> None:
    """Checks those of `names` that have a rule, and replaces them by the values they mean.

    `~` in a path becomes the home folder; save_dir and output_dir are made.
    Raises ValueError that names the parameter, its value and what is expected, and
    OSError for a folder that cannot be written.
    """
    for name in [name for name in rules if name in names]:
        given, rule = names[name], rules[name]
        value = given.tolist() if hasattr(given, "tolist") else given  # numpy and torch
        value = value_of(value) if isinstance(value, str) and name not in TEXT else value
        expected = f"{name} {given!r}: must be {rule.expected}"
        try:
            names[name] = rule.take(value)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            why = f" ({error})" if isinstance(value, dict) and str(error) else ""
            raise ValueError(expected + why) from None
        except OSError as error:
            raise OSError(f"{expected}: {error.strerror}") from None
