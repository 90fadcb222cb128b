"""What becomes of slots that go: they are merged into slots that stay (`record.py`; else they are dropped).

In this order: the slots that each one goes into (a file for each kind: `nearest.py`, `following.py`, `runs.py`,
`one_slot.py`), whether it goes in at all (`gates.py`), with how much weight (`weights.py`), and the sums, in float32:
`merge_slots.py` at the end of a call of several tokens, `merge_victim.py` at the end of a step.
"""
