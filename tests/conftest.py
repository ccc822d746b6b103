"""Puts the repository root on the path: the files under test are flat modules, not a package."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
