"""`python -m kvpass` is the command `kvpass`."""

from kvpass.cli import main

raise SystemExit(main())
