"""What decode.py is asked for, and its answers as text or JSON."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from maxllama4.config import (
  ConfigError,
  VisionConfig,
  config_from_section,
  parse_override,
  require,
)
from maxllama4.data.chat import ChatTemplate
from maxllama4.data.images import stack_images
from maxllama4.decoding.generate import Completion, generate, stream
from maxllama4.decoding.sampling import Sampling
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.settings import LARGEST_INT32, at_most

SAMPLE_TEMPERATURE = 0.7  # of a run's samples: greedily, a small model goes round in circles
Prompt = str | list[Any]  # a text to continue, or the messages of a dialog to answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRequest:
  """The settings of decode.py, at the top level of its command line."""

  checkpoint: str | None = (
    None  # run directory, checkpoint or Hugging Face folder; null: the configuration's run_dir
  )
  prompt: str | None = None
  prompts_file: str | None = None  # one JSON object a line, {"prompt": ...} or {"messages": [...]}
  chat: bool = False  # a dialog: each line of standard input is a message to answer
  images: tuple[str, ...] = ()  # files of pictures before the prompt or first message
  max_new_tokens: int = 128
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  seed: int = 0
  num_samples: int = 1  # of each prompt
  stop: tuple[str, ...] = ()  # texts that end a completion; they are not part of it
  logprobs: bool = False
  echo: bool = False  # text output: print the prompt before the completion
  stream: bool = False  # text output: print pieces as they come; one prompt, one sample
  output: str = "text"

  def __post_init__(self):
    if self.output not in ("text", "json"):
      raise ConfigError(f"output={self.output} is not one of text, json.")
    if (self.prompt is not None) + (self.prompts_file is not None) + self.chat != 1:
      raise ConfigError("give one of prompt=TEXT, prompts_file=PATH and chat=true.")
    files = {"prompts_file": self.prompts_file}
    files |= {f"images[{number}]": image for number, image in enumerate(self.images)}
    for name, path in files.items():  # now, and not when the model is loaded
      if path is not None and not os.path.exists(path):
        raise ConfigError(f"{name}={path} cannot be read (there is no such file); check the path.")
    if self.images and self.prompts_file is not None:
      raise ConfigError(
        f"images={list(self.images)} stand before prompt=TEXT; in a prompts_file, write them into the messages."
      )
    for name in ("max_new_tokens", "num_samples"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
    for name in ("max_new_tokens", "num_samples", "top_k", "seed"):
      at_most(name, abs(getattr(self, name)), LARGEST_INT32)
    if "" in self.stop:
      raise ConfigError(
        f"stop={list(self.stop)} holds an empty text, which every completion ends with; leave it out."
      )
    if (self.stream or self.chat) and (
      self.prompts_file or self.num_samples > 1 or self.output == "json" or self.stop
    ):
      raise ConfigError(
        "stream=true and chat=true print one sample of one prompt as text; leave out prompts_file, num_samples, stop"
        " and output."
      )
    try:
      Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
    except ValueError as error:
      raise ConfigError(str(error)) from None

  @property
  def sampling(self) -> Sampling:
    return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

  def prompts(self) -> list[Prompt]:
    """The prompts. Raises: ConfigError naming the line of `prompts_file` that holds none."""
    if self.prompt is not None:
      return [self.prompt]
    try:
      # Not splitlines: JSON may hold U+2028 and its like as they are.
      lines = pathlib.Path(self.prompts_file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, "strerror", None) or error
      raise ConfigError(f"prompts_file={self.prompts_file} cannot be read ({reason}).") from None
    prompts = []
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      prompt = _prompt_of(line)
      if prompt is None:
        raise ConfigError(
          f"prompts_file={self.prompts_file}, line {number}: neither"
          ' {"prompt": TEXT} nor {"messages": [...]}.'
        )
      prompts.append(prompt)
    if not prompts:
      raise ConfigError(f"prompts_file={self.prompts_file} is empty; write one JSON object a line.")
    return prompts


def _prompt_of(line: str) -> Prompt | None:
  """What a line of `prompts_file` asks for; None where it is malformed."""
  try:
    entry = json.loads(line)
    json.dumps(entry, ensure_ascii=False).encode("utf-8")  # JSON may spell halves of characters
  except (ValueError, RecursionError):
    return None
  if not isinstance(entry, dict):
    return None
  if isinstance(entry.get("prompt"), str):
    return entry["prompt"]
  return entry["messages"] if isinstance(entry.get("messages"), list) else None


def encode_prompt(
  tokenizer: Any, prompt: Prompt, images: Sequence[str], vision: VisionConfig | None
) -> tuple[list[int], np.ndarray | None]:
  """Ids up to where the model's answer starts, and the tiles of its images, if any.

  Raises: ConfigError on malformed messages, and on images for a model without a vision tower; DataError on broken files.
  """
  template = ChatTemplate()
  if vision is not None:
    template = ChatTemplate(
      tile_size=vision.image_size, patches_per_tile=vision.patch_tokens_per_tile
    )
  if isinstance(prompt, str):
    parts = [{"type": "image", "image": image} for image in images]
    chat = template.encode_parts(tokenizer, [*parts, {"type": "text", "text": prompt}])
  else:
    chat = template.encode(tokenizer, prompt, add_generation_prompt=True)
  if not chat.images:
    return chat.ids, None
  if vision is None:
    raise ConfigError(
      "the prompt holds images, but this model has no vision tower; leave them out."
    )
  if not all("image" in part for part in chat.images):
    raise ConfigError('a message has an image of which only the size is known; give its "image".')
  return chat.ids, stack_images([part["image"] for part in chat.images], vision.image_size)[0]


def split_overrides(overrides: Sequence[str]) -> tuple[DecodeRequest, list[str]]:
  """The request among `key=value` strings, and the rest, which are the configuration's."""
  names = {field.name for field in dataclasses.fields(DecodeRequest)}
  values, rest = {}, []
  for override in overrides:
    key = override.partition("=")[0]
    if key in ("prompt", "prompts_file", "checkpoint"):  # text as it stands, never YAML
      values[key] = override.partition("=")[2]
    elif key in names:
      values[key] = parse_override(override)[1]
    else:
      rest.append(override)
  return config_from_section(DecodeRequest, values, ""), rest


def answer(
  model: Llama4ForCausalLM, tokenizer: Any, request: DecodeRequest, out: TextIO | None = None
) -> None:
  """Completes the request's prompts and prints them to `out`, or to standard output."""
  out = out or sys.stdout
  if request.chat:
    _chat(model, tokenizer, request, sys.stdin, out)
    return
  asked = [prompt for prompt in request.prompts() for _ in range(request.num_samples)]
  vision = model.config.vision_config
  encoded = [encode_prompt(tokenizer, prompt, request.images, vision) for prompt in asked]
  prompts = [ids for ids, _ in encoded]
  check_lengths(prompts, model.config.max_position_embeddings)
  tiles = [tiles for _, tiles in encoded if tiles is not None]
  pixel_values = np.concatenate(tiles) if tiles else None
  if request.stream:
    out.write(asked[0] if request.echo else "")
    _stream(model, tokenizer, request, prompts[0], pixel_values, out)
    return
  completions = generate(
    model,
    prompts,
    request.max_new_tokens,
    request.temperature,
    request.top_k,
    request.top_p,
    request.seed,
    tokenizer.stop_token_ids,
    pixel_values,
    request.logprobs,
  )
  for given, prompt, completion in zip(asked, prompts, completions):
    completion = cut_at_stop(completion, request.stop, tokenizer.decode)
    written = tokenizer.decode(completion.tokens)
    for stop in request.stop:
      written = written.split(stop)[0]
    if request.output == "json":
      record = {
        "prompt": given,
        "completion": written,
        "prompt_tokens": prompt,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
      }
      if request.logprobs:
        record["logprobs"] = completion.logprobs
      out.write(json.dumps(record) + "\n")
    else:
      shown = given if isinstance(given, str) else tokenizer.decode(prompt)
      out.write((shown if request.echo else "") + written + "\n")
  out.flush()


def check_lengths(prompts: Sequence[Sequence[int]], longest: int) -> None:
  """Raises: ConfigError for a prompt that alone is longer than the model's context."""
  for i, prompt in enumerate(prompts):
    require(
      len(prompt) <= longest,
      f"prompt {i + 1} holds {len(prompt)} tokens and the model has {longest} positions"
      " (model.max_position_embeddings); shorten it.",
    )


def continuations(
  model: Llama4ForCausalLM, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
  """How `model` goes on from each of `prompts`: a training run's samples, with the same random numbers every time."""
  ids = [[tokenizer.bos_token_id, *tokenizer.encode(prompt)] for prompt in prompts]
  completions = generate(
    model, ids, max_new_tokens, SAMPLE_TEMPERATURE, stop_tokens=tokenizer.stop_token_ids
  )
  return [tokenizer.decode(completion.tokens) for completion in completions]


def cut_at_stop(
  completion: Completion, stops: Sequence[str], decode: Callable[[list[int]], str]
) -> Completion:
  """The completion up to the token in which the first of `stops` is complete."""
  for length in range(1, len(completion.tokens) + 1) if stops else ():
    if any(stop in decode(completion.tokens[:length]) for stop in stops):
      logprobs = completion.logprobs and completion.logprobs[:length]
      return Completion(completion.tokens[:length], logprobs, "stop")
  return completion


def _chat(model, tokenizer, request, lines, out) -> None:
  """Answers each line as a user's message, with the whole dialog before it in view."""
  messages, images = [], [{"type": "image", "image": image} for image in request.images]
  for line in lines:
    content = [*images, {"type": "text", "text": line.rstrip("\n")}]
    messages.append({"role": "user", "content": content})
    images = []
    prompt, pixel_values = encode_prompt(tokenizer, messages, (), model.config.vision_config)
    written = _stream(model, tokenizer, request, prompt, pixel_values, out)
    messages.append({"role": "assistant", "content": written})


def _stream(model, tokenizer, request, prompt, pixel_values, out) -> str:
  """Prints a completion in pieces, and returns it."""
  tokens, shown = [], ""
  stops = tokenizer.stop_token_ids
  for piece, _ in stream(
    model,
    [prompt],
    request.max_new_tokens,
    request.sampling,
    request.seed,
    stops,
    piece=8,
    pixel_values=pixel_values,
  ):
    tokens += [int(token) for token in piece[0] if token >= 0]
    written = tokenizer.decode(tokens)
    # A character whose bytes are still coming decodes to U+FFFD; it is printed when it is whole.
    written = written.rstrip("\ufffd")
    out.write(written[len(shown) :])
    out.flush()
    shown = written
  written = tokenizer.decode(tokens)
  out.write(written[len(shown) :] + "\n")
  out.flush()
  return written
