import json
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from golden import golden_table
from tiny_tokenizers import TOKENS, write_hugging_face, write_tiktoken

from maxllama4.config import ConfigError
from maxllama4.data.sources import DataError, Document
from maxllama4.data.tokenizer import (
  LLAMA4_SPECIAL_TOKENS,
  keep_tokenizer,
  load_tokenizer,
  train_tokenizer,
)

CODE = "class A:\n    def f(self, x):\n        return self.g(x) + 1\n\n\n    def g(self, x):\n        pass\n"


def documents(*texts):
  return [Document(str(i), text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  return train_tokenizer(documents(*[CODE + f"# {i}\n" for i in range(50)]), 512, path)


@pytest.fixture(scope="module")
def tiktoken(tmp_path_factory):
  return load_tokenizer(write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "a.model"))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
  return load_tokenizer(write_hugging_face(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


@pytest.fixture(scope="module", params=["tokenizer", "tiktoken", "hugging_face"])
def any_tokenizer(request):
  return request.getfixturevalue(request.param)


HARD_TEXTS = [
  "",
  " ",
  "  two in front, two behind  ",
  "\n\n\tif x:\r\n\t\tpass \n",
  "a\u2581b \u2581",  # what SentencePiece itself writes for a space
  "\u2581\u2581 \u2581",
  "\0",
  "a\0b\x01\x1f\x7f\x85\u2028",
  "<s></s><unk><pad><0x41> \u2047 \u2585",  # names of special pieces
  "e\u0301 \u00e9 \ufb01 \uff21 \u00a0 \u3000 \u00b2",  # normalisation would change each
  "\ufeffmark",
  "\U0001f469\u200d\U0001f4bb\U0001f3fd",
  "\ufffd\uffff\U0010ffff\ue000",
]


# Any Unicode, mixed with what tokenizers treat in a way of its own.
PIECES = st.sampled_from(
  [
    *("<|eot|>", "<|header_start|>", "<s>", "</s>", "<pad>", "<|", "\u2581", "<0x41>"),
    *("hello", " hello", "user", "1234", "A's", "'S", "  ", "\r\n", "\n\n", " \t", "\u0301"),
  ]
)
TEXTS = st.lists(st.one_of(st.text(max_size=12), PIECES), max_size=8).map("".join)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_hard_text_comes_back_as_it_was(any_tokenizer, text):
  assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(text=TEXTS)
def test_any_text_comes_back_byte_for_byte_and_without_special_ids(any_tokenizer, text):
  ids = any_tokenizer.encode(text)
  assert any_tokenizer.decode(ids) == text
  assert any_tokenizer.token_num_bytes[ids].sum() == len(text.encode())
  assert not set(any_tokenizer.special_tokens.values()) & set(ids)
  assert all(0 <= i < any_tokenizer.vocab_size for i in ids)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(text=TEXTS, allow_special=st.booleans())
def test_one_vocabulary_gives_the_same_ids_from_both_formats(
  tiktoken, hugging_face, text, allow_special
):
  ids = tiktoken.encode(text, allow_special)
  assert hugging_face.encode(text, allow_special) == ids
  assert hugging_face.decode(ids) == tiktoken.decode(ids)


def test_text_that_looks_like_a_special_token_is_text_unless_asked(any_tokenizer):
  for name, i in any_tokenizer.special_tokens.items():
    text = f"a{name}{name} b"
    a, b = any_tokenizer.encode("a"), any_tokenizer.encode(" b")
    assert any_tokenizer.encode(text, allow_special=True) == [*a, i, i, *b]
    assert i not in any_tokenizer.encode(text)
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
    assert any_tokenizer.decode([*a, i, *b]) == "a b"
    assert any_tokenizer.token_num_bytes[i] == 0


def test_of_two_special_names_that_fit_the_longer_is_meant(tmp_path):
  path = write_hugging_face(tmp_path / "tokenizer.json")
  path.write_text(path.read_text().replace("<|fim_middle|>", "<|eot|>!"))
  tokenizer = load_tokenizer(path)
  ids = tokenizer.encode("<|eot|>!<|eot|>", allow_special=True)
  assert ids == [tokenizer.special_tokens[name] for name in ("<|eot|>!", "<|eot|>")]


@pytest.mark.parametrize(
  "pieces",
  [
    ["123", "4"],  # `1234` is a token, but no more than three digits stand together
    [" ", " hello"],  # `  ` is a token, but the last space goes with the word
    ["hello", "\n\n", " ", " hello", "\n\n"],
    ["user", "'s", " ", " hello", "123", "123"],
  ],
)
def test_merges_do_not_cross_the_cuts_of_llama4s_pattern(tiktoken, pieces):
  ids = tiktoken.encode("".join(pieces))
  assert [tiktoken.decode([i]) for i in ids] == pieces


def test_ids_behind_the_merges_are_llama4s(tiktoken, hugging_face):
  start = len(TOKENS)
  for tokenizer in (tiktoken, hugging_face):
    assert tokenizer.vocab_size == start + 2048 == len(tokenizer.token_num_bytes)
    assert tokenizer.special_tokens["<|begin_of_text|>"] == tokenizer.bos_token_id == start
    assert tokenizer.special_tokens["<|end_of_text|>"] == tokenizer.eos_token_id == start + 1
    assert tokenizer.pad_token_id == start + 18
    assert tokenizer.stop_token_ids == (start + 1, start + 7, start + 8)
    np.testing.assert_array_equal(
      tokenizer.token_num_bytes, [len(token) for token in TOKENS] + [0] * 2048
    )
  assert tiktoken.special_tokens == hugging_face.special_tokens
  assert len(set(LLAMA4_SPECIAL_TOKENS)) == 2048


def test_bytes_that_are_no_character_write_the_replacement_character(any_tokenizer):
  ids = any_tokenizer.encode("x\U0001f9ff")
  assert any_tokenizer.decode(ids[:-1]).rstrip("\ufffd") == "x" != any_tokenizer.decode(ids[:-1])
  assert any_tokenizer.decode([*ids, any_tokenizer.vocab_size, -1]) == "x\U0001f9ff"


def test_long_runs_and_texts_are_cut_where_meta_cuts_them(tiktoken):
  def widths(text):
    """Token lengths at the cuts: `aa` is a token, so an odd length before a cut leaves a single `a`."""
    return [len(tiktoken.decode([i])) for i in tiktoken.encode(text)]

  assert widths("a" * 25_000) == [2] * 12_500
  assert widths("a" * 24_999 + " " + "a" * 24_999).count(1) == 3
  # 25,001: one is left over behind the cut. With a sign in front, the cut falls inside a pair.
  assert widths("a" * 25_001) == [2] * 12_500 + [1]
  assert widths("!" + "a" * 25_001) == [1, *[2] * 12_499, 1, 2]
  assert widths("  a" + "\n" * 25_001)[-2:] == [2, 1]
  # A block ends after 400,000 characters whatever stands there; the run is counted anew behind it.
  assert widths("a b " * 99_999 + "a baaaa")[-3:] == [1, 2, 1]
  assert sum(widths(text := "a" * 1_000_000)) == len(text)  # and in time


def test_special_ids_stand_for_no_text(tokenizer):
  special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
  assert len(set(special)) == 3
  assert tokenizer.decode([*special, *tokenizer.encode("x"), *special]) == "x"
  assert tokenizer.token_num_bytes.shape == (tokenizer.vocab_size,)
  np.testing.assert_array_equal(tokenizer.token_num_bytes[special], 0)
  assert tokenizer.stop_token_ids == (tokenizer.eos_token_id,)


def test_numpy_ids_decode(tokenizer):
  assert tokenizer.decode(np.array(tokenizer.encode(CODE), np.int32)) == CODE


def test_a_lone_surrogate_is_refused_rather_than_changed(tokenizer):
  with pytest.raises(UnicodeEncodeError):
    tokenizer.encode("a\ud800")


def test_indentation_and_newlines_are_learnt_as_pieces(tokenizer):
  for text in (" " * 8, ":\n", "\n\n\n"):
    assert len(tokenizer.encode("x" + text)) - len(tokenizer.encode("x")) <= 1


def test_pieces_cross_words_only_when_asked_to(tmp_path, tokenizer):
  crossing = train_tokenizer(documents(CODE * 20), 400, tmp_path / "x.model", crosses_words=True)

  def inner_spaces(tokenizer):
    texts = [tokenizer.decode([i]) for i in range(4, tokenizer.vocab_size)]
    return [text for text in texts if " " in text.lstrip(" ").rstrip()]

  assert inner_spaces(crossing) and not inner_spaces(tokenizer)
  assert crossing.decode(crossing.encode(CODE)) == CODE


def test_the_same_documents_give_the_same_file(tmp_path):
  texts = documents(*[CODE + str(i) for i in range(20)])
  files = [tmp_path / name for name in ("a.model", "deep/er/b.model")]
  for file in files:
    train_tokenizer(texts, 400, file, seed=3)
  assert files[0].read_bytes() == files[1].read_bytes()
  assert [path.name for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
    "a.model", "b.model",
  ]  # fmt: skip


def test_a_large_corpus_is_sampled_by_the_seed_alone(tmp_path, monkeypatch):
  monkeypatch.setattr("maxllama4.data.tokenizer.TRAINING_CHARACTERS", 200)
  texts = documents(*[f"{chr(97 + i) * 3}{chr(98 + i)} " * 10 for i in range(20)])
  files = [tmp_path / name for name in ("a.model", "b.model", "c.model")]
  for file, seed in zip(files, (1, 1, 2)):
    train_tokenizer(texts, 320, file, seed=seed)
  assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_a_long_text_on_one_line_and_texts_with_nul_are_learnt_from(tmp_path):
  texts = documents("marmalade " * 3000, "\0quince\0" * 500)
  tokenizer = train_tokenizer(texts, 600, tmp_path / "x.model")
  assert len(tokenizer.encode(" marmalade")) == len(tokenizer.encode("quince")) == 1


def test_a_folder_is_read_through_its_tokenizer_model_or_else_its_tokenizer_json(tmp_path):
  write_hugging_face(tmp_path / "tokenizer.json")
  folder = load_tokenizer(tmp_path)
  assert folder.encode(CODE) == load_tokenizer(tmp_path / "tokenizer.json").encode(CODE)
  trained = train_tokenizer(documents(CODE), 300, tmp_path / "tokenizer.model")
  assert load_tokenizer(tmp_path).encode(CODE) == trained.encode(CODE) != folder.encode(CODE)
  (tmp_path / "tokenizer.json").unlink()
  assert load_tokenizer(tmp_path).vocab_size == trained.vocab_size
  write_tiktoken(tmp_path / "tokenizer.model")
  assert load_tokenizer(tmp_path).encode(CODE) == folder.encode(CODE)


def test_files_beside_a_tokenizer_json_say_which_tokens_start_end_and_pad(tmp_path):
  path = write_hugging_face(tmp_path / "tokenizer.json")
  start = len(TOKENS)
  config = {"bos_token": {"content": "<|fim_prefix|>"}, "eos_token": "<|eot|>", "pad_token": None}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eom|>"}')
  generation = {"bos_token_id": 5, "eos_token_id": [start + 1, 300], "pad_token_id": start + 4}
  (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  tokenizer = load_tokenizer(path)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start + 2, start + 8)
  assert tokenizer.pad_token_id == start + 18  # a name of Llama 4's wins over an id
  assert tokenizer.stop_token_ids == tuple(sorted((300, start + 1, start + 7, start + 8)))
  (tmp_path / "generation_config.json").write_text("[]")
  with pytest.raises(ConfigError, match=r"generation_config\.json.* no JSON object"):
    load_tokenizer(path)


def test_what_cannot_be_read_or_trained_is_said_with_the_setting(tmp_path):
  files = {"a/tokenizer.json": b"{}", "b": b"no tokenizer", "c": b"QQ== 0\nQg== 2\n"}
  files |= {"d": b"QQ== 0\n", "e": b"QQ== 0\nQQ== 1\n", "f": b"QQ== 0\nQQ= 1\n"}
  (tmp_path / "a").mkdir()
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / "empty").mkdir()
  for name, reason in [
    ("a", "not a tokenizer.json"),
    ("b", "not a SentencePiece model, nor a tiktoken file or a tokenizer.json"),
    ("c", "line 2: .* rank 1"),
    ("d", "lacks tokens of single bytes"),
    ("e", "line 2: "),
    ("f", "line 2: "),
    ("empty", "tokenizer.model cannot be read.*tokenizer.json"),
    ("no", "cannot be read"),
  ]:
    with pytest.raises(ConfigError, match=rf"data\.tokenizer={tmp_path / name}.*{reason}"):
      load_tokenizer(tmp_path / name)
  with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is too small.* need \d+"):
    train_tokenizer(documents(CODE), 256, tmp_path / "x.model")
  with pytest.raises(DataError, match="cannot be trained"):
    train_tokenizer(documents(""), 512, tmp_path / "x.model")
  assert not (tmp_path / "x.model").exists()


def test_a_tokenizer_json_without_a_start_or_an_end_is_refused(tmp_path):
  path = write_hugging_face(tmp_path / "tokenizer.json")
  path.write_text(path.read_text().replace("begin_of_text", "start"))
  with pytest.raises(ConfigError, match=r"no token for the start or the end"):
    load_tokenizer(path)
  (tmp_path / "generation_config.json").write_text('{"bos_token_id": 3}')
  assert load_tokenizer(path).bos_token_id == 3


def test_metas_file_gives_the_ids_of_metas_tokenizer(llama4_tokenizer):
  assert llama4_tokenizer.vocab_size == 202_048
  assert llama4_tokenizer.bos_token_id == 200_000 and llama4_tokenizer.pad_token_id == 200_018
  assert llama4_tokenizer.stop_token_ids == (200_001, 200_007, 200_008)
  for name, i in golden_table("special_tokens").items():
    assert llama4_tokenizer.special_tokens[name] == i
  for case in golden_table("tokenizer_public"):
    assert llama4_tokenizer.encode(case["text"]) == case["ids"]
    assert llama4_tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocabulary"])
def test_a_tokenizer_that_is_kept_is_the_same_without_its_first_folder(tmp_path, name):
  """Also where it had another name, and where other files say which of its tokens are special."""
  (tmp_path / "first").mkdir()
  file = write_hugging_face(tmp_path / "first" / name)
  said = {"bos_token": "<|fim_prefix|>", "eos_token": "<|fim_suffix|>"}
  (tmp_path / "first" / "tokenizer_config.json").write_text(json.dumps(said))
  (tmp_path / "first" / "generation_config.json").write_text('{"eos_token_id": [5]}')
  given = load_tokenizer(file)
  keep_tokenizer(file, tmp_path / "run")
  shutil.rmtree(tmp_path / "first")
  kept = load_tokenizer(tmp_path / "run")
  for member in ("special_tokens", "bos_token_id", "eos_token_id", "stop_token_ids"):
    assert getattr(kept, member) == getattr(given, member)
  assert kept.encode("hello 123 user") == given.encode("hello 123 user")


def test_metas_file_of_llama_3_is_refused_and_not_read_as_llama_4s(tmp_path, monkeypatch):
  """It is told by its number of merges."""
  monkeypatch.setattr("maxllama4.data.tokenizer.LLAMA3_MERGES", len(TOKENS))
  with pytest.raises(ConfigError, match=r"is Llama 3's.*take the tokenizer\.json"):
    load_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"))
