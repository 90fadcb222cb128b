"""How slots hold keys and values: a file for each kind of codec, and what ops do with them.

`registry.py` lists the codecs, `storage.py` is the part of a rule that names them, `whole.py` and `chosen.py` hold the
tokens that are kept whole beside their codes, by number or by score, and `entries.py` is what attention reads.
"""
