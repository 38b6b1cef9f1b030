"""``jaxprune prune`` for people in a checkout; see jaxprune/commands/prune.py.

python experiments/prune.py --help
"""

import sys
from functools import partial

from jaxprune.commands.prune import main as command

main = partial(command, prog="prune.py")

if __name__ == "__main__":
    sys.exit(main())
