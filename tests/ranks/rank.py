"""One process of a group, for tests: loads a pair, writes what it generates to standard output.

    python rank.py FOLDER [wait]

FOLDER holds target/ and assistant/; it may be "embedded". The launcher's variables are those of
MLX's. With "wait" rank 0 reads a line before its last call, so that somebody can end another rank.
"""

from __future__ import annotations

import json
import resource
import sys

import mlx.core as mx
import numpy as np

import pyengine
from pyengine.drafters import new_drafter
from pyengine.engine.loop import decode
from pyengine.engine.prefix import Prefix
from pyengine.sampling.settings import Sampling

PROMPT = [2, 5, 9, 17, 3, 40, 41, 7, 11, 23, 30, 31]


def main(folder: str, wait: str = "") -> None:
    if folder == "embedded":
        pair = pyengine.load()
    else:
        pair = pyengine.load(f"{folder}/target", f"{folder}/assistant")
    target = pair.target
    texts = {}
    for temperature in (0.0, 1.0):
        for block_size in (1, 4):
            sampling = Sampling(temperature=temperature, seed=5, verify="coupled")
            drafter = None if block_size == 1 else new_drafter("assistant", target, pair.assistant)
            rounds = decode(
                target, drafter, PROMPT, sampling=sampling, block_size=block_size, max_tokens=24
            )
            name = f"{temperature} {block_size}"
            texts[name] = [token for done in rounds for token in done.tokens]
    prefix, refused = Prefix(), list[str]()
    again = []
    for prompt in (PROMPT, [*PROMPT, 8, 9], [*PROMPT, 8, 12]):  # pages are copied
        sampling = Sampling(temperature=0.0)
        rounds = decode(
            target, None, prompt, sampling=sampling, block_size=1, max_tokens=8, prefix=prefix
        )
        again.append([token for done in rounds for token in done.tokens])
    for setting in ("cache_dir", "early_exit"):
        try:
            target.check_alone(setting)
        except ValueError as error:
            refused.append(str(error))
    if wait:
        print("ready", flush=True)
        sys.stdin.readline()
    logits = np.array(target.logits(PROMPT))
    found = {
        "texts": texts,
        "again": again,
        "refused": refused,
        "logits": logits.tolist(),
        "arrays": mx.get_peak_memory(),
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
