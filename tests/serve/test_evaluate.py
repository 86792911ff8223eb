"""lm-eval through its own registry, on a small task made here. Needs the extra eval."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import mlx.core as mx
import pytest

from pyengine.checkpoint.pair import load
from pyengine.generation import generate
from pyengine.sampling.settings import Sampling

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import pyengine.evaluate

GREEDY = Sampling(temperature=0.0)
GAME = "<!DOCTYPE html>\n<html>\n<head>\n"


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def model() -> pyengine.evaluate.PyengineLM:
    return get_model("pyengine").create_from_arg_string("block_size=4")


def test_loglikelihoods(model: pyengine.evaluate.PyengineLM) -> None:
    pairs = [(GAME, "<meta charset="), (GAME, "import numpy"), ("", "import os\n")]
    scored = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    tok, pair = model.pair.tokenizer, load()
    for (context, continuation), (total, greedy) in zip(pairs, scored, strict=True):
        ids, head = tok.encode(context + continuation, bos=True), tok.encode(context, bos=True)
        rows = pair.logits(ids)[:-1]
        logprobs = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        want = sum(float(logprobs[i, ids[i + 1]].item()) for i in range(len(head) - 1, len(rows)))
        assert math.isclose(total, want, abs_tol=1e-3)
        best = mx.argmax(rows[len(head) - 1 :], axis=-1).tolist()
        assert greedy == (best == ids[len(head) :])
    assert scored[0][0] > scored[1][0]
    (rolling,) = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", ("import os\n",)), disable_tqdm=True
    )
    assert math.isclose(rolling, scored[2][0], abs_tol=1e-3)


def test_generate_until(model: pyengine.evaluate.PyengineLM) -> None:
    settings = {"until": ["</head>", ""], "max_gen_toks": 40}
    (text,) = model.generate_until(requests("generate_until", (GAME, settings)), disable_tqdm=True)
    want = generate(GAME, pair=model.pair, raw=True, max_tokens=40, sampling=GREEDY, stop="</head>")
    assert text == want.text and len(text) > 20
    several = [(GAME, settings), ("import os\n", {"max_gen_toks": 9}), (GAME, settings)]
    texts = model.generate_until(requests("generate_until", *several), disable_tqdm=True)
    other = generate("import os\n", pair=model.pair, raw=True, max_tokens=9, sampling=GREEDY)
    assert texts == [want.text, other.text, want.text]
    drafts = get_model("pyengine").create_from_arg_string("block_size=4,drafter=dflash")
    assert drafts.generate_until(requests("generate_until", *several), disable_tqdm=True) == texts
    with pytest.raises(ValueError, match=r"\[generate\] drafter must be assistant, dflash"):
        get_model("pyengine").create_from_arg_string("drafter=best")
    chat = model.apply_chat_template([{"role": "user", "content": "Snake"}])
    assert (
        chat.startswith("<bos>") and model.tok_encode(chat).count(model.pair.tokenizer.bos_id) == 1
    )


TASK = """
task: small_lines
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
{rest}
"""
CHOICE = """
doc_to_target: 0
doc_to_choice: ["<meta charset=\\"UTF-8\\">", "import numpy as np"]
metric_list: [{metric: acc}]
"""


def run_small_task(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`small_lines`, two lines of JSON, through a command that is lm-eval's."""
    data = folder / "data.jsonl"
    data.write_text(2 * (json.dumps({"context": GAME}) + "\n"))
    task = TASK.format(data=data, kind="multiple_choice", rest=CHOICE)
    (folder / "small_lines.yaml").write_text(task)
    return subprocess.run(
        [
            *(*command, "--model", "pyengine", "--model_args", "block_size=4"),
            *("--tasks", "small_lines", "--include_path", str(folder)),
            *("--output_path", str(folder / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )


def check_small_task(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-2000:]
    results = next((folder / "out").rglob("results*.json"))
    assert json.loads(results.read_text())["results"]["small_lines"]["acc,none"] == 1.0


def test_our_command_runs_a_task(tmp_path: Path) -> None:
    """`python -m pyengine.evaluate` is lm-eval's command with the model in its registry."""
    done = run_small_task(tmp_path, sys.executable, "-m", "pyengine.evaluate", "run")
    check_small_task(tmp_path, done)


def test_the_entry_point_is_the_model() -> None:
    """By which an lm-eval with plugins finds it."""
    (entry,) = entry_points(group="lm_eval.models", name="pyengine")
    assert entry.load() is pyengine.evaluate.PyengineLM
