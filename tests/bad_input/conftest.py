import shutil

import pytest
from mutations import GOOD
from refusals import Desk
from tiny import tiny_config, tiny_model

from maxllama4 import save_model
from maxllama4.config import DataConfig
from maxllama4.data.sources import open_documents
from maxllama4.data.tokenizer import train_tokenizer


@pytest.fixture
def desk(tmp_path, monkeypatch, capfd):
  """An empty folder to stand in."""
  folder = tmp_path / "desk"
  folder.mkdir()
  monkeypatch.chdir(folder)
  return Desk(folder, capfd)


@pytest.fixture
def run(desk):
  """A good configuration, and the text that it is about."""
  desk.write("texts/a.txt", "to be or not to be")
  return desk.write("run.yml", GOOD)


@pytest.fixture(scope="session")
def good(tmp_path_factory):
  """A folder with a model as a run directory (`run`) and as Hugging Face's (`hf`), both with a tokenizer, and texts."""
  folder = tmp_path_factory.mktemp("good")
  (folder / "texts").mkdir()
  for i in range(4):
    (folder / "texts" / f"{i}.txt").write_text(f"to be or not to be {i} times; " * 20)
  model = tiny_model(tiny_config(vocab_size=400))
  data = DataConfig(paths=(str(folder / "texts"),), held_out_fraction=0)
  train_tokenizer(open_documents(data, "all"), 380, folder / "tokenizer.model")
  for name, kind in (("run", "maxllama4"), ("hf", "hf")):
    save_model(model, folder / name, format=kind)
    shutil.copy(folder / "tokenizer.model", folder / name)
  return folder
