"""The kernel room: tensors in, tensors out. Knows no graph, policy or model. Installed as `kvpass.kernels`.

prefill_attend, join_slots, score_slots, select_slots, compact_slots, decode_attend:
docs/design/0001-state-and-kernels.md.
"""
