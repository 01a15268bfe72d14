"""Every kernel of `make lab` runs this before any cell (PYTHONSTARTUP): `utils.session.restart`."""

import sys as _sys

_sys.path.insert(0, __file__.rpartition("tools")[0])
from utils.session import restart as _restart

_restart.explain_in_session()
