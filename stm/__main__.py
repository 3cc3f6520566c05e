"""Entry point of `python -m stm`."""

import sys

from stm.cli import main

sys.exit(main())
