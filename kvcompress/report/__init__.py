"""Reports: report.json and the model card of a compressed checkpoint."""
