"""Release engineering for image generators: train, evaluate, document, export, gate, serve."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("modelops")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = ["__version__"]
