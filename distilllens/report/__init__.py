"""Reports: score tables, training curves, lens maps, and one self-contained page of them all."""

from distilllens.report.command import report_main

__all__ = ["report_main"]
