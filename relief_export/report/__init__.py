"""The page about a run, made from records alone."""

from relief_export.report.page import ReportPaths, build_report

__all__ = ["ReportPaths", "build_report"]
