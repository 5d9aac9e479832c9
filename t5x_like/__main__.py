"""`python -m t5x_like COMMAND`."""

import sys

from t5x_like.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
