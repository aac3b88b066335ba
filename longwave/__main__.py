"""`python -m longwave` is the command line."""

import sys

from longwave.cli import main

sys.exit(main())
