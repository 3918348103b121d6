"""Methods as values: what a relaxation is, its presets and schedules. No torch state."""
