"""What is measured with models beside the answers."""
