"""Reports: score tables, training curves, lens maps, and one self-contained page of them all.

The command is ``distilllens.report.command.report_main``.
"""
