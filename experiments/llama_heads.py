"""``jaxprune heads`` for people in a checkout; see jaxprune/commands/heads.py.

python experiments/llama_heads.py --help
"""

import sys
from functools import partial

from jaxprune.commands.heads import main as command

main = partial(command, prog="llama_heads.py")

if __name__ == "__main__":
    sys.exit(main())
