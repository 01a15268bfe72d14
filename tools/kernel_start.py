"""Every kernel of `make lab` runs this before any cell (PYTHONSTARTUP); see `utils.restart`."""

import sys as _sys

_sys.path.insert(0, __file__.rpartition("tools")[0])
from utils import restart as _restart

_restart.explain_in_session()
