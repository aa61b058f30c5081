"""What a forward pass does, layer by layer: where samples enter, and by which linear maps."""
