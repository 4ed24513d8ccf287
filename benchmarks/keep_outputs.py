"""Runs a notebook and keeps its outputs in it, with a digest of the code:

    python benchmarks/keep_outputs.py generate_image.ipynb --num_images 25
"""

import hashlib
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from run_notebook import read_parameters  # noqa: E402

WIDGET = "application/vnd.jupyter.widget-view+json"  # shows nothing without its kernel


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """A short name for the code of all cells, comments aside."""
    code = "\n\n".join(cell.source for cell in notebook.cells
                       if cell.cell_type == "code")
    code = re.sub(r"[ \t]*# .*", "", code)
    return hashlib.blake2b(code.encode(), digest_size=8).hexdigest()


def keep_outputs(notebook: nbformat.NotebookNode, parameters: dict) -> None:
    """Cleans the outputs of a run for keeping: no progress bars, no counts, no cell of
    parameters."""
    notebook.cells = [cell for cell in notebook.cells
                      if "injected" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs
                            if WIDGET not in output.get("data", {})
                            and output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output["execution_count"] = None
    notebook.metadata["outputs_of"] = {"code": code_digest(notebook),
                                       "parameters": parameters}


def main() -> None:
    path, parameters = Path(sys.argv[1]), read_parameters(sys.argv[2:])
    notebook = nbformat.read(path, 4)
    at = next(i for i, cell in enumerate(notebook.cells)
              if "parameters" in cell.metadata.get("tags", []))
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected"]})
    notebook.cells.insert(at + 1, cell)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, resources=where).execute()
    keep_outputs(notebook, parameters)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
