import random

import numpy as np
import pytest

from maxllama4.config import ConfigError
from maxllama4.data.sources import DataError, Document
from maxllama4.data.tokenizer import load_tokenizer, train_tokenizer

CODE = "class A:\n    def f(self, x):\n        return self.g(x) + 1\n\n\n    def g(self, x):\n        pass\n"


def documents(*texts):
  return [Document(str(i), text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  return train_tokenizer(documents(*[CODE + f"# {i}\n" for i in range(50)]), 512, path)


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


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_hard_text_comes_back_as_it_was(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_come_back_byte_for_byte_and_without_special_ids(tokenizer):
  rng = random.Random(0)
  special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 3}  # 3: unk
  pieces = ["\u2581", " ", "  ", "\n", "\t", "\0", "self", "return x", "<s>", "\r"]
  for _ in range(300):
    codes = (rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(9))
    characters = [chr(code) for code in codes]  # all but surrogates
    text = "".join(rng.choices(pieces + characters, k=rng.randrange(30)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())
    assert not special & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


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


def test_a_folder_is_read_through_its_tokenizer_model(tmp_path, tokenizer):
  train_tokenizer(documents(CODE), 300, tmp_path / "tokenizer.model")
  loaded = [load_tokenizer(path) for path in (tmp_path, tmp_path / "tokenizer.model")]
  assert loaded[0].encode(CODE) == loaded[1].encode(CODE)


def test_what_cannot_be_read_or_trained_is_said_with_the_setting(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  for path, reason in [
    (tmp_path / "tokenizer.json", "not a SentencePiece model"),
    (tmp_path, "tokenizer.model cannot be read"),
    (tmp_path / "no", "cannot be read"),
  ]:
    with pytest.raises(ConfigError, match=rf"data\.tokenizer={path}.*{reason}"):
      load_tokenizer(path)
  with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is too small.* need \d+"):
    train_tokenizer(documents(CODE), 256, tmp_path / "x.model")
  with pytest.raises(DataError, match="cannot be trained"):
    train_tokenizer(documents(""), 512, tmp_path / "x.model")
  assert not (tmp_path / "x.model").exists()
