"""Samples in memory or on disk, and their batches."""
