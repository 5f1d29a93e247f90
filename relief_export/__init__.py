"""From a pruned PyTorch network to an exact, small ONNX artifact, proven in ONNX Runtime."""

from relief_export.version import VERSION as __version__  # noqa: N811 - the name every package gives it

__all__ = ["__version__"]
