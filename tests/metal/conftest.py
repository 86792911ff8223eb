"""What tests of the count tables share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import attention_counts, cli, kernel_counts, layer_counts, rule_counts

COUNTERS = {
    "kernels": (kernel_counts, "count_kernels"),
    "attention": (attention_counts, "count_attention"),
    "layers": (layer_counts, "count_layers"),
    "rules": (rule_counts, "count_rules"),
    "round_": (rule_counts, "count_round"),
}


@pytest.fixture
def count_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """`bench kernels --count` of given counts, by table, and none else: its text, its JSON."""

    def run(**given: list[Any]) -> tuple[str, str]:
        for table, (module, counter) in COUNTERS.items():
            rows = given.get(table, [])
            monkeypatch.setattr(module, counter, lambda on_count=None, rows=rows: list(rows))
        command = ["bench", "kernels", "--count"]
        text = CliRunner().invoke(cli.app, command)
        as_json = CliRunner().invoke(cli.app, [*command, "--json"])
        assert (text.exit_code, as_json.exit_code) == (0, 0), text.output + as_json.output
        return text.stdout, as_json.stdout

    return run
