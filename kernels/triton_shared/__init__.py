"""What Triton kernels share: device helpers, and the host side of a launch."""
