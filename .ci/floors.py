"""Print, as pip's constraints, the lowest version of each dependency that pyproject.toml allows."""

import re
import sys
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
floors: dict[str, str] = {}
for extra in ("", "test", "serve", "hub"):
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for requirement in listed:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if found is None:
            if "==" not in requirement:
                sys.exit(f"[floors] a dependency must have a floor or a pin but got {requirement}.")
            continue
        name, version = found.groups()
        if floors.setdefault(name, version) != version:
            sys.exit(f"[floors] {name} must have one floor but got {floors[name]} and {version}.")
print("\n".join(f"{name}=={version}" for name, version in floors.items()))
