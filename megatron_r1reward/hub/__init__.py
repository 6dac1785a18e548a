"""Sharing a trained model on the Hugging Face Hub, and fetching one."""
