"""What decode.py is asked for, and what it prints."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_arrays, tiny_config, tiny_model, tiny_vision_config
from tiny_tokenizers import write_tiktoken

from maxllama4 import ConfigError
from maxllama4.data.tokenizer import load_tokenizer
from maxllama4.decoding.generate import Completion, generate
from maxllama4.decoding.request import (
  DecodeRequest,
  answer,
  cut_at_stop,
  encode_prompt,
  split_overrides,
)
from maxllama4.model.weights import ModelTemplate


class Letters:
  """A tokenizer of 26 letters: a is 5, b is 6, ..."""

  bos_token_id, stop_token_ids = 1, (2,)

  def encode(self, text):
    return [ord(letter) - ord("a") + 5 for letter in text]

  def decode(self, ids):
    return "".join(chr(i - 5 + ord("a")) if i >= 5 else "." for i in ids)


@pytest.fixture
def printed(capsys):
  """A function from settings to what is printed for them."""

  def run(**settings):
    settings = {"max_new_tokens": 6, "temperature": 0.0} | settings
    answer(tiny_model(seed=2), Letters(), DecodeRequest(**settings))
    return capsys.readouterr().out

  return run


def test_json_holds_what_was_asked_and_what_came(printed, tmp_path):
  (tmp_path / "prompts").write_text('{"prompt": "abc"}\n{"prompt": "z"}\n')
  text = printed(
    prompts_file=str(tmp_path / "prompts"), output="json", num_samples=2, logprobs=True
  )
  records = [json.loads(line) for line in text.splitlines()]
  assert [record["prompt"] for record in records] == ["abc", "abc", "z", "z"]
  prompts = [[1, 5, 6, 7], [1, 5, 6, 7], [1, 30], [1, 30]]
  completions = generate(tiny_model(seed=2), prompts, 6, stop_tokens=(2,))
  for record, prompt, completion in zip(records, prompts, completions):
    assert record["prompt_tokens"] == prompt and record["tokens"] == completion.tokens
    assert record["completion"] == Letters().decode(completion.tokens)
    assert record["finish_reason"] == completion.finish_reason
    assert len(record["logprobs"]) == len(record["tokens"])


def test_text_is_the_same_in_pieces_and_at_once_and_echo_puts_the_prompt_before_it(printed):
  whole = printed(prompt="abc", max_new_tokens=20)
  assert printed(prompt="abc", max_new_tokens=20, stream=True) == whole
  assert printed(prompt="abc", max_new_tokens=20, echo=True) == "abc" + whole


def test_a_completion_ends_with_the_token_in_which_a_stop_text_is_complete():
  completion = Completion([5, 6, 7, 8, 9], [0.0] * 5, "length")  # abcde
  cut = cut_at_stop(completion, ["zz", "cd", "e"], Letters().decode)
  assert cut == Completion([5, 6, 7, 8], [0.0] * 4, "stop")
  assert cut_at_stop(completion, ["x"], Letters().decode) is completion


def test_messages_become_a_dialog_whose_answer_is_open(tmp_path):
  messages = [{"role": "user", "content": "hello"}]
  (tmp_path / "prompts").write_text(json.dumps({"messages": messages}) + '\n{"prompt": "hello"}\n')
  chat, text = DecodeRequest(prompts_file=str(tmp_path / "prompts")).prompts()
  tokenizer = load_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"))
  assert encode_prompt(tokenizer, chat, (), None) == (tokenizer.encode_chat(messages), None)
  hello = [tokenizer.bos_token_id, *tokenizer.encode("hello")]
  assert encode_prompt(tokenizer, text, (), None) == (hello, None)


def test_pictures_become_patch_tokens_and_tiles_before_a_prompt_and_within_a_dialog(tmp_path):
  tokenizer = load_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"))
  vision = tiny_vision_config().vision_config  # tiles of 8 pixels, 4 tokens each
  path = str(tmp_path / "wide.png")
  Image.new("RGB", (16, 8), (255, 0, 0)).save(path)  # two tiles, and the global one
  special = tokenizer.special_tokens
  ids, tiles = encode_prompt(tokenizer, "hello", (path,), vision)
  assert ids[0] == tokenizer.bos_token_id and ids[1] == special["<|image_start|>"]
  assert ids.count(special["<|patch|>"]) == 3 * vision.patch_tokens_per_tile
  assert ids[-1:] == tokenizer.encode("hello") and tiles.shape == (3, 3, 8, 8)
  np.testing.assert_array_equal(tiles[:, :, 0, 0], [[1, -1, -1]] * 3)
  dialog = [{"role": "user", "content": [{"type": "image", "image": path}]}]
  chat_ids, chat_tiles = encode_prompt(tokenizer, dialog, (), vision)
  assert chat_ids.count(special["<|patch|>"]) == 12 and chat_ids[-1:] == tokenizer.encode("\n\n")
  np.testing.assert_array_equal(tiles, chat_tiles)
  with pytest.raises(ConfigError, match="no vision tower"):
    encode_prompt(tokenizer, "hello", (path,), None)
  dialog = [{"role": "user", "content": [{"type": "image", "size": [3, 4]}]}]
  with pytest.raises(ConfigError, match="only the size is known"):
    encode_prompt(tokenizer, dialog, (), vision)


def test_a_chat_answers_each_line_with_the_dialog_before_it_in_view(tmp_path, monkeypatch, capsys):
  tokenizer = load_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"))
  model = tiny_model(tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=512))
  monkeypatch.setattr("sys.stdin", io.StringIO("hello\nuser\n"))
  answer(model, tokenizer, DecodeRequest(chat=True, temperature=0.0, max_new_tokens=4))
  messages, expected = [], ""
  for text in ("hello", "user"):
    messages.append({"role": "user", "content": text})
    prompt = tokenizer.encode_chat(messages)
    tokens = generate(model, [prompt], 4, stop_tokens=tokenizer.stop_token_ids)[0].tokens
    messages.append({"role": "assistant", "content": tokenizer.decode(tokens)})
    expected += messages[-1]["content"] + "\n"
  assert capsys.readouterr().out == expected


def test_an_answer_ends_at_the_end_of_a_turn_of_a_message_and_of_a_text(tmp_path, capsys):
  """The released models close calls of tools with either of the first two."""
  tokenizer = load_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"))
  config = tiny_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
  nothing = jax.tree.map(jnp.zeros_like, tiny_arrays(config))
  nothing |= {path: jnp.ones_like(nothing[path]) for path in ("embed/weight", "norm/weight")}
  prompts = tmp_path / "prompts"
  prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
  for name in ("<|eot|>", "<|eom|>", "<|end_of_text|>", "<|python_end|>"):
    head = nothing["head/weight"].at[:, tokenizer.special_tokens[name]].set(1)  # always writes that
    model = ModelTemplate(config).model(nothing | {"head/weight": head})
    request = DecodeRequest(
      prompts_file=str(prompts), temperature=0.0, max_new_tokens=3, output="json"
    )
    answer(model, tokenizer, request)
    record = json.loads(capsys.readouterr().out)
    ends = name != "<|python_end|>"
    assert record["finish_reason"] == ("stop" if ends else "length"), name
    assert len(record["tokens"]) == (0 if ends else 3) and record["completion"] == ""


def test_lines_of_a_file_of_prompts_end_at_newlines_alone(tmp_path):
  """Other separators may stand in JSON as they are; a mark of byte order and empty lines say nothing."""
  texts = ["a\u2028b\u2029c\x85d", "e"]
  lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
  (tmp_path / "prompts").write_text("\ufeff" + "\r\n\n".join(lines) + "\n\n", encoding="utf-8")
  assert DecodeRequest(prompts_file=str(tmp_path / "prompts")).prompts() == texts


def test_settings_of_the_request_are_told_from_those_of_the_configuration():
  request, rest = split_overrides(
    ["prompt=max_new_tokens: 3", "model.vocab_size=8", "temperature=0", "stop=[a, b]", "x=1"]
  )
  assert (request.prompt, request.temperature) == ("max_new_tokens: 3", 0.0)
  assert request.stop == ("a", "b") and rest == ["model.vocab_size=8", "x=1"]


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({}, "prompt"),
    ({"prompt": "a", "prompts_file": "b"}, "prompts_file"),
    ({"prompt": "a", "output": "xml"}, "output=xml"),
    ({"prompt": "a", "num_samples": 0}, "num_samples=0"),
    ({"prompt": "a", "stream": True, "num_samples": 2}, "stream=true"),
    ({"prompt": "a", "top_p": 2.0}, "top_p=2.0"),
  ],
)
def test_a_request_that_makes_no_sense_is_refused(settings, words):
  with pytest.raises(ConfigError, match=words):
    DecodeRequest(**settings)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("", "is empty"),
    ('{"prompt": "a"}\n{"text": 1}\n', "line 2"),
    ("{", "line 1"),
    ('["a"]', "line 1"),
    ('{"messages": "a"}', "line 1"),
  ],
)
def test_a_file_of_prompts_that_is_not_one_is_named_with_its_line(tmp_path, content, words):
  (tmp_path / "prompts").write_text(content)
  request = DecodeRequest(prompts_file=str(tmp_path / "prompts"))
  with pytest.raises(ConfigError, match=words):
    request.prompts()
