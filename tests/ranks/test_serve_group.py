"""A server whose target is shared: what a client and the user see when a rank is gone."""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from groups import SECONDS, start

from pyengine.ranks.group import ENDED

COMMAND = [sys.executable, "-m", "pyengine", "serve", "--port", "0", "--json", "--quiet"]
ASKED = {
    "model": "pyengine-nano",
    "messages": [{"role": "user", "content": "Write a Snake game."}],
    "max_tokens": 900,
    "temperature": 0,
    "stream": True,
}


@pytest.mark.ranks
def test_a_rank_that_is_killed_ends_the_answer_and_the_server(tmp_path: Path) -> None:
    first, other = started = start(tmp_path, 2, command=COMMAND)
    try:
        assert first.stdout is not None
        place = urlsplit(json.loads(first.stdout.readline())["url"])
        client = http.client.HTTPConnection(place.netloc, timeout=SECONDS)
        body, kind = json.dumps(ASKED), {"content-type": "application/json"}
        client.request("POST", f"{place.path}/chat/completions", body, kind)
        answer = client.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: ")
        other.kill()
        try:
            rest = answer.read()
        except (http.client.IncompleteRead, ConnectionError) as error:
            rest = getattr(error, "partial", b"")
        assert b"[DONE]" not in rest or b'"error"' in rest
        _, err = first.communicate(timeout=SECONDS)
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = [line for line in err.splitlines() if "[ranks]" in line]
    assert first.returncode == ENDED and len(said) == 1, err
    assert "every rank must stay but one has ended; rank 0 of 2 ends." in said[0]
    assert "Traceback" not in err
