"""What a forward pass does, layer by layer: where samples enter, and by which linear maps."""

from samlite.curvature.capture import contractions, layers, recurrent  # which register their rules

__all__ = ["contractions", "layers", "recurrent"]
