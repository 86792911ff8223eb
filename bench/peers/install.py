"""What is compared with: names, versions, and how each gets an environment of its own.

``python bench/peers/run.py --setup`` fetches packages from PyPI, and for llama.cpp a source
package of 77 MB that is built here. Nothing else touches the network.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

OURS = "pyengine"
MLX = "mlx==0.32.4" if sys.platform == "darwin" else "mlx[cpu]==0.32.4"
TORCH = ["torch==2.13.0", "transformers==5.24.0"]
LLAMA_CPP = "llama-cpp-python==0.3.36"  # a binding of Python; llama.cpp is in its source package

SERVER = Path("build/bin/llama-server")
CONVERTER = Path("llama.cpp/convert_hf_to_gguf.py")
GGUF = "{}-q8_0.gguf"

# It refuses an assistant as wide as its target. The embedded one is, and what follows does not
# depend on it.
PATCHED = Path("llama.cpp/src/models/gemma4-assistant.cpp")
REFUSES, ACCEPTS = "hparams.n_embd_out() == n_embd", "hparams.n_embd_out() == 0"

CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
# What g++ 12 makes of its AMX kernels ends at their first instruction: it leaves out the stores
# that the shapes of tiles are read from.
if platform.machine() == "x86_64":
    NO_TILES = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    CMAKE = (*CMAKE, f"-DCMAKE_C_FLAGS={NO_TILES}", f"-DCMAKE_CXX_FLAGS={NO_TILES}")


@dataclass(frozen=True)
class Peer:
    """One engine.

    Attributes:
        name: As on PyPI or GitHub.
        packages: Lists of what pip installs, one call each.
        weights: Whose bits it computes with.
        speculates: Whether it can use the pair's assistant.
        batches: Whether it writes several texts at once: plainly, speculatively.
        lacks: What it cannot do, in a sentence.
    """

    name: str
    packages: tuple[tuple[str, ...], ...]
    weights: str
    speculates: bool = True
    batches: tuple[bool, bool] = (True, True)
    lacks: str = ""

    def python(self, folder: Path) -> Path:
        return Path(sys.executable) if self.name == OURS else folder / self.name / "bin" / "python"

    def home(self, folder: Path) -> Path:
        return folder / self.name

    def is_installed(self, folder: Path) -> bool:
        """Whether :func:`install` has come to its end."""
        return self.name == OURS or (self.home(folder) / "installed.txt").exists()

    def modes(self, drafts: list[int]) -> list[int]:
        return [0, *drafts] if self.speculates else [0]


PEERS = (
    Peer(OURS, (), "8 bits in groups of 64"),
    Peer(
        "mlx-lm",
        ((MLX, "mlx-lm==0.32.2"),),
        "8 bits in groups of 64",
        speculates=False,
        batches=(True, False),
        lacks="mlx-lm knows no Gemma 4 assistant.",
    ),
    Peer(
        "mlx-vlm",
        # All that it asks for is much more than its text models import
        ((MLX, "mlx-lm==0.32.2", "requests", "pillow"), ("--no-deps", "mlx-vlm==0.7.10")),
        "8 bits in groups of 64",
    ),
    Peer(
        "transformers",
        (tuple(TORCH),),
        "bfloat16",
        batches=(True, False),
        lacks="transformers' assisted generation writes one text at a time.",
    ),
    Peer(
        "llama.cpp",
        ((*TORCH, "sentencepiece", "protobuf", "cmake", "ninja"),),
        "Q8_0: 8 bits in groups of 32",
    ),
)


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def install(peer: Peer, folder: Path) -> None:
    """An environment of its own; what is there already is used again."""
    if peer.name == OURS:
        return
    home = peer.home(folder)
    if not peer.python(folder).exists():
        run(sys.executable, "-m", "venv", home)
    for packages in peer.packages:
        run(peer.python(folder), "-m", "pip", "install", "--quiet", *packages)
    if peer.name == "llama.cpp":
        build(peer, folder)
    (home / "installed.txt").touch()


def build(peer: Peer, folder: Path) -> None:
    """llama-server with this machine's instructions, and without TLS and web page."""
    home, python = peer.home(folder), peer.python(folder)
    if not (home / "llama.cpp").exists():
        options = ["--no-deps", "--no-binary", ":all:", "--dest", home]
        run(python, "-m", "pip", "download", "--quiet", *options, LLAMA_CPP)
        unpack(next(home.glob("llama_cpp_python-*.tar.gz")), home)
    accept_equal_widths(home / PATCHED)
    # On the path of the environment, where pip has put cmake and ninja
    programs = python.parent
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", *CMAKE]
    run(programs / "cmake", "-S", home / "llama.cpp", "-B", home / "build", *options)
    jobs = str(os.cpu_count() or 1)
    run(programs / "cmake", "--build", home / "build", "--target", "llama-server", "-j", jobs)
    (home / "source.txt").write_text(LLAMA_CPP + "\n")


def unpack(archive: Path, home: Path) -> None:
    """The folder of llama.cpp alone out of the source package."""
    with tarfile.open(archive) as file:
        file.extractall(home, filter="data")
    [source] = home.glob("llama_cpp_python-*/vendor/llama.cpp")
    source.rename(home / "llama.cpp")


def accept_equal_widths(source: Path) -> None:
    """Take the check out, once.

    Raises:
        SystemExit: The source is not the one this was written for.
    """
    text = source.read_text()
    if text.count(REFUSES) + text.count(ACCEPTS) != 1:
        raise SystemExit(f"{source} does not hold `{REFUSES}` once: is it another release?")
    source.write_text(text.replace(REFUSES, ACCEPTS))


def convert(peer: Peer, folder: Path, weights: Path) -> None:
    """Both models as GGUF, by llama.cpp's own converter."""
    script = peer.home(folder) / CONVERTER
    for part in ("target", "assistant"):
        command = [peer.python(folder), script, weights / part, "--outtype", "q8_0"]
        command += ["--outfile", weights / GGUF.format(part)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(last_line(done.stderr))


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
