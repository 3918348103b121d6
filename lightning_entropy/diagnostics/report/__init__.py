"""All diagnostics of a checkpoint on one page, and two checkpoints side by side."""
