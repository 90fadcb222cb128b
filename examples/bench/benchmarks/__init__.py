"""One file per benchmark; what one is: bench/suite.py."""
