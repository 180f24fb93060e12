"""A run directory to one self-contained page."""

from maxllama4.report.page import write_report

__all__ = ["write_report"]
