"""`.ci/mac_wheel.py`: each thing that can be wrong with a macOS wheel is seen."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("lief", reason="the extra lint is needed to read Mach-O files")
pytest.importorskip("installer", reason="the extra lint is needed to read wheels")

ROOT = Path(__file__).parents[2]
NAME = "pyengine_mlx-0.1.0-cp311-cp311-macosx_14_0_arm64.whl"
INFO = "pyengine_mlx-0.1.0.dist-info"
EXTENSION = "pyengine/_ext.cpython-311-darwin.so"
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mac_wheel", ROOT / ".ci" / "mac_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a wheel of this checkout around a file that is no extension."""
    folder = tmp_path_factory.mktemp("wheel")
    fake = folder / Path(EXTENSION).name
    fake.write_bytes(b"no Mach-O")
    made = script.build(fake, folder / "out")
    assert made.name.endswith("-cp311-cp311-macosx_14_0_arm64.whl")
    with zipfile.ZipFile(made) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}


def written(files: Files, path: Path, *, record: bool = True) -> Path:
    """A wheel of these files; with a new RECORD, or with the one among them."""
    info = next(name.split("/")[0] for name in files if name.endswith("/METADATA"))
    lines = [f"{info}/RECORD,,"]
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        if not name.endswith("/RECORD"):
            lines.append(f"{name},sha256={digest},{len(data)}")
    if record:
        files = {**files, f"{info}/RECORD": "\n".join([*lines, ""]).encode()}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


def of_info(files: Files, name: str) -> str:
    return next(each for each in files if each.endswith(f".dist-info/{name}"))


@pytest.fixture
def healthy(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in the extension's place is one."""
    monkeypatch.setattr(script, "mach_problems", lambda data, name, mlx: [])


def test_a_wheel_of_this_checkout(
    script: ModuleType, files: Files, healthy: None, tmp_path: Path
) -> None:
    name = Path(of_info(files, "METADATA")).parent.name.removesuffix(".dist-info")
    path = written(files, tmp_path / f"{name}-cp311-cp311-macosx_14_0_arm64.whl")
    assert script.problems(path, None) == []
    assert "pyengine/nano/target/model.safetensors" in files and EXTENSION in files
    assert b"Root-Is-Purelib: false" in files[of_info(files, "WHEEL")]


def without(name: str) -> Callable[[Files], None]:
    return lambda files: files.__delitem__(name)


def replaced(name: str, old: bytes, new: bytes) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        key = of_info(files, name)
        assert old in files[key]
        files[key] = files[key].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("pyengine/cli/card.py"), "files: pyengine/cli/card.py is missing"),
        (without(EXTENSION), f"files: {EXTENSION} is missing"),
        (lambda f: f.update({"mlx/lib/libmlx.dylib": b""}), "mlx/lib/libmlx.dylib must not be th"),
        (lambda f: f.update({"pyengine/x.metal": b""}), "pyengine/x.metal must not be there"),
        (lambda f: f.pop(of_info(f, "licenses/LICENSE")), "the licence is missing"),
        (replaced("WHEEL", b"-macosx_14_0_", b"-macosx_15_0_"), "WHEEL: tags must be the name's"),
        (replaced("WHEEL", b"false", b"true"), "Root-Is-Purelib must be false but is true"),
        (replaced("METADATA", b"Name: pyengine-mlx", b"Name: pyengine"), "Name must be pyengine-m"),
        (replaced("METADATA", b"\nVersion: ", b"\nVersion: 9"), "METADATA: Version must be"),
        (replaced("METADATA", b">=3.10", b">=3.9"), "METADATA: Requires-Python must be"),
        (
            replaced("METADATA", b'sys_platform == "darwin"', b'sys_platform == "win32"'),
            "what macOS needs of mlx must be mlx==",
        ),
        (
            replaced("METADATA", b"Provides-Extra: plot\n", b"Provides-Extra: plots\n"),
            "METADATA: Provides-Extra must be",
        ),
    ],
)
def test_each_fault_of_a_wheel(
    script: ModuleType,
    files: Files,
    healthy: None,
    tmp_path: Path,
    change: Callable[[Files], None],
    text: str,
) -> None:
    changed = dict(files)
    name = Path(of_info(files, "METADATA")).parent.name.removesuffix(".dist-info")
    change(changed)
    path = written(changed, tmp_path / f"{name}-cp311-cp311-macosx_14_0_arm64.whl")
    found = script.problems(path, None)
    assert any(text in line for line in found), found


@pytest.mark.parametrize(
    "tags", ["py3-none-any", "cp311-cp311-macosx_13_0_arm64", "cp311-abi3-macosx_14_0_arm64"]
)
def test_tags_that_pip_would_take_elsewhere(
    script: ModuleType, files: Files, healthy: None, tmp_path: Path, tags: str
) -> None:
    changed = dict(files)
    key = of_info(files, "WHEEL")
    changed[key] = changed[key].replace(b"cp311-cp311-macosx_14_0_arm64", tags.encode())
    name = Path(key).parent.name.removesuffix(".dist-info")
    found = script.problems(written(changed, tmp_path / f"{name}-{tags}.whl"), None)
    assert f"name: tag must be cp3xx-cp3xx-macosx_14_0_arm64 but is {tags}" in found


def test_a_byte_that_its_hash_does_not_know(
    script: ModuleType, files: Files, healthy: None, tmp_path: Path
) -> None:
    name = Path(of_info(files, "METADATA")).parent.name.removesuffix(".dist-info")
    path = tmp_path / f"{name}-cp311-cp311-macosx_14_0_arm64.whl"
    for changed in ({**files, EXTENSION: b"other"}, {**files, "pyengine/new.py": b""}):
        found = script.problems(written(changed, path, record=False), None)
        assert any(line.startswith("RECORD: ") for line in found), found


def test_what_is_no_extension_of_a_mac(script: ModuleType) -> None:
    ours = next((ROOT / "pyengine").glob("_ext*.so"), None) or shutil.which("true")
    for data in (b"no Mach-O", Path(str(ours)).read_bytes()):
        found = script.mach_problems(data, "_ext.so", None)
        assert found == ["must be a Mach-O file of one architecture but is not"]


class Linker:
    """Links an extension for a Mac by zig, as .ci/cross_link.sh does, to a stand-in of libmlx."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mlx.c").write_text("int mlx_it(void) { return 1; }")
        (folder / "other.c").write_text("int other(void) { return 1; }")
        code = "int mlx_it(void); void *PyInit__ext(void) { return (void *)(long)mlx_it(); }"
        (folder / "ext.c").write_text(code)
        (folder / "noinit.c").write_text(code.replace("PyInit", "Init"))
        foreign = code.replace("(void) { return", "(void) { other(); return")
        (folder / "foreign.c").write_text(f"int other(void); {foreign}")
        (folder / "alone.c").write_text("void *PyInit__ext(void) { return 0; }")
        (folder / "mlx" / "lib").mkdir(parents=True)
        self.link("mlx/lib/libmlx.dylib", "-Wl,-install_name,@rpath/libmlx.dylib", "mlx.c")
        self.link("libother.dylib", "-Wl,-install_name,/opt/libother.dylib", "other.c")

    def link(self, out: str, *arguments: str, target: str = "aarch64-macos.14.0") -> Path:
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-o", out]
        subprocess.run([*zig, *arguments], cwd=self.folder, check=True, capture_output=True)
        return self.folder / out

    def extension(self, *arguments: str, target: str = "aarch64-macos.14.0") -> bytes:
        return self.link("_ext.cpython-311-darwin.so", *arguments, target=target).read_bytes()


@pytest.fixture(scope="module")
def linker(tmp_path_factory: pytest.TempPathFactory) -> Linker:
    return Linker(tmp_path_factory.mktemp("zig"))


RPATH, MLX = "-Wl,-rpath,@loader_path/../mlx/lib", "mlx/lib/libmlx.dylib"


def test_an_extension_of_a_mac(script: ModuleType, linker: Linker, tmp_path: Path) -> None:
    data = linker.extension(RPATH, "ext.c", MLX)
    name = Path(EXTENSION).name
    assert script.mach_problems(data, name, linker.folder) == []
    (found,) = script.mach_problems(data, name, tmp_path)
    assert found.endswith("mlx/lib/libmlx.dylib must be @rpath/libmlx.dylib but is None")
    (tmp_path / "mlx" / "lib").mkdir(parents=True)
    shutil.copy(linker.folder / "libother.dylib", tmp_path / MLX)
    (found,) = script.mach_problems(data, name, tmp_path)
    assert found.endswith("must be @rpath/libmlx.dylib but is /opt/libother.dylib")


@pytest.mark.parametrize(
    ("arguments", "target", "text"),
    [
        (["ext.c", MLX], "aarch64-macos.14.0", "rpaths must be ['@loader_path/../mlx/lib'] but"),
        ([RPATH, "-Wl,-rpath,/usr/local/lib", "ext.c", MLX], "aarch64-macos.14.0", "rpaths must"),
        ([RPATH, "ext.c", MLX], "aarch64-macos.15.0", "oldest macOS must be [14, 0, 0] but is [15"),
        ([RPATH, "ext.c", "mlx.c"], "x86_64-macos.14.0", "architecture must be "),
        ([RPATH, "noinit.c", MLX], "aarch64-macos.14.0", "export of its init function must be"),
        ([RPATH, "alone.c"], "aarch64-macos.14.0", "times it loads libmlx must be 1 but is 0"),
        (
            [RPATH, "foreign.c", MLX, "libother.dylib"],
            "aarch64-macos.14.0",
            "libraries that no Mac has must be [] but is ['/opt/libother.dylib']",
        ),
    ],
)
def test_each_fault_of_an_extension(
    script: ModuleType, linker: Linker, arguments: list[str], target: str, text: str
) -> None:
    data = linker.extension(*arguments, target=target)
    found = script.mach_problems(data, Path(EXTENSION).name, None)
    assert any(text in line for line in found), found


@pytest.mark.parametrize("name", ["_ext.cpython-311-x86_64-linux-gnu.so", "ext.so"])
def test_another_extension_is_refused(script: ModuleType, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"must be named _ext.cpython-3\*-darwin.so but is"):
        script.build(tmp_path / name, tmp_path)
