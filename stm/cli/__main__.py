"""Entry point of `python -m stm.cli`."""

import sys

from stm.cli import main

sys.exit(main())
