"""What things cost: seconds and bytes of one micro-batch, from its document lengths."""
