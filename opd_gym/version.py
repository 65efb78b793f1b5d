"""The version of this package and where it lies, apart so that every layer and the build can read it."""

from pathlib import Path

__version__ = "0.1.0"

PACKAGE_FILE = Path(__file__).resolve().parent / "__init__.py"
