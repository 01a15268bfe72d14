"""Stands before the package of this name in Ray's processes: there nothing asks for it.

Every one of them imports jsonschema, which takes this package where it is installed, as with
Jupyter; it compiles a grammar, the larger part of the start of a process. On a busy machine Ray
then gives up before its own processes are up.
"""

raise ImportError("left out of Ray's processes")
