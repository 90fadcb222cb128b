"""Reading traced graphs: canonical calls, view chains, shapes, dataflow. Knows no policy and edits nothing."""
