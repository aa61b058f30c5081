"""What a forward pass does, layer by layer: where samples enter, and by which linear maps."""

from samlite.curvature.capture import layers  # which registers its rules

__all__ = ["layers"]
