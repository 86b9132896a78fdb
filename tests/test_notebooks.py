"""The notebooks: each the same as its script, listed, and able to install what it imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert len(SCRIPTS) >= 5
    assert {p.stem for p in (ROOT / "colab").glob("*.ipynb")} == {p.stem for p in SCRIPTS}


@scripts
def test_notebook_and_script_are_the_same(script):
    jupytext = pytest.importorskip("jupytext", reason="needs the extra focaljax[notebooks]")
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    pair = [
        [(cell.cell_type, cell.source) for cell in one.cells]
        for one in (jupytext.read(script), notebook)
    ]
    assert pair[0] == pair[1], f"make them agree: jupytext --to ipynb colab/{script.name}"
    assert not any(cell.get("outputs") for cell in notebook.cells)


@scripts
def test_colab_readme_lists_it_with_a_badge(script):
    text = (ROOT / "colab/README.md").read_text(encoding="utf-8")
    badges = re.findall(
        r"colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/([^)]+)", text
    )
    assert badges.count(f"colab/{script.stem}.ipynb") == 1
    assert [path for path in badges if not (ROOT / path).exists()] == []


def test_colab_readme_points_at_what_exists():
    text = (ROOT / "colab/README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / "colab" / link).exists()] == []


@scripts
def test_install_cell_knows_all_that_is_imported(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    (needed,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NEEDED"
    )
    # that come with those that are named, or with Jupyter
    dependencies = {"jax", "numpy", "scipy", "IPython", "pandas"}
    assert packages - dependencies <= {name.partition(".")[0] for name in needed}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = {"focaljax", *extras["compare"], *extras["colab"]}
    names = {"sklearn": "scikit-learn", "orbax.checkpoint": "orbax-checkpoint"}
    assert {names.get(name, name) for name in needed} <= installed
