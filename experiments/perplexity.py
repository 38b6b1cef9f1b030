"""``jaxprune perplexity`` for people in a checkout; see jaxprune/commands/perplexity.py.

python experiments/perplexity.py --help
"""

import sys
from functools import partial

from jaxprune.commands.perplexity import main as command

main = partial(command, prog="perplexity.py")

if __name__ == "__main__":
    sys.exit(main())
