"""What a user gets on installing: a wheel that is whole, a light import, a tree that holds true."""

import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import cases
import jax
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import focaljax

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    """Standard output of a command, whose errors show when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def tracked_files():
    """The files that git holds or would take in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [path for name in listed.stdout.split("\0") if (path := ROOT / name).is_file()]


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for module in ("pip", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building a wheel offline needs {module} beside pytest")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert "focaljax/py.typed" in package
    sources = {p for p in (ROOT / "focaljax").rglob("*") if p.suffix in {".py", ".typed", ".pyi"}}
    assert package == {path.relative_to(ROOT).as_posix() for path in sources}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_wheel_imports_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--target", str(site), str(wheel))
    code = "import focaljax; print(focaljax.__file__, focaljax.prior_bias)"
    shown = run(
        sys.executable, "-c", code, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}
    )
    assert shown.startswith(str(site))


# --- the import -----------------------------------------------------------------------------------


def test_import_starts_no_backend():
    # With a platform that does not exist, whatever asks for a device fails: first that it does.
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    code = "import jax, focaljax\ntry: jax.devices()\nexcept RuntimeError: print('refused')"
    assert run(sys.executable, "-c", code, env=environment, cwd=ROOT) == "refused\n"


def test_import_adds_only_chex_to_jax():
    code = (
        "import json, sys, jax; had = set(sys.modules); import chex; chexed = set(sys.modules);"
        "import focaljax; now = set(sys.modules);"
        "print(json.dumps([sorted(chexed - had), sorted(now - chexed)]))"
    )
    by_chex, by_focaljax = json.loads(run(sys.executable, "-c", code, cwd=ROOT))
    packages = {name.partition(".")[0] for name in by_chex} - sys.stdlib_module_names
    assert packages <= {"absl", "chex", "jax", "jaxlib", "numpy", "toolz", "typing_extensions"}
    assert {name.partition(".")[0] for name in by_focaljax} == {"focaljax"}


def test_public_names_are_the_contract():
    public = {case.name for case in (*cases.CASES, *cases.OWN, *cases.RELATIVES)}
    public |= {function.__name__ for function in cases.BY_THEMSELVES}
    own = {name for name, value in vars(focaljax).items() if not inspect.ismodule(value)}
    assert {name for name in own if not name.startswith("_")} == public
    assert all(getattr(focaljax, name).__doc__ for name in public)


def test_readme_examples_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert examples
    with jax.numpy_rank_promotion("allow"):  # as users have it
        for example in examples:
            exec(example, {})


# --- the tree -------------------------------------------------------------------------------------


def test_one_version_everywhere():
    try:
        assert importlib.metadata.version("focaljax") == focaljax.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("focaljax is not installed here, only on the path")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == focaljax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.*?)\]", changelog, re.M)[1] == focaljax.__version__


@pytest.mark.parametrize(
    "name", ["constraints.txt", "constraints-oldest.txt", "constraints-colab.txt"]
)
def test_constraints_are_plain_pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    plain = re.compile(r"[a-z0-9-]+==[\w.]+( ; python_version (<|>=) \"3\.\d+\")?")
    assert [pin for pin in pins if not plain.fullmatch(pin)] == []


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = {Requirement(r).name for r in sum(extras, project["dependencies"])} - {"focaljax"}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([\w-]+)==", constraints, re.M))
    assert {canonicalize_name(name) for name in asked} <= pinned


def test_no_machine_or_registry_is_named():
    # Each pattern is written so that it does not match itself.
    machine = r"(?<![\w.])/(work|root|home|tmp)/[a-z]"
    registry = r"index[-]url|/simple[/]|pypi[.]org|python[h]osted"
    found = []
    for path in tracked_files():
        text = path.read_text(encoding="utf-8", errors="ignore")
        hits = re.finditer(f"{machine}|{registry}", text)
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in hits]
    assert found == []


def test_readme_points_at_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    own = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    own += re.findall(r"/(?:blob|tree|raw)/[\w-]+/([\w./-]+)", text)  # a notebook badge's address
    assert [path for path in own if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= targets
