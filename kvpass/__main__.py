"""`python -m kvpass` is the command `kvpass`."""

from kvpass.api.cli import main

raise SystemExit(main())
