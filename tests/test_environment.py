"""The set-up agrees with itself: pyproject.toml, the lock, environment.yml, the scripts, and what the code imports."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
HEADLESS = (ROOT / "tools" / "requirements-headless.lock").read_text()
LATTICE = (ROOT / "tools" / "requirements-crf.lock").read_text()


def entries(lock: str) -> list[tuple[Requirement, list[str]]]:
    """Return the requirements of a lock file, each with its hashes."""
    logical = lock.replace("\\\n", " ").splitlines()
    lines = [line.split() for line in logical if line.strip() and not line.startswith("#")]
    return [
        (
            Requirement(" ".join(word for word in words if not word.startswith("--hash="))),
            [word for word in words if word.startswith("--hash=sha256:")],
        )
        for words in lines
    ]


def declared(*extras: str) -> dict[str, Requirement]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for group in groups for text in group}


def locked() -> dict[str, list[str]]:
    """Return the versions of each package in the lock; there are several where they depend on the interpreter."""
    versions: dict[str, list[str]] = {}
    for requirement, _ in entries(LOCK):
        [specifier] = requirement.specifier
        versions.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    return versions


@pytest.mark.parametrize("lock", [LOCK, HEADLESS, LATTICE], ids=["lock", "headless", "lattice"])
def test_a_lock_has_exact_versions_and_hashes_and_no_addresses(lock):
    found = entries(lock)
    assert found
    for requirement, hashes in found:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert hashes, f"{requirement.name} has no hash"
        assert requirement.url is None
    assert "://" not in lock
    assert not re.search(r"^\s*(-i|-f|--\w*index|--\w*url|--find-links|--trusted-host)\b", lock, re.MULTILINE)


def test_the_direct_dependencies_are_in_the_lock():
    versions = locked()
    for name, requirement in declared("dev", "site").items():
        assert name in versions, f"{name} is not in requirements.lock: run tools/lock.sh"
        for version in versions[name]:
            assert requirement.specifier.contains(version), f"{requirement} against {version}: run tools/lock.sh"


def test_the_headless_opencv_is_the_same_version():
    [(requirement, _)] = entries(HEADLESS)
    assert requirement.name == "opencv-python-headless"
    assert [specifier.version for specifier in requirement.specifier] == locked()["opencv-python"]


def test_the_lattice_is_that_of_the_extra():
    [(requirement, _)] = entries(LATTICE)
    [(name, asked)] = [(n, r) for n, r in declared("crf").items() if n not in declared()]
    [version] = [specifier.version for specifier in requirement.specifier]
    assert requirement.name == name
    assert asked.specifier.contains(version)
    assert name not in locked()  # which needs no compiler


def test_conda_installs_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    # No other package, so that no version can differ from the lock's.
    assert [dependency.partition("=")[0] for dependency in conda] == ["python", "pip"]


def test_the_oldest_python_is_stated_equally():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert "--python-version 3.11" in (ROOT / "tools/lock.sh").read_text()
    assert "sys.version_info < (3, 11)" in (ROOT / "tools/setup.sh").read_text()
    assert "python=3.11" in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_every_command_sets_the_environment_up():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("reproduce", "test", "unit", "lattice", "lab", "site", "bench", "lint"):
        assert re.search(rf"^{target}:.*\bsetup\b", makefile, re.MULTILINE), target
    assert {"make test", "make lattice"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


def test_the_forge_runs_what_the_makefile_has_on_two_versions_of_python():
    makefile = (ROOT / "Makefile").read_text()
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
    assert set(workflows) == {"tests", "weekly", "site"}
    targets = {target for text in workflows.values() for target in re.findall(r"run: make (\S+)", text)}
    assert targets == {"test", "lattice", "test-full", "reproduce", "site"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    versions = yaml.safe_load(workflows["tests"])["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert len(set(versions)) == 2


def test_the_repository_stays_small():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git, or no history")
    assert sum(path.stat().st_size for path in map(ROOT.joinpath, listed.stdout.split("\0")) if path.is_file()) < 30e6


def imports(source: str) -> set[str]:
    """Return the top-level modules that a source imports absolutely."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_what_the_package_imports_is_declared():
    distributions = metadata.packages_distributions()
    allowed = set(declared(*PROJECT["optional-dependencies"]))
    undeclared = []
    for path in [*(ROOT / "wsolnb").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for module in sorted(imports(path.read_text("utf-8")) - set(sys.stdlib_module_names)):
            names = {canonicalize_name(name).removesuffix("-headless") for name in distributions.get(module, [module])}
            if module not in ("wsolnb", "benchmarks") and not names & allowed:
                undeclared.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not undeclared, "\n".join(undeclared)


def test_the_command_is_the_one_of_the_package():
    assert PROJECT["scripts"] == {"wsolnb": "wsolnb.notebook.cli:app"}
    from wsolnb import __version__

    assert __version__ == PROJECT["version"]
