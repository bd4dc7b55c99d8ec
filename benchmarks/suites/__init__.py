"""The chapters of the report: each module has one `measure.Suite`."""
