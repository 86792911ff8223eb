"""llama.cpp: its server on this machine, asked for one text or for several at once.

Times of a text alone are the server's own, so what HTTP costs is in those of several at once only.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from install import GGUF, SERVER
from worker import Job, Text, peak_bytes

CONTEXT = 2048  # positions of a slot
START_S = 120.0


class Engine:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.server: subprocess.Popen[bytes] | None = None
        self.slots = self.port = 0
        self.ready_for(1)

    def versions(self) -> dict[str, str]:
        command = [str(Path(self.job.home) / SERVER), "--version"]
        told = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"version: (.*)", told.stdout + told.stderr)
        source = (Path(self.job.home) / "source.txt").read_text().strip()
        return {"llama.cpp": found[1] if found else "unknown", "from": source}

    def ready_for(self, streams: int) -> None:
        if self.slots == streams:
            return
        self.close()
        self.port = free_port()
        home, weights = Path(self.job.home), Path(self.job.plain_target).parent
        threads = str(self.job.threads)
        command = [str(home / SERVER), "-m", str(weights / GGUF.format("target"))]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--no-webui", "--offline"]
        command += ["-np", str(streams), "-c", str(CONTEXT * streams), "--cache-ram", "0"]
        command += ["-t", threads, "-tb", threads]
        if self.job.drafts:
            command += ["-md", str(weights / GGUF.format("assistant")), "--spec-type", "draft-mtp"]
            command += ["--spec-draft-n-max", str(self.job.drafts)]
        log = weights / "llama-server.log"
        with log.open("wb") as file:
            self.server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.slots = streams
        deadline = time.monotonic() + START_S
        while not self._is_up():
            if self.server.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").splitlines()
                raise SystemExit("llama-server does not start: " + "\n".join(lines[-20:]))
            time.sleep(0.1)

    def _url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url()}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # nobody listens yet, or it is still loading
            return False

    def _ask(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        asked = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"{self._url()}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    def write(self, prompt: list[int], tokens: int) -> Text:
        answer = self._ask(prompt, tokens)
        times = answer["timings"]
        return Text(answer["tokens"], times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3)

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = pool.map(lambda prompt: self._ask(prompt, tokens), prompts)
            return [answer["tokens"] for answer in answers]

    def processor_s(self) -> float | None:
        assert self.server is not None
        stat = Path(f"/proc/{self.server.pid}/stat")
        if not stat.exists():
            return None
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int | None:
        assert self.server is not None
        return peak_bytes(str(self.server.pid))

    def close(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
