"""Every kernel of `make lab` runs this before any cell (PYTHONSTARTUP): `utils.session.restart`."""

import os as _os
import sys as _sys
from pathlib import Path as _Path

_sys.path.insert(0, __file__.rpartition("tools")[0])
from utils.session import ROOT as _ROOT
from utils.session.restart import explain_missing_names as _explain

_notebook = _ROOT / "my" / _Path(_os.environ.get("JPY_SESSION_NAME", "")).name
if _notebook.is_file():
    _explain(_notebook)
