"""What users call: compile, explain, rewrite, report, inspect, export_mlir, the command line."""
