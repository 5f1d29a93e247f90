"""``python -m relief_export`` and ``torchrun -m relief_export run RECIPE``."""

from relief_export.cli import main

if __name__ == "__main__":
    main()
