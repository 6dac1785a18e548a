"""Starting things: local servers beside a stage, and the demo pipeline."""
