"""The benchmark: `make bench`, or `python -P examples/bench/run.py --help`."""
