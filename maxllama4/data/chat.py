"""Dialogs to token ids, as the released models were trained on them.

A message is a dictionary with `role` (system, user, assistant, tool) and `content`: a text, or a list of parts,
`{"type": "text", "text": ...}` and `{"type": "image", "image": a path or a PIL image}`. In place of the image itself
`"size": [width, height]` will do, since only the size decides the ids. A message of the assistant may have
`tool_calls`, in OpenAI's form `{"function": {"name", "arguments"}}` or Meta's `{"tool_name", "arguments"}`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from maxllama4.config import ConfigError
from maxllama4.data.images import ImageTokenIds, best_canvas, image_token_layout, load_image

if typing.TYPE_CHECKING:
  from maxllama4.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Part = Mapping[str, Any]
END_OF_TURN, END_OF_MESSAGE = "<|eot|>", "<|eom|>"
HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}


@dataclasses.dataclass(frozen=True)
class EncodedChat:
  """A dialog as ids. `loss_mask` is true where the assistant wrote the id: its messages and what closes them."""

  ids: list[int]
  loss_mask: list[bool]  # as long as `ids`
  images: list[Part]  # the image parts, in the order of their ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
  """How a dialog is written; the defaults are Meta's for the released models.

  Meta's and Hugging Face's templates differ in `tool_end`, and the released models write both; generation has to stop
  at both. Source: meta-llama/llama-models models/llama4/chat_format.py@a9c89c4.
  """

  tool_end: str = END_OF_MESSAGE  # closes calls of tools and their answers; Hugging Face: <|eot|>
  tile_size: int = 336  # pixels along a side of a tile
  patches_per_tile: int = 144  # ids for a tile
  max_tiles: int = 16  # of an image, the small copy of the whole not counted

  def encode(
    self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
  ) -> EncodedChat:
    """The dialog from bos to the end of the last message, or to where the assistant's answer starts.

    Text of messages never becomes special tokens. Raises: ConfigError naming the message that is malformed, or the
    special token that `tokenizer` lacks.
    """
    writer = _Writer(self, tokenizer)
    writer.add([tokenizer.bos_token_id])
    for number, message in enumerate(messages):
      writer.add_message(message, f"messages[{number}]")
    if add_generation_prompt:
      writer.add_header("assistant")
    return writer.chat

  def encode_parts(self, tokenizer: Tokenizer, parts: Sequence[Part]) -> EncodedChat:
    """Texts and images as they stand, after bos: a document, not a dialog. Raises: ConfigError, as `encode`."""
    writer = _Writer(self, tokenizer)
    writer.add([tokenizer.bos_token_id])
    for number, part in enumerate(parts):
      writer.add(writer.part_ids(part, f"parts[{number}]"))
    return writer.chat


class _Writer:
  """Appends to `chat` what a template says."""

  def __init__(self, template: ChatTemplate, tokenizer: Tokenizer):
    self.template = template
    self.tokenizer = tokenizer
    self.chat = EncodedChat([], [], [])

  def add(self, ids: Sequence[int], is_target: bool = False) -> None:
    self.chat.ids.extend(ids)
    self.chat.loss_mask.extend([is_target] * len(ids))

  def add_header(self, role: str) -> None:
    name = self.tokenizer.encode(HEADERS[role])
    self.add([self.special("<|header_start|>"), *name, self.special("<|header_end|>")])
    self.add(self.tokenizer.encode("\n\n"))

  def add_message(self, message: Message, where: str) -> None:
    """A message with its header and its end; `where` names it in errors."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in HEADERS:
      raise ConfigError(f"{where}.role={role!r} is not one of {', '.join(HEADERS)}.")
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
      raise ConfigError(f"{where}.tool_calls: only the assistant calls tools, not role={role}.")
    content = message.get("content")
    if content is None and calls:
      content = ""
    if isinstance(content, str):
      content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
      raise ConfigError(f"{where}.content={content!r} is neither a text nor a list of parts.")

    self.add_header(role)
    is_target = role == "assistant"
    for number, part in enumerate(content):
      self.add(self.part_ids(part, f"{where}.content[{number}]"), is_target)
    for number, call in enumerate(calls):
      text = tool_call_text(call, f"{where}.tool_calls[{number}]")
      self.add(self.tokenizer.encode(text), is_target)
    uses_tool = calls or role == "tool"
    self.add([self.special(self.template.tool_end if uses_tool else END_OF_TURN)], is_target)

  def part_ids(self, part: Part, where: str) -> list[int]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
      return self.tokenizer.encode(part["text"])
    if kind == "image":
      self.chat.images.append(part)
      return self.image_ids(*_image_size(part, where))
    raise ConfigError(
      f'{where} is neither {{"type": "text", "text": TEXT}} nor {{"type": "image", "image": PATH}}.'
    )

  def image_ids(self, width: int, height: int) -> list[int]:
    """Ids of an image: its tiles row by row if it has several, then a small copy of the whole."""
    template = self.template
    rows, columns = best_canvas(width, height, template.tile_size, template.max_tiles)
    names = [field.name for field in dataclasses.fields(ImageTokenIds)]
    ids = ImageTokenIds(**{name: self.special(f"<|{name}|>") for name in names})
    return image_token_layout(rows, columns, template.patches_per_tile, ids)

  def special(self, name: str) -> int:
    if name not in self.tokenizer.special_tokens:
      raise ConfigError(
        f"the tokenizer has no token {name}, which a chat needs; set data.tokenizer to Llama 4's own."
      )
    return self.tokenizer.special_tokens[name]


def tool_call_text(call: Mapping[str, Any], where: str = "tool_call") -> str:
  """A call of a tool as the assistant writes it, in Meta's JSON. Raises: ConfigError when it is malformed."""
  function = call.get("function", call) if isinstance(call, Mapping) else {}
  function = function if isinstance(function, Mapping) else {}
  name = function.get("name", function.get("tool_name"))
  arguments = function.get("arguments")
  if isinstance(arguments, str):  # as OpenAI's API gives them
    try:
      arguments = json.loads(arguments)
    except ValueError:
      arguments = None
  if not isinstance(name, str) or not isinstance(arguments, Mapping):
    raise ConfigError(
      f'{where} is not {{"function": {{"name": NAME, "arguments": OBJECT}}}}, nor'
      ' {"tool_name": NAME, "arguments": OBJECT}.'
    )
  return json.dumps({"type": "function", "name": name, "parameters": arguments})


def _image_size(part: Part, where: str) -> tuple[int, int]:
  """Width and height in pixels. Raises: ConfigError when the part has neither; DataError on a broken file."""
  size = part.get("size")
  if size is None:
    image = part.get("image")
    if not isinstance(image, str | os.PathLike | Image.Image):
      raise ConfigError(f"{where}.image={image!r} is neither a path nor an image.")
    size = load_image(image).size  # upright, as its tiles will be
  if not (isinstance(size, Sequence) and len(size) == 2 and all(_is_positive(n) for n in size)):
    raise ConfigError(f"{where}.size={size!r} is not [width, height] in pixels.")
  return size[0], size[1]


def _is_positive(number: Any) -> bool:
  return isinstance(number, int) and number > 0
