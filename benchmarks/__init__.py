"""Where the seconds and bytes go: `python -m benchmarks`."""
