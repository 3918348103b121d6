"""What a GPU does with this package: one command for whoever has one, to be stopped and started again."""
