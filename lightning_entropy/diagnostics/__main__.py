"""Report on checkpoints from a command line: ``python -m lightning_entropy.diagnostics report CHECKPOINT ...``."""

from lightning_entropy.diagnostics.report.command_line import main

if __name__ == "__main__":
    main()
