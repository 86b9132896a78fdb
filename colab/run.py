"""Run notebooks in full and keep what they give: python colab/run.py colab/NAME.ipynb ..."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar: nothing once it is over

for path in map(Path, sys.argv[1:]):
    print(f"Running {path}", flush=True)
    notebook = nbformat.read(path, as_version=4)
    here = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, record_timing=False, resources=here).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
            cell.outputs = [out for out in kept if out.get("data", {}).get("text/plain") != ""]
    nbformat.write(notebook, path)
