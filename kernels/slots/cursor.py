"""Columns of the cursor: int32 [B, Hkv, 4], or 6 where heads have budgets of their own (slots/ragged.py)."""

LIVE, FREE, SEEN, FIRST, EXTRA, SHIFT = range(6)
"""Slots in use; the slot for the next token; valid tokens so far; position of the row's first valid token, -1 before
it; slots that a head may hold above the even budget; slots of the heads before it that are above theirs.
"""
