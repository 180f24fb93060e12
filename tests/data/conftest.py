import pytest
from golden import golden_tokenizer_file

from maxllama4.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def llama4_tokenizer():
  """Meta's tokenizer of Llama 4; skips the test without its file."""
  return load_tokenizer(golden_tokenizer_file())
