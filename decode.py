"""Sample from a Llama 4: python decode.py [CONFIG.yml] checkpoint=PATH prompt="..." [key=value ...]"""

import sys

from maxllama4.cli import main

if __name__ == "__main__":
  sys.exit(main(["decode", *sys.argv[1:]]))
