"""What micro-batches and links take on the devices at hand, measured on the engine that trains."""
