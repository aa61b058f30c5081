"""What a sweep says: numbers with their intervals, tables and figures."""

from samlite.report.outcomes import Report, summarize

__all__ = ["Report", "summarize"]
