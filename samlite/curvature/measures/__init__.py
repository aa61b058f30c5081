"""Sharpness as the literature measures it: a function a measure, each with its definition, source and cost."""
