"""Who computes attention's output and log-sum-exp on a device: our Triton kernel, or a vendor's through torch.

A provider is a file here with `supports(facts)`, `enabled()` and `attend(call) -> (out [B, Hq, S, Dv], log-sum-exp
float32 [B, Hq, S], natural, +inf where a query sees nothing)`. But for `triton` they know neither sinks nor tokens:
`choose.attend` adds the one and mends the other.
"""
