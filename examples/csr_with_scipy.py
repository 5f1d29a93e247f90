"""A pruned linear layer out of a csr folder, with SciPy and json alone: no ONNX, no runtime, no relief_export.

Run it with `python examples/csr_with_scipy.py CSR_FOLDER [WEIGHT]`, where CSR_FOLDER is what
`relief-export convert MODEL.onnx CSR_FOLDER --to csr` or an export with the format csr wrote.
"""

import json
import sys
from pathlib import Path

import numpy as np
import scipy.sparse


def main(folder: Path, name: str | None) -> None:
    """Load one weight and multiply with it."""
    entries = json.loads((folder / "index.json").read_text())["tensors"]
    matrices = [entry for entry in entries if len(entry["shape"]) > 1 and name in {None, entry["name"]}]
    if not matrices:
        sys.exit(f"{folder} has no weight {name!r}; it has {', '.join(entry['name'] for entry in entries)}")
    entry = matrices[0]
    if entry["layout"] == "dense":  # more than half of it is left: sparse would be larger
        weight = scipy.sparse.csr_array(np.load(folder / entry["file"]).reshape(entry["shape"][0], -1))
    else:
        weight = scipy.sparse.load_npz(folder / entry["file"])  # (out, in), or (out, in * kh * kw) of a convolution
    print(f"{entry['name']}: {weight.shape}, {weight.nnz:,} of {np.prod(weight.shape):,} weights, {entry['dtype']}")

    # One sample through the layer: only the weights that are left are multiplied.
    x = np.random.default_rng(0).normal(size=weight.shape[1]).astype(weight.dtype)
    y = weight @ x
    print(f"|W x| = {np.linalg.norm(y):.4f}, dense {np.linalg.norm(weight.toarray() @ x):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
