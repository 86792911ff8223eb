"""`.github/workflows`: what they run, what `.ci/workflow_steps.py` makes of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"
CI_RUN = (ROOT / ".ci" / "run").read_text()
EXAMPLE = """
on: push
env: {WHO: all, A: 1}
jobs:
  one:
    env: {WHO: job}
    steps:
      - uses: actions/checkout@v6
      - name: greet
        env: {B: 2.5}
        run: |
          echo "$WHO $A $B"
          false | true
          echo reached
      - run: echo "$WHO"; (exit 3)
  two:
    steps: [{run: echo two}]
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    name = "workflow_steps"
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclass looks
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(script: ModuleType, tmp_path: Path) -> list[Any]:
    (tmp_path / "example.yml").write_text(EXAMPLE)
    return list(script.steps(tmp_path))


def test_steps_with_what_surrounds_them(script: ModuleType, example: list[Any]) -> None:
    assert [str(step) for step in example] == [
        "example.yml, one, actions/checkout@v6",
        "example.yml, one, greet",
        "example.yml, one, step 3",
        "example.yml, two, step 1",
    ]
    assert example[1].env == {"WHO": "job", "A": "1", "B": "2.5"}
    assert example[3].env == {"WHO": "all", "A": "1"}


def test_a_step_ends_at_its_first_failure(
    script: ModuleType, example: list[Any], tmp_path: Path
) -> None:
    """In a pipe too; what it printed before is kept."""
    done = script.run(example[1], tmp_path)
    assert (done.returncode, done.stdout) == (1, "job 1 2.5\n")
    done = script.run(example[2], tmp_path)
    assert (done.returncode, done.stdout) == (3, "job\n")
    assert script.run(example[3], tmp_path).stdout == "two\n"


def test_why_a_step_is_left_out(
    script: ModuleType, example: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.reason_not_to(example[0], "") == "an action of GitHub's"
    assert script.reason_not_to(example[3], "echo two # and more\n  echo two\n") == "run by .ci/run"
    assert script.reason_not_to(example[1], 'echo "$WHO $A $B"') is None  # one line of three
    monkeypatch.setattr(script, "NOT_HERE", {("example.yml", "two", "step 1"): "it is too long"})
    assert script.reason_not_to(example[3], "") == "it is too long"
    script.check_reasons(example)
    monkeypatch.setattr(script, "NOT_HERE", {("example.yml", "two", "step 2"): "it is too long"})
    with pytest.raises(ValueError, match=r"must name steps that exist but has example.yml, two, s"):
        script.check_reasons(example)


@pytest.mark.parametrize(
    "place", ["run: echo ${{ github.ref }}", "env: {A: '${{ x }}'}\n    run: a"]
)
def test_an_expression_cannot_be_run(script: ModuleType, tmp_path: Path, place: str) -> None:
    text = f"on: push\njobs:\n  a:\n   steps:\n   - name: it\n     {place}\n"
    (tmp_path / "a.yml").write_text(text.replace("\n    run", "\n     run"))
    with pytest.raises(ValueError, match=r"^a.yml, a, it: run and env must hold no \${{ }} but do"):
        list(script.steps(tmp_path))


# ---- Those of this project


def jobs(name: str) -> dict[str, Any]:
    whole: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())["jobs"]
    return whole


def test_what_is_left_out_and_what_runs(script: ModuleType) -> None:
    every = list(script.steps(FOLDER))
    script.check_reasons(every)
    run = [str(step) for step in every if script.reason_not_to(step, CI_RUN) is None]
    assert run == [
        "ci.yml, macos, Doctor",
        "ci.yml, macos, Benchmark card",
        "wheels.yml, macos, Check",
        "wheels.yml, linux, Build",
        "wheels.yml, linux, Install and run",
        "wheels.yml, sdist, Build",
    ]


def test_a_mac_does_what_the_readme_says() -> None:
    """Both lines of its first screen, to the letter; then doctor and a card, which are kept."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    wanted = [line for line in lines if line.startswith("python3 -m venv .venv && ")]
    job = jobs("ci.yml")["macos"]
    run = [step["run"].strip() for step in job["steps"] if "run" in step]
    assert len(wanted) == 2 and set(wanted) <= set(run)
    assert any("pyengine doctor --output outputs/" in text for text in run)
    assert any("pyengine bench card --quick --output outputs" in text for text in run)
    kept = job["steps"][-1]
    assert kept["uses"].startswith("actions/upload-artifact@") and kept["with"]["path"] == "outputs"


def test_only_a_tag_publishes() -> None:
    publish = jobs("wheels.yml").pop("publish")
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["environment"] == "pypi" and publish["permissions"] == {"id-token": "write"}
    assert (
        set(publish["needs"])
        == {"macos", "linux", "sdist"}
        == set(jobs("wheels.yml")) - {"publish"}
    )
    for name in ("ci.yml", "wheels.yml"):
        whole = yaml.safe_load((FOLDER / name).read_text())
        assert whole["permissions"] == {"contents": "read"}
        for job, content in whole["jobs"].items():
            assert "permissions" not in content or job == "publish"
            assert "secrets." not in str(content)
            for step in content["steps"]:
                _, _, version = step.get("uses", "action@v1").partition("@")
                assert version.startswith("v"), step


def test_wheels_are_of_what_mlx_has() -> None:
    """The oldest macOS and glibc of mlx's wheels, in each place that says one."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'CMAKE_OSX_DEPLOYMENT_TARGET = "14.0"' in text
    assert 'MACOSX_DEPLOYMENT_TARGET = "14.0"' in text
    linux = jobs("wheels.yml")["linux"]
    assert set(linux["strategy"]["matrix"]["os"]) == {"ubuntu-22.04", "ubuntu-22.04-arm"}
    (build,) = (step["run"] for step in linux["steps"] if step.get("name") == "Build")
    assert "manylinux_2_35" in build and "--exclude libmlx.so" in build
