"""The pages of docs/: their examples run, in order, and every public function has a page."""

import os
import re
from pathlib import Path

import pytest

import focaljax

os.environ.setdefault("KERAS_BACKEND", "jax")  # before keras is imported

DOCS = Path(__file__).parent
PAGES = sorted(path for path in DOCS.glob("*.md") if "```python\n" in path.read_text("utf-8"))
OPTIONAL = ("equinox", "flax", "keras", "optax", "sklearn")


def test_there_are_pages():
    assert {"index", "frameworks", "boosting"} <= {page.stem for page in PAGES}


@pytest.mark.filterwarnings("default")  # other packages' own
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    text = page.read_text("utf-8")
    for module in OPTIONAL:
        if re.search(rf"^(import|from) {module}\b", text, re.M):
            pytest.importorskip(module, reason=f"the page uses {module}")
    names = {}  # of all of them: the later go on from the first
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        above = "\n" * text.count("\n", 0, block.start(1))  # an error then names its line
        exec(compile(above + block[1], page, "exec"), names)


def test_every_public_function_has_a_page():
    listed = re.findall(r"^   (\w+)$", (DOCS / "api/index.rst").read_text("utf-8"), re.M)
    public = {name for name, value in vars(focaljax).items() if callable(value)}
    assert sorted(listed) == sorted(public)
