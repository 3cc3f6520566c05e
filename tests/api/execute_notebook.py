"""Executes the notebooks of docs/ in place: `python tests/api/execute_notebook.py docs/notebooks/first-look.ipynb`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook in a folder; nothing of the result depends on the machine or the time, except images and rounding.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,  # seconds per cell, on a busy machine
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds the version of Python
    return notebook


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        nbformat.write(execute(Path(argument), Path.cwd()), argument)
