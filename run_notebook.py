"""Runs a notebook from the command line, with other parameters, on one process or on many:

    python run_notebook.py train.ipynb --num_epochs 20 --network '{"widths": [64, 128, 256]}'
    torchrun --nproc-per-node 8 run_notebook.py train.ipynb --batch_size 256

What the notebook would show goes as files into `figures` in its save_dir, or beside its output_dir.
It runs in the notebook's folder, as in Jupyter; a path that is typed is from where you are.
"""

import ast
import json
import linecache
import os
import sys
import traceback
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from drawing import figures_folder
from parameters import PATHS, TEXT, value_of


def read_parameters(words: list[str]) -> dict:
    """--name value --name=value ... as a dictionary. Raises ValueError where a name or value lacks."""
    parameters, words = {}, [part for word in words for part in
                             (word.split("=", 1) if word.startswith("--") else [word])]
    for name, text in zip(words[::2], words[1::2]):
        if not name.startswith("--"):
            raise ValueError(f"{name}: a parameter is given as --name value")
        name = name[2:].replace("-", "_")
        as_text = name in TEXT and text.lower() not in ("none", "null")
        parameters[name] = text if as_text else value_of(text)
    if len(words) % 2:
        raise ValueError(f"{words[-1]}: has no value; a parameter is given as --name value")
    return parameters


def run_cell(source: str, file: str, names: dict):
    """Runs one cell in `names`; returns the value of its last line, where that is an expression."""
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for tracebacks
    tree, last = ast.parse(source, file), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, file, "exec"), names)
    return last and eval(compile(last, file, "eval"), names)


def run_notebook(path: str | os.PathLike, parameters: dict, shown=lambda names, number, picture: None,
                 ) -> dict:
    """Runs the code of a notebook with other parameters; returns the names that it defines.

    shown(names, number, picture): called where a cell shows something, with the names so far, the cell's
    number, and a PIL image or "figure".
    Raises ValueError for a parameter that the notebook does not have.
    """
    names = {"__name__": "__main__", "display": lambda picture: shown(names, number, picture)}
    plt.show = lambda: shown(names, number, "figure")
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        before = set(names)
        result = run_cell("".join(cell["source"]), f"<{Path(path).name}, cell {number}>", names)
        if isinstance(result, Image.Image):
            shown(names, number, result)
        if "parameters" in cell["metadata"].get("tags", []):
            known = sorted(set(names) - before)
            for name in parameters:
                if name not in known:
                    raise ValueError(f"{name}: no parameter of {path}; it has {', '.join(known)}")
            names.update(parameters)
    return names


def explains_itself(error: Exception) -> bool:
    """Whether this project raised it, with a message that says what to do, and no library or mistake."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).resolve().parent == Path(__file__).resolve().parent
    return ours and (last.line or "").startswith("raise ")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if not sys.argv[1].endswith(".ipynb"):
        sys.exit(f"{sys.argv[1]}: no notebook; give one such as train.ipynb first, then its parameters")
    plt.switch_backend("agg")  # which opens no windows
    for stream in (sys.stdout, sys.stderr):  # names of files may have letters that the terminal lacks
        stream.reconfigure(errors="backslashreplace")
    notebook, first = Path(sys.argv[1]).resolve(), os.environ.get("RANK", "0") == "0"
    sys.path.insert(0, str(notebook.parent))
    parameters = read_parameters(sys.argv[2:])
    if Path.cwd() != notebook.parent:
        for name in PATHS & parameters.keys():
            if parameters[name] and parameters[name].strip():
                parameters[name] = os.path.abspath(os.path.expanduser(parameters[name]))
        os.chdir(notebook.parent)

    def save(names, number, picture):
        if first and ("save_dir" in names or "output_dir" in names):
            folder = (Path(names["save_dir"], "figures") if "save_dir" in names
                      else figures_folder(names["output_dir"])).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"cell_{number}.png"
            plt.savefig(file, bbox_inches="tight") if picture == "figure" else picture.save(file)
        plt.close("all")

    run_notebook(notebook, parameters, save)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        text = f"{type(error).__name__}: {error}\n" if explains_itself(error) else traceback.format_exc()
        sys.stderr.write(text)
        if "LOCAL_RANK" in os.environ:  # at exit NCCL would wait for the other processes, which wait for this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.exit(1)
