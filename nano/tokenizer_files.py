"""tokenizer.json equal to a SentencePiece BPE model, and the files that go with it.

    python nano/tokenizer_files.py RUN       # compare both over the corpus and odd text

`write_tokenizer` is used by export.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import sentencepiece as spm
from data import CONTROL, HELD_FAMILY_SEED, HELD_SEED, LAYOUT, SPECIAL, stdlib_files
from game_families import HELD_BACK
from games import make_game
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPACE = "\u2581"
# Gemma 4's turns: <bos>, then <|turn>ROLE\n text <turn|>\n, the assistant's role being "model". As
# in the template of July 2026, parts of a system message are words apart, those of others are not.
# Tools, calls and results have Gemma 4's marks and values; the pair never learned to call.
CHAT_TEMPLATE = """\
{%- macro text(content, between) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}
{%- for part in content or [] if part.type == 'text' -%}
{{- '' if loop.first else between -}}
{{- part.text | trim -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro value(x) -%}
{%- if x is string -%}{{ '<|"|>' + x + '<|"|>' }}
{%- elif x is mapping -%}
{{- '{' -}}
{%- for key, item in x | dictsort -%}
{{- key + ':' + value(item) -}}
{{- '' if loop.last else ',' -}}
{%- endfor -%}
{{- '}' -}}
{%- elif x is sequence -%}
{{- '[' -}}
{%- for item in x -%}
{{- value(item) -}}
{{- '' if loop.last else ',' -}}
{%- endfor -%}
{{- ']' -}}
{%- elif x is none -%}{{ 'null' }}
{%- elif x is boolean -%}{{ 'true' if x else 'false' }}
{%- else -%}{{ x }}
{%- endif -%}
{%- endmacro -%}
{{- '<bos>' -}}
{%- set seen = namespace(role='', calls=[], result=false) -%}
{%- for tool in tools or [] -%}
{%- set f = tool.function -%}
{{- '<|turn>system\\n' if loop.first else '' -}}
{{- '<|tool>declaration:' + f.name + '{description:' + value(f.description or '') -}}
{{- ',parameters:' + value(f.parameters or {}) + '}<tool|>' -}}
{%- set seen.role = 'system' -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set role = {'assistant': 'model', 'developer': 'system'}.get(message.role, message.role) -%}
{%- set seen.result = role == 'tool' and seen.calls != [] -%}
{%- if seen.result -%}
{%- for call in seen.calls if call.id and call.id == message.tool_call_id -%}
{{- '<|tool_response>response:' + call.function.name -}}
{%- else -%}
{{- '<|tool_response>response:' + (message.name or 'unknown') -}}
{%- endfor -%}
{%- set content = message.content -%}
{%- set plain = content is mapping or content is string -%}
{%- set content = content if plain else text(content, '') -%}
{{- value(content if content is mapping else {'value': content}) + '<tool_response|>' -}}
{%- else -%}
{%- if role != 'model' or seen.role != 'model' -%}
{{- '<turn|>\\n' if seen.role else '' -}}
{{- '<|turn>' + role + '\\n' -}}
{%- endif -%}
{{- text(message.content, ' ' if role == 'system' else '') -}}
{%- set seen.role = role -%}
{%- set seen.calls = message.tool_calls or [] -%}
{%- for call in seen.calls -%}
{{- '<|tool_call>call:' + call.function.name + value(call.function.arguments) + '<tool_call|>' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if not (seen.result and add_generation_prompt) -%}
{{- '<turn|>\\n' if seen.role else '' -}}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
{%- endif -%}
"""


def merges_of(sp: spm.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first."""
    scores = {
        sp.id_to_piece(i): sp.get_score(i)
        for i in range(sp.vocab_size())
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
        and sp.id_to_piece(i) not in SPECIAL + LAYOUT
    }
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, left, right))
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]


def build(sp: spm.SentencePieceProcessor) -> Tokenizer:
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of(sp),
            unk_token=CONTROL["unk_piece"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [value for key, value in CONTROL.items() if key.endswith("_piece")]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control + SPECIAL])
    # Indents are matched after spaces became U+2581, hence normalized.
    tokenizer.add_tokens([AddedToken(t, normalized=SPACE in t) for t in LAYOUT])
    return tokenizer


def write_tokenizer(model: Path, folder: Path) -> None:
    shutil.copy(model, folder / "tokenizer.model")
    build(spm.SentencePieceProcessor(model_file=str(model))).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 8192,
        "extra_special_tokens": {"sot_token": "<|turn>", "eot_token": "<turn|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def odd_texts(seed: int, count: int) -> list[str]:
    """Strings of runs, digits, other scripts, emoji and control characters."""
    rng = random.Random(seed)
    parts = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "a", "aa", "__", "==", "self", "0123"]
    parts += ["é", "ß", "中文", "한", "🙂", "e\u0301", "\u00a0", "\u2581", "\x00", "\x7f", "'''"]
    parts += ["<|turn>", "<turn|"]
    return ["".join(rng.choices(parts, k=rng.randint(1, 40))) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    sp = spm.SentencePieceProcessor(model_file=str(parser.parse_args().run / "tokenizer.model"))
    tokenizer = build(sp)
    texts = list(stdlib_files().values())
    texts += [make_game(HELD_SEED + s).chat() for s in range(100)]
    texts += [make_game(HELD_FAMILY_SEED + s, HELD_BACK).chat() for s in range(100)]
    texts += odd_texts(0, 20000)
    different = wrong = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != sp.encode(text):
            different += 1
            print("differs:", repr(text[:80]))
        if tokenizer.decode(ids, skip_special_tokens=False) != text.replace(SPACE, " "):
            wrong += 1
    print(f"{len(texts)} texts, {different} encoded differently, {wrong} not decoded back")


if __name__ == "__main__":
    main()
