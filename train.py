"""Train a Llama 4: python train.py CONFIG.yml [key=value ...]"""

import sys

from maxllama4.cli import main

if __name__ == "__main__":
  sys.exit(main(["train", *sys.argv[1:]]))
