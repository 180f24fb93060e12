"""One small byte-level vocabulary with Llama 4's special tokens, in Meta's format and in Hugging Face's."""

import base64
import json
import pathlib

from maxllama4.data.tokenizer import LLAMA4_PATTERN, LLAMA4_SPECIAL_TOKENS

MERGES = [
  (b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o"), (b" ", b"hello"), (b" ", b" "), (b"\n", b"\n"),
  (b"1", b"2"), (b"12", b"3"), (b"123", b"4"), (b"e", b"r"), (b"u", b"s"), (b"us", b"er"), (b"\xc3", b"\xa9"),
  (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x98"), (b"|", b">"), (b"<", b"|"), (b"A", b"B"), (b"'", b"s"), (b"a", b"a"),
]  # fmt: skip
# Bytes first, in another order than their values, as in Meta's file.
TOKENS = [bytes([(b * 7 + 192) % 256]) for b in range(256)] + [a + b for a, b in MERGES]


def write_tiktoken(path: pathlib.Path) -> pathlib.Path:
  lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS)]
  path.write_bytes(b"".join(lines))
  return path


def write_hugging_face(path: pathlib.Path) -> pathlib.Path:
  special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  added = [
    {"id": len(TOKENS) + i, "content": name, "special": True, **special}
    for i, name in enumerate(LLAMA4_SPECIAL_TOKENS)
  ]
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
  split = {"type": "Split", "pattern": {"Regex": LLAMA4_PATTERN}, "behavior": "Isolated"}
  content = {
    "version": "1.0",
    "added_tokens": added,
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
    },
    "decoder": byte_level | {"use_regex": True},
    "model": {
      "type": "BPE",
      "vocab": {_characters(token): rank for rank, token in enumerate(TOKENS)},
      "merges": [[_characters(a), _characters(b)] for a, b in MERGES],
    },
  }
  path.write_text(json.dumps(content))
  return path


def _characters(token: bytes) -> str:
  """A character for each byte: visible ones in Latin-1 stand for themselves, the others follow from U+0100."""
  visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
  hidden = [byte for byte in range(256) if byte not in visible]
  return "".join(chr(b if b in visible else 256 + hidden.index(b)) for b in token)
