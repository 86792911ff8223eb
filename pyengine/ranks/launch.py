"""MLX's launcher, ending as what it ran did: its own exit code is 0 whatever happens.

python -m pyengine.ranks.launch --hostfile hosts.json -- -m pyengine generate "..."
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

from mlx._distributed_utils import launch

from pyengine.untrusted import shown

PATIENCE = 5.0  # seconds that a process has to end when another has failed
UNREACHED = (127, 255)  # there is no ssh here; ssh has failed by itself


def code_of(codes: Iterable[int | None]) -> int:
    """Of processes in the order in which they ended: the first that failed by itself decides; what
    a signal ended, as the launcher does to those that are left, is a failure of the run."""
    known = [code for code in codes if code]
    return next((code for code in known if code > 0), 1 if known else 0)


def main() -> NoReturn:
    """Run the launcher on this process's arguments."""
    codes: list[int | None] = []
    unreached: dict[str, int] = {}  # hosts, with ssh's exit code

    class Noted(launch.RemoteProcess):
        @property
        def exit_status(self) -> tuple[int | None, bool]:
            code, was_killed = super().exit_status
            codes.append(code)
            if code in UNREACHED and not self._is_local:
                unreached[self._host] = code
            return code, was_killed

        def terminate(self) -> None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # the launcher would wait for it for ever
                self.process.kill()
            if self._pidfile is not None:  # else nothing has begun there
                with suppress(subprocess.CalledProcessError):  # its host is gone too
                    super().terminate()  # type: ignore[no-untyped-call]

    launch.RemoteProcess = Noted  # type: ignore[misc]
    # Which rank had which code: they have said why
    launch.log_warning = lambda *said: None  # type: ignore[attr-defined]
    try:
        launch.main()  # type: ignore[no-untyped-call]
    except KeyboardInterrupt:  # reaches every process of the terminal, each of which ends by itself
        raise SystemExit(130) from None
    if unreached:
        host, code = next(iter(unreached.items()))
        line = f"ssh must reach {shown(host)} and ask for nothing but ended with code {code}."
        print(f"pyengine: [ranks] {line}", file=sys.stderr)
        raise SystemExit(1)
    if codes and all(code is not None and code <= 0 for code in codes) and any(codes):
        print("pyengine: [ranks] a rank was ended by a signal.", file=sys.stderr)
    raise SystemExit(code_of(codes))


if __name__ == "__main__":
    main()
