"""The notebooks: pages that one reads, with their outputs, that install themselves."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "colab").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells_of(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


@notebooks
def test_is_read_in_ten_minutes(path):
    code, prose = cells_of(path, "code"), cells_of(path, "markdown")
    lengths = [sum(bool(line.strip()) for line in cell["source"]) for cell in code]
    assert len(code) + len(prose) <= 16
    assert (sum(lengths) <= 120, max(lengths) <= 25) == (True, True)
    source = "".join("".join(cell["source"]) for cell in code)
    assert not re.search(r"argparse|environ|if __name__", source)
    titles = re.findall(r"^# .*", "\n".join("".join(cell["source"]) for cell in prose), re.M)
    assert len(titles) == 1
    (settings,) = (cell for cell in code if "parameters" in cell["metadata"].get("tags", []))
    assert all(cell["outputs"] == [] for cell in (code[0], settings))


@notebooks
def test_is_saved_with_what_it_gave(path):
    outputs = [out for cell in cells_of(path, "code") for out in cell["outputs"]]
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert {"image/png", "text/html"} <= kinds  # plots and tables
    assert not [out for out in outputs if out["output_type"] == "error"]
    assert not [out for out in outputs if out.get("name") == "stderr"]  # no warnings
    assert "application/vnd.jupyter.widget-view+json" not in kinds
    assert path.stat().st_size < 1.5e6


def test_each_is_listed_with_a_badge():
    text = (ROOT / "colab/README.md").read_text(encoding="utf-8")
    badges = re.findall(r"/github/[\w-]+/[\w-]+/blob/main/([^)]+)\)", text)
    assert sorted(badges) == [str(path.relative_to(ROOT)) for path in PATHS]
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "colab" / link).exists()] == []


def test_all_install_from_one_address_which_works(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (cell,) = {"".join(cells_of(path, "code")[0]["source"]) for path in PATHS}
    (command,) = re.findall(r"^ +%pip (.*)$", cell, re.M)
    address = f"git+{project['urls']['Repository']}"
    assert address in command
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    words = shlex.split(command.replace(address, wheel.as_uri()))
    words = [word for word in words if not word.startswith("chex")]  # here it is, and newer
    pip = [sys.executable, "-m", "pip", *words, "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run(pip, check=True, capture_output=True)
    assert (tmp_path / "site/focaljax/lab/compare.py").exists()
