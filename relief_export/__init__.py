"""From a pruned PyTorch network to an exact, small ONNX artifact, proven in ONNX Runtime."""

from relief_export.version import VERSION as __version__

__all__ = ["__version__"]
