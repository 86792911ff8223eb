"""Make a macOS wheel around a cross-linked extension, and check macOS wheels.

    python .ci/mac_wheel.py build EXTENSION FOLDER   a wheel of this checkout; prints its path
    python .ci/mac_wheel.py check WHEEL ... [--mlx FOLDER]

A wheel is what pip would be given on a Mac, so everything that pip and macOS's loader read is
checked: name and tags, metadata, the hash of every file, which files there are; and of the
extension the Mach-O header, the oldest macOS, the libraries it loads, where it looks for them, and
its signature.
`--mlx` is an unpacked wheel of mlx-metal, in which the extension must find its library.

`build` is for a check and no release: the extension of .ci/cross_link.sh has zig's libc++. Needs
the extra `lint`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lief
import tomllib
from installer.sources import WheelFile
from installer.utils import parse_metadata_file
from packaging.metadata import Metadata
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PLATFORM, OLDEST = "macosx_14_0_arm64", [14, 0, 0]
RPATH, LIBRARY = "@loader_path/../mlx/lib", "@rpath/libmlx.dylib"
SYSTEM = ("/usr/lib/", "/System/Library/Frameworks/")
lief.logging.disable()  # what it cannot read is told below
EXTENSION = re.compile(r"pyengine/_ext\.cpython-(3\d+)-darwin\.so")


def build(extension: Path, folder: Path) -> Path:
    """A wheel of this checkout, made by its own build backend, with an extension put in."""
    found = EXTENSION.fullmatch(f"pyengine/{extension.name}")
    if not found:
        raise ValueError(f"extension must be named _ext.cpython-3*-darwin.so but is {extension}.")
    python = f"cp{found[1]}"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-Cwheel.cmake=false"]
        subprocess.run([*pip, "--wheel-dir", str(work), str(ROOT)], check=True, stdout=sys.stderr)
        (plain,) = work.glob("*.whl")
        wheel = [sys.executable, "-m", "wheel"]
        subprocess.run(
            [*wheel, "unpack", "--dest", name, str(plain)], check=True, stdout=sys.stderr
        )
        (unpacked,) = (path for path in work.iterdir() if path.is_dir())
        shutil.copy(extension, unpacked / "pyengine")
        (described,) = unpacked.glob("*.dist-info/WHEEL")
        lines = [
            line.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
            for line in described.read_text().splitlines()
            if line and not line.startswith("Tag: ")
        ]
        described.write_text("\n".join([*lines, f"Tag: {python}-{python}-{PLATFORM}", ""]))
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [*wheel, "pack", "--dest-dir", name, str(unpacked)], check=True, stdout=sys.stderr
        )
        plain.unlink()
        (made,) = work.glob("*.whl")
        return Path(shutil.copy(made, folder))


def problems(path: Path, mlx: Path | None) -> list[str]:
    """What is wrong with a wheel."""
    found: list[str] = []
    with WheelFile.open(path) as wheel:
        try:
            wheel.validate_record()
        except ValueError as error:  # every file must be listed, with its hash
            found.append(f"RECORD: {error}")
        metadata = wheel.read_dist_info("METADATA")
        described = parse_metadata_file(wheel.read_dist_info("WHEEL"))
        names = [str(record[0]) for record, _, _ in wheel.get_contents()]
        binaries = {str(r[0]): s.read() for r, s, _ in wheel.get_contents() if _is_binary(r[0])}
    found += _tag_problems(path, described.get_all("Tag", []), described["Root-Is-Purelib"])
    found += _metadata_problems(path, metadata)
    found += _file_problems(path, names)
    for name, data in binaries.items():
        found += [f"{name}: {text}" for text in mach_problems(data, Path(name).name, mlx)]
    return found


def _is_binary(name: str) -> bool:
    return name.endswith((".so", ".dylib"))


def _tag_problems(path: Path, listed: list[str], purelib: str) -> list[str]:
    found = []
    tags = sorted(map(str, parse_wheel_filename(path.name)[3]))
    if tags != sorted(listed):
        found.append(f"WHEEL: tags must be the name's {tags} but are {listed}")
    for tag in tags:
        python, abi, platform = tag.split("-")
        if not re.fullmatch(r"cp3\d+", python) or abi != python or platform != PLATFORM:
            found.append(f"name: tag must be cp3xx-cp3xx-{PLATFORM} but is {tag}")
    if purelib != "false":
        found.append(f"WHEEL: Root-Is-Purelib must be false but is {purelib}")
    return found


def _metadata_problems(path: Path, text: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = Metadata.from_email(text, validate=True)
    name, version, _, _ = parse_wheel_filename(path.name)
    environment = {"sys_platform": "darwin", "platform_system": "Darwin", "extra": ""}
    needed = {
        str(need.name): str(need.specifier)
        for need in metadata.requires_dist or []
        if need.marker is None or need.marker.evaluate(environment)
    }
    pins = [line for line in project["dependencies"] if "darwin" in line]
    (mlx,) = (line.split(";")[0].strip() for line in pins)
    wanted = {
        "Name": (metadata.name, project["name"]),
        "the name's version": (version, metadata.version),
        "the name": (name.replace("_", "-"), project["name"]),
        "Version": (str(metadata.version), project["version"]),
        "Requires-Python": (metadata.requires_python, SpecifierSet(project["requires-python"])),
        "what macOS needs of mlx": (f"mlx{needed.get('mlx')}", mlx),
        "Provides-Extra": (
            sorted(metadata.provides_extra or []),
            sorted(project["optional-dependencies"]),
        ),
    }
    return [
        f"METADATA: {what} must be {want} but is {got}"
        for what, (got, want) in wanted.items()
        if got != want
    ]


def _file_problems(path: Path, names: list[str]) -> list[str]:
    """The package as it is in this checkout, an extension and its licence, and nothing else."""
    python = path.name.split("-")[-3]
    package = ROOT / "pyengine"
    kept = {
        f"pyengine/{file.relative_to(package)}"
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("_ext.")
    }
    info = re.compile(
        r"pyengine_mlx-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
    )
    there = {name for name in names if not info.fullmatch(name)}
    extension = f"pyengine/_ext.cpython-{python.removeprefix('cp')}-darwin.so"
    wanted = kept | {extension}
    found = [f"files: {name} is missing" for name in sorted(wanted - there)]
    extra = there - wanted - {"pyengine/_ext.pyi"}  # a build on a Mac makes the stub
    found += [f"files: {name} must not be there" for name in sorted(extra)]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        found.append("files: the licence is missing")
    return found


def mach_problems(data: bytes, name: str, mlx: Path | None) -> list[str]:
    """What is wrong with an extension for a Mac."""
    fat = lief.MachO.parse(list(data))
    if fat is None or len(fat) != 1:
        return ["must be a Mach-O file of one architecture but is not"]
    binary = fat.at(0)
    assert binary is not None
    kinds = lief.MachO.Header.FILE_TYPE
    own = [f"@rpath/{name}", name]
    loads = [str(library.name) for library in binary.libraries if str(library.name) not in own]
    foreign = [each for each in loads if each != LIBRARY and not each.startswith(SYSTEM)]
    paths = [str(rpath.path) for rpath in binary.rpaths]
    version = binary.build_version
    oldest = list(version.minos) if version else None
    rules = {
        "architecture": (binary.header.cpu_type, lief.MachO.Header.CPU_TYPE.ARM64),
        "kind": (binary.header.file_type in (kinds.BUNDLE, kinds.DYLIB), True),
        "platform": (version and version.platform, lief.MachO.BuildVersion.PLATFORMS.MACOS),
        "oldest macOS": (oldest, OLDEST),
        "rpaths": (paths, [RPATH]),
        "libraries that no Mac has": (foreign, []),
        "number of times it loads libmlx": (loads.count(LIBRARY), 1),
        "signature": (binary.has_code_signature, True),
        "export of its init function": (
            any(symbol.name == "_PyInit__ext" for symbol in binary.exported_symbols),
            True,
        ),
    }
    found = [
        f"{what} must be {want} but is {got}" for what, (got, want) in rules.items() if got != want
    ]
    if mlx is not None:
        # As the loader puts it together, from site-packages/pyengine
        there = mlx / "pyengine" / RPATH.removeprefix("@loader_path/") / "libmlx.dylib"
        library = Path(str(there).replace("/pyengine/..", ""))
        identity = _identity(library) if library.is_file() else None
        if identity != LIBRARY:
            found.append(f"{library} must be {LIBRARY} but is {identity}")
    return found


def _identity(library: Path) -> str | None:
    """The name that a library says others should load it by."""
    fat = lief.MachO.parse(str(library))
    binary = fat.at(0) if fat is not None else None
    kind = lief.MachO.LoadCommand.TYPE.ID_DYLIB
    commands = [each for each in binary.commands if each.command == kind] if binary else []
    return str(commands[0].name) if commands else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build")
    making.add_argument("extension", type=Path)
    making.add_argument("folder", type=Path)
    checking = commands.add_parser("check")
    checking.add_argument("wheels", type=Path, nargs="+")
    checking.add_argument("--mlx", type=Path)
    asked = parser.parse_args()
    if asked.command == "build":
        print(build(asked.extension, asked.folder))
        return
    bad = 0
    for path in asked.wheels:
        found = problems(path, asked.mlx)
        print(f"{path.name}: {'; '.join(found) if found else 'as it should be'}")
        bad += bool(found)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
