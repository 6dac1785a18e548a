"""What the NeMo-Run recipes share. Runs in the launcher's own environment: no torch, no vLLM."""
