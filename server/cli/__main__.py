"""`python -m server.cli`: the same as the command `moespan`, for a source tree that is not installed."""

import sys

from server.cli import main

sys.exit(main())
